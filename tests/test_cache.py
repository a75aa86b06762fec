"""The frame ring against a plain list of everything ever written."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cfpp_rt.cache import CacheShape, KVCache
from cfpp_rt.config import RolloutConfig
from cfpp_rt.core.frame_ring import FrameRing, slots_for
from cfpp_rt.errors import InputError


def ring_for(rollout, frames):
    return FrameRing(*slots_for(rollout, frames), rollout.frames_per_block)


SHAPES = st.tuples(st.integers(1, 4), st.integers(0, 3), st.integers(1, 5), st.integers(0, 3), st.integers(1, 30))


@settings(max_examples=200, deadline=None)
@given(shape=SHAPES, refresh=st.sampled_from(["fused", "separate", "skip"]))
def test_ring_equals_a_list_of_all_frames(shape, refresh):
    """The queries of every block find exactly the frames that a list of all frames would give."""
    block, sink_blocks, ring_blocks, ragged, blocks = shape
    sinks = sink_blocks * block
    window = sinks + ring_blocks * block + ragged
    rollout = RolloutConfig(frames_per_block=block, window=window, sinks=sinks, refresh=refresh)
    ring = ring_for(rollout, None)
    slots: list = [None] * ring.capacity  # what the memory of the cache stores
    written: list[int] = []
    for start in range(0, blocks * block, block):
        first = ring.write(start)
        assert first >= 0 and first + block <= ring.capacity, "a write never wraps"
        slots[first : first + block] = range(start, start + block)
        written += range(start, start + block)
        ends = [start + block]
        if refresh == "fused" and start:
            ends.append(start)  # the clean queries of the previous block, in the same pass
        for end in ends:
            wanted = {f for f in written if f < end and (f < sinks or f >= end - (window - sinks))}
            runs = ring.runs(ring.visible(end, window))
            assert sorted(f for a, b in runs for f in slots[a:b]) == sorted(wanted)
            assert all(a < b for a, b in runs)
            assert all(x[1] < y[0] for x, y in zip(runs, runs[1:], strict=False)), "maximal and ascending"


@settings(max_examples=50, deadline=None)
@given(block=st.integers(1, 4), blocks=st.integers(1, 12))
def test_without_window_everything_stays_in_order(block, blocks):
    ring = ring_for(RolloutConfig(frames_per_block=block), block * blocks)
    for start in range(0, block * blocks, block):
        assert ring.write(start) == start
        assert ring.runs(ring.visible(start + block, None)) == [(0, start + block)]
    with pytest.raises(InputError, match="missing"):
        ring.visible(block * blocks + block, None)


def test_ring_refuses_gaps_lost_frames_and_ragged_blocks():
    ring = FrameRing(sinks=0, ring=4, frames_per_block=2)
    with pytest.raises(InputError, match=r"next one \(0\)"):
        ring.write(2)
    for start in (0, 2, 4):
        ring.write(start)
    assert ring.write(2) == 2, "a stored block may be rewritten"
    with pytest.raises(InputError, match="stored block, got 0"):
        ring.write(0)
    with pytest.raises(InputError, match="got 5"):
        ring.write(5)
    with pytest.raises(InputError, match=r"missing \[0, 1\]"):
        ring.visible(4, None)
    with pytest.raises(InputError, match="multiples of the block of 2"):
        FrameRing(sinks=1, ring=4, frames_per_block=2)


def test_a_short_rollout_allocates_no_more_than_its_frames():
    windowed = RolloutConfig(window=12, sinks=2)
    assert ring_for(windowed, 5).capacity == 5
    assert ring_for(windowed, 100).capacity == 13, "one spare slot for the fused refresh"
    assert ring_for(windowed.replace(refresh="separate"), 100).capacity == 12
    with pytest.raises(InputError, match="window must be given"):
        ring_for(RolloutConfig(), None)


def test_cache_views_share_one_allocation():
    ring = FrameRing(sinks=1, ring=2, frames_per_block=1)
    cache = KVCache(CacheShape(2, 1, 3, 3, 4, 8), ring, torch.float32, "cpu")
    assert cache.keys(1).shape == (1, 3, 12, 8)
    cache.values(1).fill_(7)
    assert (cache.data[1, 1] == 7).all()
    assert cache.data.nbytes == CacheShape(2, 1, 3, 3, 4, 8).bytes(torch.float32)
    for frame in range(4):
        ring.write(frame)
    ranges = cache.token_ranges([ring.visible(4, 2), [0, 2]])
    assert ranges.host == (((0, 8),), ((0, 4), (8, 12)))
    assert ranges.device.dtype == torch.int32
    assert ranges.device.tolist() == [[[[0, 8], [0, 0], [0, 0]], [[0, 4], [8, 12], [0, 0]]]] * cache.data.shape[2]
