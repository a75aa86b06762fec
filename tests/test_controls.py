"""A refused control changes nothing: the rollout goes on as if it had never been given, in every runtime."""

import numpy as np
import pytest
import torch

from cfpp_rt.config import RolloutConfig
from cfpp_rt.core.camera import Cameras
from cfpp_rt.core.controls import action_rows, camera_rows
from cfpp_rt.errors import InputError
from cfpp_rt.model.transformer import random_model
from cfpp_rt.runtime.rollout import Rollout
from cfpp_rt.runtime.rollout_batch import RolloutBatch
from cfpp_rt.values import empty_prompt_embeds
from tests.test_actions import ACTING
from tests.test_stream import start as start_stream

RING = RolloutConfig(window=3)
BAD_ACTIONS = [
    *(True, False, [True, False], [2, True], np.True_, np.array([True, False]), torch.tensor([True, False])),
    *([[0], [1, 2]], None, "1", [None, 1], 2**70, float("nan"), torch.empty(2, dtype=torch.int64, device="meta")),
]


def embeds_of(config, seed=1, batch=1):
    return torch.randn(batch, config.text_len, config.text_dim, generator=torch.Generator().manual_seed(seed))


def bad_embeds(config):
    """Text embeddings that must be refused, each with what the error says."""
    good = embeds_of(config)
    yield torch.full_like(good, float("nan")), "must be finite in torch.float32"
    yield good.double() * 1e300, "must be finite in torch.float32"
    yield good.long(), "must be a dense tensor of torch.float32"
    yield good > 0, "must be a dense tensor of torch.float32"
    yield good.to(torch.complex64), "must be a dense tensor of torch.float32"
    yield good.to("meta"), "on meta"
    yield good.numpy(), "must be a tensor .*, got ndarray"
    yield good[:, :1], "prompt_embeds must be"
    yield good.expand(2, -1, -1), "must have batch 1, got 2"


@pytest.mark.parametrize("actions", BAD_ACTIONS, ids=repr)
def test_actions_that_are_no_integers_are_refused(actions):
    with pytest.raises(InputError, match="actions must be integers in 0..2"):
        action_rows(actions, 2, 1, 3)


def test_actions_of_every_integer_type_are_taken():
    for actions in ([1, 2], (1, 2), np.array([1, 2], np.uint8), torch.tensor([1, 2]), [np.int64(1), torch.tensor(2)]):
        assert action_rows(actions, 2, 1, 3) == ((1,), (2,))
    assert action_rows(np.int32(2), 2, 1, 3) == ((2,), (2,))


def test_cameras_are_checked():
    good = Cameras.of(np.eye(4)[None])
    assert camera_rows(good, 2).views.shape == (2, 1, 4, 4)
    with pytest.raises(InputError, match="must be made by Cameras.of, got ndarray"):
        camera_rows(np.eye(4), 1)
    with pytest.raises(InputError, match="must be finite"):
        camera_rows(Cameras(good.views * np.nan, good.focal), 1)


def test_a_refused_action_leaves_the_rollout_alive():
    model = random_model(ACTING, seed=0, dtype=torch.float32)

    def run(refused):
        text = empty_prompt_embeds(2, ACTING.text_dim)
        rollout = Rollout(model, text, RING, latent_size=(4, 4), latent_frames=4)
        rollout.set_actions([1, 2])
        made = [next(rollout).values]
        for actions in refused:
            with pytest.raises(InputError, match="actions must be"):
                rollout.set_actions(actions)
        return torch.cat([*made, *(block.values for block in rollout)], dim=1)

    assert torch.equal(run(BAD_ACTIONS), run([]))


def test_a_refused_prompt_leaves_rollout_and_batch_alive(model):
    def run(refused):
        alone = Rollout(model, embeds_of(model.config), RING, latent_size=(8, 12), latent_frames=4)
        batch = RolloutBatch(model, RING, latent_size=(8, 12), latent_frames=4, rows=2)
        member = batch.add(embeds_of(model.config))
        made = [next(alone).values, batch.step()[member].values]
        for rollout in (alone, member):
            for embeds, message in refused:
                with pytest.raises(InputError, match=message):
                    rollout.set_prompt(embeds, recache=True)
        for embeds, _ in refused:
            with pytest.raises(InputError, match="prompt_embeds must"):
                batch.add(embeds)
        made += [block.values for block in alone]
        while batch.rollouts:
            made.append(batch.step()[member].values)
        return torch.cat(made, dim=1)

    assert torch.equal(run(list(bad_embeds(model.config))), run([]))


def test_a_refused_prompt_leaves_the_stream_alive(model):
    def run(refused):
        stream = start_stream(model, 4)
        made = [next(stream).pixels]
        for embeds, _ in refused:
            with pytest.raises(InputError, match="prompt_embeds must"):
                stream.set_prompt(prompt_embeds=embeds)
        return torch.cat([*made, *(frames.pixels for frames in stream)], dim=1)

    assert torch.equal(run(list(bad_embeds(model.config))), run([]))


def test_embeddings_that_overflow_in_the_dtype_of_the_model_are_refused(config):
    half = random_model(config, seed=0, dtype=torch.float16)
    with pytest.raises(InputError, match="must be finite in torch.float16"):
        Rollout(half, embeds_of(config) * 1e6, RING, latent_size=(8, 12), latent_frames=2)
