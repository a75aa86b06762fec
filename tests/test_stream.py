"""A stream is pulled: a slow consumer makes it wait, and nothing piles up meanwhile."""

import gc
import time
from contextlib import contextmanager

import pytest
import torch

from cfpp_rt.config import RolloutConfig
from cfpp_rt.pipeline import Pipeline
from cfpp_rt.timing import Timings
from cfpp_rt.values import Conditioning
from cfpp_rt.world.codec import CHANNELS, PatchCodec


@pytest.fixture
def stream(model):
    basis = torch.linalg.qr(torch.randn(192, CHANNELS))[0]
    codec = PatchCodec(torch.zeros(192), basis, torch.ones(CHANNELS))
    text = Conditioning(torch.randn(1, model.config.text_len, model.config.text_dim))
    return Pipeline(model, codec).stream(text, frames=None, size=(32, 48), rollout=RolloutConfig(window=3))


def test_nothing_is_made_before_it_is_asked_for(stream):
    passes = []
    hook = stream.rollout.model.register_forward_hook(lambda *_: passes.append(1))
    assert stream.rollout.next_frame == 0
    for asked in range(1, 5):
        next(stream)
        made = len(passes)
        time.sleep(0.05)  # a consumer that is busy
        assert len(passes) == made == 2 * asked and stream.rollout.next_frame == asked
    hook.remove()


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

        def synchronize(self):
            pass

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
