"""The noise table against the published numbers, and properties of the table for any shift."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cfpp_rt.config import PRESETS, RolloutConfig, rollout_preset
from cfpp_rt.core.schedule import FlowMatchSchedule, add_noise
from cfpp_rt.errors import InputError


def test_tables_equal_the_reference(vectors, meta):
    schedule = FlowMatchSchedule(meta["shift"])
    torch.testing.assert_close(schedule.timesteps, vectors["scheduler.timesteps"], rtol=0, atol=1e-5 * 1000)
    torch.testing.assert_close(schedule.sigmas, vectors["scheduler.sigmas"], rtol=0, atol=1e-5)
    torch.testing.assert_close(schedule.training_weights(), vectors["scheduler.training_weights"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name,steps", [("1step", (1000,)), ("2step", (1000, 500)), ("4step", (1000, 750, 500, 250))])
def test_warped_steps_equal_the_reference(vectors, meta, name, steps):
    warped = FlowMatchSchedule(meta["shift"]).warp(steps)
    torch.testing.assert_close(warped, vectors[f"scheduler.warped_{name}"], rtol=1e-5, atol=0)


def test_sigma_is_taken_from_the_table_not_divided():
    assert FlowMatchSchedule(5.0).sigma(0).item() == pytest.approx(0.00498008, abs=1e-7)
    assert FlowMatchSchedule(5.0).sigma(torch.tensor([1000.0, 937.5])).tolist() == pytest.approx([1.0, 0.9375])


@settings(max_examples=50, deadline=None)
@given(shift=st.floats(0.5, 12), step=st.integers(1, 1000))
def test_table_descends_and_warp_is_an_entry(shift, step):
    schedule = FlowMatchSchedule(shift)
    assert (schedule.timesteps.diff() < 0).all() and schedule.timesteps[0] == 1000 and schedule.timesteps[-1] > 0
    t = schedule.warp([step])
    assert t.item() in schedule.timesteps.tolist()
    assert schedule.sigma(t).item() == pytest.approx(t.item() / 1000, rel=1e-6)


def test_noising_and_cleaning_are_inverse():
    clean, noise = torch.randn(2, 1, 3, 4, 4), torch.randn(2, 1, 3, 4, 4)
    noisy = add_noise(clean, noise, 0.8)
    torch.testing.assert_close(noisy - 0.8 * (noise - clean), clean, atol=1e-6, rtol=0)


def test_presets():
    assert rollout_preset("framewise-2step").steps == (1000, 500)
    assert all(("chunkwise" in name) == (config.frames_per_block > 1) for name, config in PRESETS.items())
    with pytest.raises(InputError, match="preset must be one of framewise-2step, .*got 'framewise'"):
        rollout_preset("framewise")


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"steps": ()}, "steps must be descending integers in 1..1000"),
        ({"steps": (500, 1000)}, "descending"),
        ({"steps": (1001,)}, r"1\.\.1000"),
        ({"first_steps": (0,)}, "first_steps"),
        ({"frames_per_block": 0}, "frames_per_block must be an integer >= 1, got 0"),
        ({"sinks": -1}, "sinks must be a multiple"),
        ({"frames_per_block": 3, "sinks": 1}, "multiple >= 0 of frames_per_block=3, got 1"),
        ({"window": 2, "sinks": 2}, "window must hold the sinks and one block, >= 3"),
        ({"shift": 0}, "shift must be a number > 0"),
        ({"context_noise": -1}, "context_noise"),
        ({"refresh": "sometimes"}, "refresh must be fused, separate or skip, got 'sometimes'"),
    ],
)
def test_bad_rollout_settings_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        RolloutConfig(**changes)
