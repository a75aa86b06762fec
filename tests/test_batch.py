"""Streams of one batch against rollouts of their own: other prompts, seeds, actions, positions, comings and goings."""

import pytest
import torch
from torch import Tensor

from cfpp_rt.config import RolloutConfig, rollout_preset
from cfpp_rt.errors import InputError, NonFiniteError
from cfpp_rt.model.transformer import random_model
from cfpp_rt.model.weights import build_model
from cfpp_rt.runtime.rollout import Rollout
from cfpp_rt.runtime.rollout_batch import RolloutBatch
from cfpp_rt.values import empty_prompt_embeds
from tests.closeness import assert_close_max
from tests.test_actions import ACTING

SIZE = (8, 12)
RING = RolloutConfig(first_steps=(1000, 750, 500, 250), window=4, sinks=1)  # wraps after five frames
CONFIGS = {
    "fused": RING,
    "separate": RING.replace(refresh="separate"),
    "skip": RING.replace(refresh="skip"),
    "no window": rollout_preset("framewise-2step"),
    "chunks": rollout_preset("chunkwise-4step").replace(window=6),
}


def prompt(model, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, model.config.text_len, model.config.text_dim, generator=generator)


def alone(model, config, frames: int, seed: int) -> torch.Tensor:
    rollout = Rollout(model, prompt(model, seed), config, latent_size=SIZE, latent_frames=frames, seed=seed)
    return torch.cat([block.values for block in rollout], dim=1)


def poisoned(model, config, frames: int | None, rows: int = 3, size=SIZE) -> RolloutBatch:
    batch = RolloutBatch(model, config, latent_size=size, latent_frames=frames, rows=rows)
    batch.cache.data.fill_(float("nan"))
    return batch


def collect(made: dict, step: dict) -> None:
    for stream, block in step.items():
        made.setdefault(stream, []).append(block.values)


@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS.keys())
def test_streams_that_join_at_different_times_are_rollouts_of_their_own(model, settings):
    """Poison shows what is read before it is written. Rounding alone differs: sums of products of more rows."""
    frames = 9
    batch, made, seeds = poisoned(model, settings, frames), {}, {}
    for number in range(20):
        if number in (0, 1, 3):
            seeds[batch.add(prompt(model, number), seed=number)] = number
        collect(made, batch.step())
    assert len(made) == 3 and not batch.rollouts
    for stream, blocks in made.items():
        wanted = alone(model, settings, frames, seeds[stream])
        assert_close_max(torch.cat(blocks, dim=1), wanted, 2e-5, f"stream {seeds[stream]}")


def test_a_stream_alone_is_its_rollout_bit_by_bit(model):
    batch, made = poisoned(model, RING, 8), {}
    batch.add(prompt(model, 5), seed=5)
    while batch.rollouts:
        collect(made, batch.step())
    assert torch.equal(torch.cat(*made.values(), dim=1), alone(model, RING, 8, 5))


def test_a_row_taken_over_shows_nothing_of_its_stream_before(model):
    """The first of three leaves, the last moves to its row, and a newcomer takes the last's."""
    batch, made = poisoned(model, RING, 10), {}
    first, second, third = (batch.add(prompt(model, seed), seed=seed) for seed in range(3))
    for _ in range(4):
        collect(made, batch.step())
    before = third.cache.data.clone()
    batch.remove(first)
    assert batch.rollouts == (third, second)
    assert torch.equal(third.cache.data.nan_to_num(), before.nan_to_num())
    assert third.cache.data.data_ptr() == batch.cache.data.data_ptr()
    batch.cache.data[:, :, 2].fill_(float("nan"))
    newcomer = batch.add(prompt(model, 7), seed=7)
    while batch.rollouts:
        collect(made, batch.step())
    for stream, seed in ((second, 1), (third, 2), (newcomer, 7)):
        assert_close_max(torch.cat(made[stream], dim=1), alone(model, RING, 10, seed), 2e-5, f"stream {seed}")
    assert torch.cat(made[first], dim=1).shape[1] == 4


def test_every_stream_is_steered_by_itself():
    """Actions of its own, and a prompt switch of one alone; a stream may also be advanced by itself between steps."""
    acting = random_model(ACTING, seed=0, dtype=torch.float32)
    config = RolloutConfig(window=4)
    text = empty_prompt_embeds(1, acting.config.text_dim)
    scripts = {0: [1, 0, 2, 0, 1, 1], 3: [2, 2, 0, 1, 0, 1]}
    batch, made = poisoned(acting, config, None, size=(4, 4)), {}
    streams = {batch.add(text, seed=seed): script for seed, script in scripts.items()}
    for number in range(6):
        for stream, script in streams.items():
            stream.set_actions(script[number])
        if number == 2:
            for stream in streams:
                collect(made, {stream: next(stream)})
        else:
            collect(made, batch.step())
    for (seed, script), blocks in zip(scripts.items(), made.values(), strict=True):
        rollout = Rollout(acting, text, config, latent_size=(4, 4), latent_frames=None, seed=seed)
        wanted = []
        for action in script:
            rollout.set_actions(action)
            wanted.append(next(rollout).values)
        assert_close_max(torch.cat(blocks, dim=1), torch.cat(wanted, dim=1), 2e-5, f"stream {seed}")


