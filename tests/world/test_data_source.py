"""Training data: repeatable by position, and weights where something happens."""

import numpy as np
import pytest
import torch

from cfpp_rt.world.codec import fit_codec, to_pixels
from cfpp_rt.world.data_source import WorldDataSource, record


@pytest.fixture(scope="module")
def data_source():
    return WorldDataSource(fit_codec(0, episodes=32), seed=3, batch=4, num_frames=6)


def test_seed_and_position_determine_a_batch(data_source):
    one, again, other = data_source(7), data_source(7), data_source(8)
    assert torch.equal(one.latents, again.latents) and torch.equal(one.condition.actions, again.condition.actions)
    assert not torch.equal(one.latents, other.latents)
    assert one.latents.shape == (4, 6, 16, 6, 6) and one.condition.actions.shape == (4, 6)
    assert not one.condition.actions[:, 0].any()


def test_latents_are_the_recorded_frames(data_source):
    frames, actions, _ = record(3, 7, 4, 6)
    assert np.array_equal(data_source(7).condition.actions.numpy(), actions)
    torch.testing.assert_close(data_source(7).latents, data_source.codec.encode(to_pixels(frames)))


def test_cells_that_change_or_contain_a_thing_count_more(data_source):
    weights = data_source(7).weights
    frames, _, things = record(3, 7, 4, 6)
    assert weights.shape == (4, 6, 6, 6) and abs(weights.mean().item() - 1) < 1e-5
    lowest = weights.min()
    assert (weights[torch.from_numpy(things)] > 2 * lowest).all()
    changed = (frames[:, 1:] != frames[:, :-1]).reshape(4, 5, 6, 8, 6, 24).any(axis=(3, 5))
    assert (weights[:, 1:][torch.from_numpy(changed)] > 4 * lowest).all()
    still = ~things.copy()
    still[:, 1:] &= ~changed
    assert (weights[torch.from_numpy(still)] == lowest).all()
