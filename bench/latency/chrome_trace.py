"""Record one request as a Chrome trace, which Perfetto opens: stages, passes and layers as named spans above the ops.

The trace comes from torch's profiler, which on a GPU adds kernels and copies. Stages have names of their own; passes
and layers are named by hooks that exist during the recording only. Profiling costs time: read proportions, not sums.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cfpp_rt.bench.latency.workload import Workload
from cfpp_rt.errors import InputError
from cfpp_rt.io.atomic import require_writable, write_atomically


def require_trace_path(path: str | Path) -> None:
    """Raise InputError for a path that `record` cannot write."""
    if Path(path).suffix != ".json":
        raise InputError(f"--trace must end in .json, got {Path(path).name}")
    require_writable(path, "--trace")


def record(workload: Workload, path: str | Path) -> int:
    """Write the trace of one request to this runtime as JSON and return the number of its events.

    Passes run from Python on CUDA as well, because a CUDA graph has no layers that could be named.
    """
    require_trace_path(path)
    blocks = workload.latent_frames() // workload.config.frames_per_block
    activities = [torch.profiler.ProfilerActivity.CPU]
    if workload.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with write_atomically(path) as temporary:
        for _ in itertools.islice(
            workload.stream("ungraphed"), 3
        ):  # warm-up: work that is done once stays out of the trace
            pass
        with _named(workload.pipeline.model), torch.profiler.profile(activities=activities) as profile:
            for _ in itertools.islice(workload.stream("ungraphed"), blocks):
                pass
        profile.export_chrome_trace(str(temporary))
    return len(profile.events() or [])


@contextmanager
def _named(model: Any) -> Iterator[None]:
    """Record spans "pass" and "layer 0", "layer 1", ... around the forwards of a model and of its blocks."""
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
