"""CUDA graphs on a GPU: the eager rollout bit for bit, nothing waits, and what goes wrong leaves nothing behind."""

import contextlib
import dataclasses
import gc
import weakref

import pytest
import torch

from cfpp_rt.codec.taehv import TAEHV
from cfpp_rt.config import RolloutConfig
from cfpp_rt.core.camera import Cameras, parse_trajectory
from cfpp_rt.errors import OutOfMemoryError
from cfpp_rt.model.transformer import random_model
from cfpp_rt.pipeline import Pipeline
from cfpp_rt.runtime.cuda_graphs import CudaGraphCache
from cfpp_rt.runtime.rollout import Rollout
from tests.test_graphs import RING, SETTINGS, TINY, play, start, text

pytestmark = pytest.mark.gpu

GPU = dataclasses.replace(TINY, num_layers=3)  # head_dim 64


@pytest.fixture
def on_gpu(monkeypatch):
    """A bfloat16 model, with the kernel as the attention of the eager rollout too."""
    monkeypatch.setattr("cfpp_rt.ops.block_attention._forced", lambda: "kernel")
    return random_model(GPU, seed=0, dtype=torch.bfloat16, device="cuda")


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", SETTINGS)
def test_cuda_graphs_are_the_eager_rollout(on_gpu, name, batch):
    graphs, config = CudaGraphCache(on_gpu), SETTINGS[name]
    given = torch.randn(batch, config.frames_per_block, 16, 4, 4, generator=torch.Generator().manual_seed(2))
    frames = 24 if config.window else 12
    eager = play(start(on_gpu, config, batch=batch, frames=frames, initial_latents=given), on_gpu, batch)
    for _ in range(2):  # the second time with graphs that have run before
        rollout = start(on_gpu, config, graphs, batch=batch, frames=frames, initial_latents=given)
        assert rollout.why_no_cuda_graphs is None
        # Into what has been freed:
        junk = [torch.full((64 << i % 16,), float("nan"), device="cuda") for i in range(256)]
        assert torch.equal(play(rollout, on_gpu, batch), eager)
        del junk


@pytest.mark.parametrize("heads", [1, 2])
def test_cuda_graphs_with_cameras(monkeypatch, heads):
    monkeypatch.setattr("cfpp_rt.ops.block_attention._forced", lambda: "kernel")
    config = dataclasses.replace(TINY, camera=True, num_heads=heads)
    model = random_model(config, seed=0, dtype=torch.bfloat16, device="cuda")
    path = Cameras.of(parse_trajectory("w*3,l*8"))
    made = [play(start(model, RING, graphs, cameras=path), model) for graphs in (None, CudaGraphCache(model))]
    assert torch.equal(*made)


def test_blocks_decoded_beside_the_next_are_the_same_frames(on_gpu):
    torch.manual_seed(0)
    pipeline = Pipeline(on_gpu, TAEHV().to("cuda", torch.bfloat16), None, RolloutConfig(steps=(1000, 500), window=4))
    made = [
        list(pipeline.stream(prompt_embeds=text(on_gpu, 0), num_frames=41, height=64, width=96, ahead=ahead))
        for ahead in (0, 1, 3)
    ]
    for parts in made[1:]:
        assert all(torch.equal(part.pixels, same.pixels) for part, same in zip(parts, made[0], strict=True))


def test_no_pass_waits_for_the_device(on_gpu):
    """Between captured passes the host never waits: torch would raise."""
    rollout = start(on_gpu, RING, CudaGraphCache(on_gpu), check_finite=False)
    for _ in range(3):  # embeds the timesteps
        next(rollout)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(6):
            next(rollout)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_capture_that_cuda_forbids(on_gpu, monkeypatch):
    """A pass that waits for the device cannot be captured; the allocator works as before afterwards."""
    plain, calls = type(on_gpu).forward, []

    def waits(*arguments, **options):
        calls.append(1)
        result = plain(*arguments, **options)
        if torch.cuda.is_current_stream_capturing():
            torch.zeros(1, device="cuda").item()
        return result

    with monkeypatch.context() as broken:
        broken.setattr(type(on_gpu), "forward", waits)
        with pytest.warns(RuntimeWarning, match="without CUDA graphs: capture failed"):
            rollout = start(on_gpu, RING, CudaGraphCache(on_gpu))
        assert calls
    eager = play(start(on_gpu, RING), on_gpu)
    assert torch.equal(play(rollout, on_gpu), eager)
    assert torch.equal(play(start(on_gpu, RING, CudaGraphCache(on_gpu)), on_gpu), eager)
    del rollout
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    large = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    del large
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == before, "freed memory goes back"


def test_graphs_that_do_not_fit(on_gpu):
    """A full GPU: the request is refused with a message, and the next one works."""
    graphs = CudaGraphCache(on_gpu)
    free = torch.cuda.mem_get_info()[0]
    hog = torch.empty(free - (300 << 20), dtype=torch.uint8, device="cuda")
    with pytest.raises(OutOfMemoryError, match="KV cache"):
        Rollout(on_gpu, text(on_gpu, 1), RolloutConfig(), latent_size=(64, 64), latent_frames=2000, cuda_graphs=graphs)
    del hog
    torch.cuda.empty_cache()
    assert torch.equal(play(start(on_gpu, RING, graphs), on_gpu), play(start(on_gpu, RING), on_gpu))


def test_where_the_kernel_does_not_go_neither_do_graphs():
    model = random_model(TINY, seed=0, dtype=torch.float32, device="cuda")
    with pytest.warns(RuntimeWarning, match="the kernel does not take float32"):
        rollout = start(model, RING, CudaGraphCache(model))
    assert rollout.why_no_cuda_graphs == "the kernel does not take float32, head_dim 64 on cuda"
    assert next(rollout).values.isfinite().all()


@pytest.mark.parametrize("graphed", [False, True])
def test_a_gpu_that_is_full_on_the_way(on_gpu, graphed):
    """Where not one byte more is to be had, the rollout says so, gives all it has back, and the next request works."""
    graphs = CudaGraphCache(on_gpu) if graphed else None
    large = {"latent_size": (128, 128), "frames": 8, "seed": 5, "graphs": graphs}
    torch.cuda.empty_cache()
    hogs: list[torch.Tensor] = []
    rollout = Rollout(on_gpu, text(on_gpu, 1), RING, **large)
    next(rollout)
    cache = weakref.ref(rollout.cache)
    torch.cuda.empty_cache()
    try:
        torch.cuda.set_per_process_memory_fraction(0.0)
        for size in (20 << 20, 2 << 20, 1 << 20, 1 << 16, 512):  # what torch has left in its segments
            with contextlib.suppress(torch.OutOfMemoryError):
                while True:
                    hogs.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        with pytest.raises(OutOfMemoryError, match="memory ran out at latent frame 1"):
            next(rollout)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        hogs.clear()
    gc.collect()
    assert cache() is None and not (graphs and graphs._pool.resources)
    again = torch.cat([block.values for block in Rollout(on_gpu, text(on_gpu, 1), RING, **large)], dim=1)
    assert again.isfinite().all()
