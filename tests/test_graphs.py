"""Graphed rollouts against the eager ones, bit for bit. Without a GPU a pass bound to its buffers stands in for a
graph: what a graph would replay stale, it reads stale."""

import dataclasses
import gc
import weakref

import pytest
import torch

from cfpp_rt.config import PRESETS, ModelConfig, RolloutConfig
from cfpp_rt.core.camera import Cameras, parse_trajectory
from cfpp_rt.errors import InputError, NonFiniteError, OutOfMemoryError
from cfpp_rt.model.transformer import random_model
from cfpp_rt.ops._library import compiled_module
from cfpp_rt.random_weights import random_pipeline
from cfpp_rt.runtime.cuda_graphs import CudaGraphCache
from cfpp_rt.runtime.rollout import Rollout

TINY = ModelConfig(dim=128, ffn_dim=64, num_heads=2, num_layers=2, freq_dim=16, text_dim=8, text_len=4, num_actions=3)
RING = RolloutConfig(window=4, sinks=1)
SETTINGS = {
    **PRESETS,
    "ring": RING,
    "ring separate": RING.replace(refresh="separate"),
    "ring skip": RING.replace(refresh="skip"),
    "context": RolloutConfig(window=6, sinks=3, frames_per_block=3, context_noise=300),
    "float8": RING.replace(kv_dtype="float8_e4m3"),
}

needs_kernels = pytest.mark.skipif(compiled_module("cpu") is None, reason="the reference asks the host for ranges")
pytestmark = needs_kernels


class StandIn:
    """Runs a pass again on the buffers it was captured with, into one result; counts what it ran."""

    def __init__(self, fail_at: int | None = None, error: Exception | None = None):
        self.captured = self.replayed = 0
        self._fail_at, self._error = fail_at, error

    def __call__(self, run):
        if self.captured == self._fail_at:
            raise self._error
        self.captured += 1
        result = run()

        def replay():
            self.replayed += 1
            made = run()
            return None if result is None else result.copy_(made)

        return replay


def graphs_of(model, stand_in=None):
    made = stand_in or StandIn()
    return CudaGraphCache(model, lambda device: made)


@pytest.fixture(scope="module")
def small():
    return random_model(TINY, seed=0, dtype=torch.float32)


def text(model, seed, batch=1):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, model.config.text_len, model.config.text_dim)
    return torch.randn(shape, generator=generator)


def start(model, config, graphs=None, *, batch=1, frames=12, **options):
    return Rollout(
        model,
        text(model, 1, batch),
        config,
        latent_size=(4, 4),
        latent_frames=frames,
        seed=5,
        cuda_graphs=graphs,
        **options,
    )


def play(rollout, model, batch=1):
    """All blocks, with everything that may come in between: actions, an early refresh, other prompts, a recache."""
    made = []
    for index, block in enumerate(rollout):
        made.append(block.values.clone())
        if model.config.num_actions:
            rollout.set_actions(index % model.config.num_actions)
        if index == 1:
            rollout.refresh()
        if index in (2, 3):
            rollout.set_prompt(text(model, index, batch), recache=index == 3)
    return torch.cat(made, dim=1)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", SETTINGS)
def test_graphed_rollout_is_the_eager_one(small, name, batch):
    config, stand_in = SETTINGS[name], StandIn()
    given = torch.randn(batch, config.frames_per_block, 16, 4, 4, generator=torch.Generator().manual_seed(2))
    frames = 24 if config.window else 12
    rollout = start(small, config, graphs_of(small, stand_in), batch=batch, frames=frames, initial_latents=given)
    assert rollout.why_no_cuda_graphs is None and stand_in.captured == (3 if config.refresh == "fused" else 2)
    passes = []
    hook = small.patch_embedding.register_forward_hook(lambda *_: passes.append(1))
    graphed = play(rollout, small, batch)
    hook.remove()
    alone = 1 if config.kv_dtype else 0  # the first pass, which sets the scales
    assert stand_in.replayed >= len(passes) - alone > frames // config.frames_per_block
    assert torch.equal(
        graphed, play(start(small, config, batch=batch, frames=frames, initial_latents=given), small, batch)
    )


