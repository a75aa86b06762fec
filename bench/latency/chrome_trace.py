"""One request as a Chrome trace, which Perfetto opens: stages, passes and layers as named spans above the ops.

Recorded by torch's profiler, which on a GPU adds kernels and copies. Stages name themselves while it runs; passes and
layers are named by hooks that exist during the recording only. Profiling costs time: look at proportions, not at sums.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cfpp_rt.bench.latency.workload import Subject
from cfpp_rt.errors import InputError
from cfpp_rt.io.atomic import write_atomically


def record(subject: Subject, path: str | Path) -> int:
    """Write the trace of one request to this runtime, as JSON; returns the number of its events.

    Passes are run from Python, on CUDA too: a graph has no layers to name.
    """
    path = Path(path)
    if path.suffix != ".json":
        raise InputError(f"--trace must end in .json, got {path.name}")
    blocks = subject.latents() // subject.rollout.frames_per_block
    activities = [torch.profiler.ProfilerActivity.CPU]
    if subject.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with write_atomically(path) as temporary:
        for _ in itertools.islice(subject.stream("ungraphed"), 3):  # what is made once is not to be seen
            pass
        with _named(subject.pipeline.model), torch.profiler.profile(activities=activities) as profile:
            for _ in itertools.islice(subject.stream("ungraphed"), blocks):
                pass
        profile.export_chrome_trace(str(temporary))
    return len(profile.events() or [])


@contextmanager
def _named(model: Any) -> Iterator[None]:
    """Spans "pass" and "layer 0", "layer 1", ... round the forwards of a model and its blocks."""
    hooks = []
    for name, module in [("pass", model), *((f"layer {i}", block) for i, block in enumerate(model.blocks))]:
        hooks += _span_hooks(name, module)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _span_hooks(name: str, module: nn.Module) -> list[Any]:
    span = torch.profiler.record_function(name)
    return [
        module.register_forward_pre_hook(lambda *_: span.__enter__() and None),
        module.register_forward_hook(lambda *_: span.__exit__(None, None, None), always_call=True),
    ]
