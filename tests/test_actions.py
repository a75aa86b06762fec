"""Discrete actions: one per latent frame, followed by the blocks they were given for. A small model without text."""

import pytest
import torch

from cfpp_rt.config import ModelConfig, RolloutConfig
from cfpp_rt.errors import InputError
from cfpp_rt.model.transformer import random_model
from cfpp_rt.runtime.rollout import Rollout
from cfpp_rt.values import empty_prompt_embeds
from tests.closeness import assert_close_max

ACTING = ModelConfig(dim=128, ffn_dim=256, num_heads=2, num_layers=2, freq_dim=32, text_len=0, num_actions=3, eps=1e-6)


def act_and_roll(model, script, *, batch=1, refresh="fused", block=1, seed=0):
    rollout = Rollout(
        model,
        empty_prompt_embeds(batch, model.config.text_dim),
        RolloutConfig(steps=(1000, 500), frames_per_block=block, window=4, refresh=refresh),
        latent_size=(4, 4),
        latent_frames=None,
        seed=seed,
    )
    made = []
    for actions in script:
        if actions is not None:
            rollout.set_actions(actions)
        made.append(next(rollout).values)
    return torch.cat(made, dim=1)


@pytest.fixture(scope="module")
def acting():
    return random_model(ACTING, seed=0, dtype=torch.float32)


def test_actions_hold_until_changed_and_reach_only_later_blocks(acting):
    still = act_and_roll(acting, [None] * 5)
    acted = act_and_roll(acting, [None, None, 2, None, None])
    assert torch.equal(still[:, :2], acted[:, :2])
    assert all(not torch.allclose(still[:, i], acted[:, i], atol=1e-3) for i in (2, 3, 4))
    assert torch.equal(acted, act_and_roll(acting, [0, 0, 2, 2, 2]))


def test_the_clean_pass_keeps_the_action_of_its_own_block(acting):
    script = [1, 0, 2, 0, 1, 2]
    fused, separate = (act_and_roll(acting, script, refresh=refresh) for refresh in ("fused", "separate"))
    assert_close_max(fused, separate, 2e-4, "latents")


def test_rows_act_each_for_itself(acting):
    together = act_and_roll(acting, [None, [1, 2], [[2], [0]]], batch=2)
    for row, script in enumerate(([0, 1, 2], [0, 2, 0])):
        assert_close_max(together[row : row + 1], act_and_roll(acting, script, seed=row), 2e-4, f"row {row}")


def test_frames_of_a_block_act_each_for_itself(acting):
    one = act_and_roll(acting, [[[1, 1]]], block=2)
    two = act_and_roll(acting, [[[1, 2]]], block=2)
    assert not torch.allclose(one, two, atol=1e-3)


@pytest.mark.parametrize("actions", [3, -1, [0, 1, 2], [[0, 1]], 1.0, [[0], [5]]])
def test_bad_actions_are_refused_and_change_nothing(acting, actions):
    rollout = Rollout(acting, empty_prompt_embeds(2, 4096), RolloutConfig(), latent_size=(4, 4), latent_frames=2)
    with pytest.raises(InputError, match="actions must be integers in 0..2"):
        rollout.set_actions(actions)
    assert rollout._actions == ((0,), (0,))


def test_actions_for_a_model_without_any_are_refused(model, config):
    text = torch.zeros(1, config.text_len, config.text_dim)
    with pytest.raises(InputError, match="without actions"):
        Rollout(model, text, RolloutConfig(), latent_size=(4, 4), latent_frames=1).set_actions(1)
