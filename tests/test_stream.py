"""A stream is pulled: a slow consumer makes it wait, and nothing piles up meanwhile."""

import dataclasses
import gc
import time
from contextlib import contextmanager

import pytest
import torch

from cfpp_rt.config import RolloutConfig
from cfpp_rt.device.timing import Timings
from cfpp_rt.errors import InputError, NonFiniteError
from cfpp_rt.pipeline import Pipeline
from cfpp_rt.runtime.stream import Stream
from cfpp_rt.world.codec import CHANNELS, PatchCodec


def start(model, frames: int | None = None, ahead: int = 0, initial: torch.Tensor | None = None) -> Stream:
    generator = torch.Generator().manual_seed(5)
    basis = torch.linalg.qr(torch.randn(192, CHANNELS, generator=generator))[0]
    codec = PatchCodec(torch.zeros(192), basis, torch.ones(CHANNELS))
    text = torch.randn(1, model.config.text_len, model.config.text_dim, generator=generator)
    return Pipeline(model, codec).stream(
        prompt_embeds=text,
        num_frames=frames,
        height=32,
        width=48,
        config=RolloutConfig(window=3),
        ahead=ahead,
        initial_frames=initial,
    )


@pytest.fixture
def stream(model):
    return start(model)


def test_nothing_is_made_before_it_is_requested(stream):
    passes = []
    hook = stream.rollout.model.register_forward_hook(lambda *_: passes.append(1))
    assert stream.rollout.next_latent_frame == 0
    for requested in range(1, 5):
        next(stream)
        made = len(passes)
        time.sleep(0.05)  # a consumer that is busy
        assert len(passes) == made == 2 * requested and stream.rollout.next_latent_frame == requested
    hook.remove()


@pytest.mark.parametrize("ahead", [1, 3])
def test_blocks_made_ahead_are_the_same_and_no_more_than_requested(model, ahead: int):
    given = torch.rand(1, 2, 3, 32, 48) * 2 - 1
    plain = list(start(model, 8, initial=given))
    stream = start(model, 8, ahead, initial=given)
    for number, wanted in enumerate(plain):
        got = next(stream)
        assert torch.equal(got.pixels, wanted.pixels) and got.start == wanted.start
        # The first two parts, the given pictures in one of them, are one block.
        assert stream.rollout.next_latent_frame == min(8, 2 + number + ahead)
    assert next(stream, None) is None and stream.rollout.closed


def test_what_is_given_reaches_the_first_block_that_is_not_made_ahead(model):
    another = torch.randn(1, model.config.text_len, model.config.text_dim)
    plain, switched = start(model, 6, ahead=2), start(model, 6, ahead=2)
    same = []
    for number in range(6):
        same.append(torch.equal(next(plain).pixels, next(switched).pixels))
        if number == 0:
            switched.set_prompt(prompt_embeds=another)
    assert same == [True, True, True, False, False, False]


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_block_that_is_not_finite_is_not_delivered(model, ahead: int):
    stream = start(model, 6, ahead)
    next(stream)
    stream.rollout._finished_blocks = {
        frame: dataclasses.replace(held, latents=held.latents * float("nan"))
        for frame, held in stream.rollout._finished_blocks.items()
    }
    with pytest.raises(NonFiniteError, match="latent frame 1|latent frame 2"):
        list(stream)


@pytest.mark.parametrize("ahead", [-1, 9, 1.0])
def test_ahead_is_refused_out_of_range(model, ahead):
    with pytest.raises(InputError, match=r"ahead must be in 0\.\.8, got"):
        start(model, 6, ahead)


def test_an_endless_stream_holds_no_more_and_no_more(stream):
    def held():
        for _ in range(15):
            next(stream)
        gc.collect()
        tensors = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]
        return len(tensors), sum(tensor.nbytes for tensor in tensors)

    held()
    assert held() == held()


def test_stages_are_named_ranges_for_whoever_traces(monkeypatch):
    """NVTX and events on a GPU, and where nobody looks, nothing at all."""
    seen = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def query(self):
            return True

        def elapsed_time(self, end):
            return 7.0

    class Queue:
        def record_event(self, event):
            return event

    @contextmanager
    def named(name):
        seen.append(name)
        yield

    monkeypatch.setattr(torch.cuda.nvtx, "range", named)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Queue())
    for device in ("cpu", "cuda"):
        timings = Timings(torch.device(device))
        with timings.stage(device):
            pass
    assert seen == ["cuda"] and not timings.stages, "nothing has waited"
    timings.deliver(1)
    assert list(timings.stages["cuda"]) == [7.0]