@pytest.mark.parametrize("recache", [False, True])
def test_one_stream_switches_its_prompt(model, recache):
    batch, made = poisoned(model, RING, 8), {}
    steady, switching = (batch.add(prompt(model, seed), seed=seed) for seed in (0, 1))
    for number in range(8):
        if number == 5:
            switching.set_prompt(prompt(model, 9), recache=recache)
        collect(made, batch.step())
    rollout = Rollout(model, prompt(model, 1), RING, latent_size=SIZE, latent_frames=8, seed=1)
    wanted = [next(rollout).values for _ in range(5)]
    rollout.set_prompt(prompt(model, 9), recache=recache)
    wanted += [block.values for block in rollout]
    assert_close_max(torch.cat(made[switching], dim=1), torch.cat(wanted, dim=1), 2e-5, "switching")
    assert_close_max(torch.cat(made[steady], dim=1), alone(model, RING, 8, 0), 2e-5, "steady")


def test_given_frames_begin_a_stream(model):
    given = torch.randn(1, 2, 16, *SIZE, generator=torch.Generator().manual_seed(0))
    batch, made = poisoned(model, RING, 6), {}
    batch.add(prompt(model, 0), seed=0)
    batch.step()
    continued = batch.add(prompt(model, 1), seed=1, initial_latents=given)
    while continued in batch.rollouts:
        collect(made, batch.step())
    rollout = Rollout(model, prompt(model, 1), RING, latent_size=SIZE, latent_frames=6, seed=1, initial_latents=given)
    wanted = torch.cat([block.values for block in rollout], dim=1)
    assert_close_max(torch.cat(made[continued], dim=1), wanted, 2e-5, "continued")


def test_streams_in_a_steady_state_share_their_passes(model):
    """Two launches of the network per step (fused, 2 steps) whatever the number of streams."""
    rows = []
    handle = model.patch_embedding.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    try:
        batch = poisoned(model, RING, None)
        batch.add(prompt(model, 0))
        batch.step()
        batch.add(prompt(model, 1)), batch.add(prompt(model, 2))
        rows.clear()
        batch.step()  # the newcomers' four steps; the second is of the same form as that of the other
        assert rows == [1, 2, 3, 2, 2]
        for _ in range(6):  # past the end of the ring, at positions of their own
            rows.clear()
            batch.step()
            assert rows == [3, 3]
    finally:
        handle.remove()


def three_that_come_one_by_one(model) -> tuple[dict, dict]:
    """Their blocks and their seeds, by stream."""
    batch, made, seeds = poisoned(model, RING, 7), {}, {}
    for number in range(10):
        if number < 3:
            seeds[batch.add(prompt(model, number), seed=number)] = number
        collect(made, batch.step())
    return made, seeds


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_every_backend_of_attention_takes_rows_of_their_own(model, monkeypatch, backend):
    """Libraries gather the keys of each row."""
    monkeypatch.setattr("cfpp_rt.ops.block_attention._forced", lambda: backend)
    monkeypatch.setattr("cfpp_rt.ops.block_attention._decided", {})
    made, seeds = three_that_come_one_by_one(model)
    for stream, blocks in made.items():
        assert_close_max(torch.cat(blocks, dim=1), alone(model, RING, 7, seeds[stream]), 2e-5, f"{seeds[stream]}")


def test_a_stream_that_is_not_finite_leaves_alone(model):
    """Nobody else reads its keys."""
    batch, made = poisoned(model, RING, 7), {}
    first, broken, third = (batch.add(prompt(model, seed), seed=seed) for seed in range(3))
    collect(made, batch.step())
    with torch.inference_mode():
        broken._finished_blocks[0].latents[0, 0, 3, 2, 1] = float("nan")  # of which its clean pass now makes keys
    step = batch.step()
    assert isinstance(step[broken], NonFiniteError) and "latent frame 1, step 1, layer 0" in str(step[broken])
    assert batch.rollouts == (first, third)
    del step[broken]
    collect(made, step)
    while batch.rollouts:
        collect(made, batch.step())
    for stream, seed in ((first, 0), (third, 2)):
        assert_close_max(torch.cat(made[stream], dim=1), alone(model, RING, 7, seed), 2e-5, f"stream {seed}")
    with pytest.raises(InputError, match="was closed at latent frame 1"):
        next(broken)


def test_what_cannot_be_is_refused(model):
    with pytest.raises(InputError, match="rows must be an integer >= 1, got 0"):
        poisoned(model, RING, 6, rows=0)
    with pytest.raises(InputError, match="kv_dtype must be None for a batch of rollouts"):
        poisoned(model, RING.replace(kv_dtype="float8_e4m3"), 6)
    batch = poisoned(model, RING, 6, rows=1)
    with pytest.raises(InputError, match="prompt_embeds must be of one row, got 2"):
        batch.add(prompt(model, 0).expand(2, -1, -1))
    stream = batch.add(prompt(model, 0))
    with pytest.raises(InputError, match="a batch of 1 rows is full"):
        batch.add(prompt(model, 1))
    batch.remove(stream)
    with pytest.raises(InputError, match="rollout must be one of the batch"):
        batch.remove(stream)
    with pytest.raises(InputError, match="was closed at latent frame 0: start another"):
        next(stream)
    assert batch.step() == {}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype,limit", [(torch.float32, 2e-4), (torch.bfloat16, 0.1)])
def test_streams_on_a_gpu(weights, config, dtype, limit):
    """bfloat16: through the kernel where it is chosen; a row's rounding may depend on the others."""
    model = build_model(weights, config, dtype=dtype, device="cuda")
    made, seeds = three_that_come_one_by_one(model)
    for stream, blocks in made.items():
        wanted = alone(model, RING, 7, seeds[stream])
        assert_close_max(torch.cat(blocks, dim=1), wanted, limit, f"stream {seeds[stream]}")