def test_graphed_cameras(small):
    model = random_model(dataclasses.replace(TINY, camera=True, num_actions=0), seed=0, dtype=torch.float32)
    config = RolloutConfig(window=8, frames_per_block=2)
    path, turn = (Cameras.of(parse_trajectory(keys)) for keys in ("w*3,l*8", "s*2,j*3"))
    made = []
    for graphs in (None, graphs_of(model)):
        rollout = start(model, config, graphs, cameras=path, frames=None)
        blocks = []
        for index in range(8):
            if index == 4:
                rollout.set_cameras(turn)
            blocks.append(next(rollout).values.clone())
        made.append(torch.cat(blocks, dim=1))
    assert torch.equal(*made)


@pytest.mark.parametrize("stale", range(9))
def test_a_buffer_that_is_not_filled_is_seen(stale):
    """Every buffer counts: where one keeps what it held, the video is another."""
    model = random_model(dataclasses.replace(TINY, camera=True), seed=0, dtype=torch.float32)
    cameras, config = Cameras.of(parse_trajectory("w*3,l*3,w*5")), RING
    graphs = graphs_of(model)
    rollout = start(model, config, graphs, cameras=cameras, check_finite=False)  # rows that nobody wrote may be NaN
    for buffers in graphs._pool.resources[0]._inputs.values():
        assert len(buffers) == 9
        buffers[stale] = buffers[stale].clone()  # filled instead of the one that the pass reads
    assert not torch.equal(play(rollout, model), play(start(model, config, cameras=cameras), model))


def test_text_that_is_not_filled_is_seen(small):
    graphs = graphs_of(small)
    rollout = start(small, RING, graphs)
    passes = graphs._pool.resources[0]
    passes._text = [tuple(t.clone() for t in layer) for layer in passes._text]
    assert not torch.equal(play(rollout, small), play(start(small, RING), small))


def tensors_in(value):
    """All tensors that the arguments of a pass lead to, but the model's."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_in(part)
    elif dataclasses.is_dataclass(value):
        yield from tensors_in(list(vars(value).values()))


def test_what_graphs_read_lives_as_long_as_they(small):
    """A graph keeps addresses alone; this one forgets the pass that it was captured from."""
    seen = []

    def capture(run):
        seen.extend(weakref.ref(tensor) for tensor in tensors_in(run.args))
        run()
        return lambda: None

    graphs = CudaGraphCache(small, lambda device: capture)
    rollout = start(small, RING, graphs)
    gc.collect()
    assert rollout.why_no_cuda_graphs is None and len(seen) > 3 * 8
    assert all(tensor() is not None for tensor in seen)


def test_graphs_go_to_the_next_rollout_of_the_same_setting(small):
    stand_in = StandIn()
    graphs = graphs_of(small, stand_in)
    first = start(small, RING, graphs)
    made, memory, captured = play(first, small), first.cache.data.data_ptr(), stand_in.captured
    second = start(small, RING, graphs)  # the first is over, though still held
    assert second.cache.data.data_ptr() == memory and stand_in.captured == captured
    assert torch.equal(play(second, small), made)


def test_rollouts_at_the_same_time_have_graphs_of_their_own(small):
    graphs = graphs_of(small)
    one, two = start(small, RING, graphs), start(small, RING, graphs)
    assert one.cache is not two.cache
    pairs = list(zip(one, two, strict=True))
    alone = list(start(small, RING))
    for (a, b), c in zip(pairs, alone, strict=True):
        assert torch.equal(a.values, c.values) and torch.equal(b.values, c.values)


def test_another_setting_takes_the_memory_back(small):
    graphs = graphs_of(small)
    rollout = start(small, RING, graphs)
    cache = weakref.ref(rollout.cache)
    del rollout
    assert cache() is not None, "kept for the next one"
    start(small, RING, graphs, batch=2)
    gc.collect()
    assert cache() is None


@pytest.mark.parametrize("error", [RuntimeError("operation not permitted"), torch.OutOfMemoryError("CUDA is full")])
def test_capture_that_fails_half_way(small, error):
    """The reason is told, nothing is kept, the rollout is the eager one; what is certain to fail is not tried again."""
    stand_in = StandIn(fail_at=2, error=error)
    graphs = graphs_of(small, stand_in)
    with pytest.warns(RuntimeWarning, match=f"without CUDA graphs: capture failed: {type(error).__name__}: {error}"):
        rollout = start(small, RING, graphs)
    assert str(error) in rollout.why_no_cuda_graphs and not graphs._pool.resources
    assert torch.equal(play(rollout, small), play(start(small, RING), small))
    stand_in._fail_at = None
    again = start(small, RING, graphs)
    assert (again.why_no_cuda_graphs is None) == isinstance(error, torch.OutOfMemoryError)


@pytest.mark.parametrize("graphed", [False, True])
def test_memory_that_runs_out_on_the_way(small, monkeypatch, graphed):
    """The message says when and what would help, the cache is let go of, and the next request works."""
    graphs = graphs_of(small) if graphed else None
    rollout = start(small, RING, graphs)
    next(rollout)
    cache = weakref.ref(rollout.cache)
    with monkeypatch.context() as full:

        def no_more(*_):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has ...")

        full.setattr("cfpp_rt.runtime.rollout.denoise_update", no_more)
        message = r"memory ran out at latent frame 1 \(CUDA out of memory\): a smaller window"
        with pytest.raises(OutOfMemoryError, match=message) as caught:
            next(rollout)
    gc.collect()
    assert cache() is None and caught.value.__cause__.__traceback__ is None, "frames keep tensors alive"
    assert torch.equal(play(start(small, RING, graphs), small), play(start(small, RING), small))


def test_where_there_are_no_graphs_the_reason_is_reported(small, monkeypatch):
    assert start(small, RING).why_no_cuda_graphs == "none were requested"
    why = "CUDA graphs need a CUDA GPU, the model is on cpu"
    with pytest.warns(RuntimeWarning, match=f"rollout without CUDA graphs: {why}"):
        assert start(small, RING, CudaGraphCache(small)).why_no_cuda_graphs == why
    monkeypatch.setattr("cfpp_rt.ops.block_attention._forced", lambda: "sdpa")
    with pytest.warns(RuntimeWarning, match="CFPP_BACKEND=sdpa"):
        rollout = start(small, RING, graphs_of(small))
    assert rollout.why_no_cuda_graphs == "CFPP_BACKEND=sdpa gathers keys by ranges that the host knows"
    assert next(rollout).values.isfinite().all()


def test_a_stream_takes_the_graphs_of_its_pipeline():
    pipeline = random_pipeline(RING, dtype=torch.float32, device=torch.device("cpu"))
    assert pipeline.cuda_graphs is None, "on the CPU there are none"
    stand_in = StandIn()
    pipeline.cuda_graphs = graphs_of(pipeline.model, stand_in)
    prompt = text(pipeline.model, 1)
    options = {"num_frames": 9, "height": 32, "width": 32, "seed": 3}
    pipeline.warm_up(**options)
    captured, replayed = stand_in.captured, stand_in.replayed
    graphed = pipeline.generate(prompt_embeds=prompt, **options).pixels
    assert (captured, stand_in.captured, stand_in.replayed - replayed) == (3, 3, 3 * 2)
    assert torch.equal(graphed, pipeline.generate(prompt_embeds=prompt, cuda_graphs=False, **options).pixels)


def test_a_stream_looks_for_nan_when_frames_are_on_the_host():
    """No pass waits for the answer; it still names frame, step and layer, and no picture of the block is given out."""
    pipeline = random_pipeline(RING, dtype=torch.float32, device=torch.device("cpu"))
    pipeline.cuda_graphs = graphs_of(pipeline.model)
    stream = pipeline.stream(prompt_embeds=text(pipeline.model, 1), num_frames=None, height=32, width=32)
    next(stream), next(stream)
    with torch.no_grad():
        pipeline.model.blocks[1].ffn[2].bias[3] = float("nan")
    with pytest.raises(NonFiniteError, match="latent frame 2, step 1, layer 1"):
        next(stream)
    with pytest.raises(InputError, match="broke off"):
        next(stream)
