"""Consistency distillation against the published implementation's intermediate results, and its formulas."""

import copy
import itertools

import pytest
import torch

from cfpp_rt.core.schedule import FlowMatchSchedule
from cfpp_rt.distill.ar_diffusion import mix
from cfpp_rt.distill.batch import Batch
from cfpp_rt.distill.causal_cd import (
    CausalCD,
    Guidance,
    clean_estimate,
    consistency_loss,
    guided,
    ode_step,
    timestep_table,
)
from cfpp_rt.distill.causal_ode import CausalODE, solve
from cfpp_rt.distill.forward import Condition, Denoiser
from cfpp_rt.errors import InputError
from tests.closeness import assert_close_max

SCHEDULE = FlowMatchSchedule(5.0)


def test_every_intermediate_and_the_loss_equal_the_published_ones(model, vectors):
    cd = {name.removeprefix("cd."): tensor for name, tensor in vectors.items() if name.startswith("cd.")}
    network, condition = Denoiser(model), Condition(vectors["prompt_embeds"])
    timesteps = timestep_table()
    assert_close_max(timesteps, cd["timesteps"], 1e-3, "timesteps")
    m = int(cd["timestep_index"])
    here, there = timesteps[m], timesteps[m + 1]
    clean = cd["clean"]
    noisy = mix(clean, cd["noise"], (here / 1000).expand(1, clean.shape[1]))
    assert_close_max(noisy, cd["latent_t"], 2e-5, "x_t")
    with torch.no_grad():
        stepped = ode_step(network, clean, noisy, here, there, condition, Guidance(3.0, cd["negative_embeds"]))
        assert_close_max(stepped, cd["latent_next"], 2e-5, "x_t'")
        found = clean_estimate(network, clean, noisy, here, condition, SCHEDULE)
        wanted = clean_estimate(network, clean, stepped, there, condition, SCHEDULE)
    assert_close_max(found, cd["pred_t"], 2e-5, "the student's estimate")
    assert_close_max(wanted, cd["pred_next"], 2e-5, "the target's estimate")
    assert_close_max(consistency_loss(found, wanted), cd["loss"][0], 2e-5, "loss")


def test_guidance_of_one_is_the_conditional_velocity():
    condition = Condition(torch.randn(2, 3, 4))
    seen = []

    def velocity(c):
        seen.append(c.prompt_embeds)
        return c.prompt_embeds.sum(dim=(1, 2))

    one = guided(velocity, condition, Guidance(1.0, torch.zeros(1, 3, 4)))
    torch.testing.assert_close(one, guided(velocity, condition, None))
    assert len(seen) == 3 and not seen[0].any()
    torch.testing.assert_close(guided(velocity, condition, Guidance(3.0, torch.zeros(1, 3, 4))), 3 * one)


@pytest.fixture
def batch(config):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 3, 16, 4, 4, generator=generator)
    return Batch(Condition(torch.randn(1, config.text_len, config.text_dim, generator=generator)), latents)


def test_only_the_student_learns_and_the_same_seed_gives_the_same_loss(model, batch):
    student, ema = (copy.deepcopy(model).requires_grad_(True) for _ in range(2))
    stage = CausalCD(Denoiser(student), Denoiser(ema), Denoiser(model), schedule=SCHEDULE, timesteps=timestep_table())
    losses = []
    for _ in range(2):
        ((name, loss),) = stage.updates(lambda: batch, torch.Generator().manual_seed(5), 0)
        losses.append(loss.item())
    loss.backward()
    assert name == "student" and losses[0] == losses[1] > 0
    assert all(p.grad is not None for p in student.blocks.parameters())
    assert all(p.grad is None for p in [*ema.parameters(), *model.parameters()])


def test_cell_weights_count(batch):
    here, there = torch.randn(2, *batch.latents.shape)
    weights = torch.zeros(1, 3, 4, 4)
    weights[0, 1, 2, 3] = 48
    wanted = (here - there)[0, 1, :, 2, 3].square().mean()
    torch.testing.assert_close(consistency_loss(here, there, weights), wanted)


def test_a_solved_trajectory_is_the_euler_method_and_the_ode_stage_regresses_its_end(model, batch):
    network, timesteps = Denoiser(model), timestep_table(4)
    noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(1))
    states = solve(network, batch.latents, noise, batch.condition, timesteps, stored=(0, 2))
    assert states.shape == (1, 3, *batch.latents.shape[1:]) and torch.equal(states[:, 0], noise)
    x = noise
    with torch.no_grad():
        for t, following in zip(timesteps, [*timesteps[1:], torch.zeros(())], strict=True):
            levels = t.expand(1, 3)
            x = x - (t - following) / 1000 * network.teacher_forced(batch.latents, x, levels, batch.condition)
    assert_close_max(states[:, -1], x, 1e-5, "end point")

    stage = CausalODE(network, model, schedule=SCHEDULE, timesteps=timesteps[[0, 2]])
    with torch.no_grad():
        batch_with_states = Batch(batch.condition, batch.latents, trajectory=states)
        ((_, loss),) = stage.updates(lambda: batch_with_states, torch.Generator().manual_seed(0), 0)
        at_each = [  # of every frame, from the first or the second stored state
            clean_estimate(network, batch.latents, states[:, i], timesteps[2 * i], batch.condition, SCHEDULE)
            for i in range(2)
        ]
    squares = torch.stack([(found - x).square().mean(dim=(0, 2, 3, 4)) for found in at_each])
    possible = [squares[list(entries), range(3)].mean().item() for entries in itertools.product(range(2), repeat=3)]
    assert min(abs(loss.item() - value) for value in possible) < 1e-5
    with pytest.raises(InputError, match=r"trajectory must be \[B, 2 \+ 1"):
        next(stage.updates(lambda: batch, torch.Generator(), 0))


def test_teacher_student_and_target_see_the_same_noised_past(model, batch, monkeypatch):
    seen = []

    class Watched(Denoiser):
        def teacher_forced(self, clean, noisy, timesteps, condition, clean_timesteps=None):
            seen.append((clean, clean_timesteps))
            return super().teacher_forced(clean, noisy, timesteps, condition, clean_timesteps)

    student, ema = (copy.deepcopy(model).requires_grad_(True) for _ in range(2))
    networks = Watched(student), Watched(ema), Watched(model)
    stage = CausalCD(*networks, schedule=SCHEDULE, timesteps=timestep_table(), max_context_noise=0.5)
    noised = 0
    for seed in range(4):
        seen.clear()
        next(stage.updates(lambda: batch, torch.Generator().manual_seed(seed), 0))
        (past, levels), *others = seen
        assert len(others) == 2 and all(torch.equal(past, p) and torch.equal(levels, t) for p, t in others)
        assert levels.min() >= 0 and levels.max() <= 500 and torch.equal(past, batch.latents) == (not levels.any())
        noised += bool(levels.any())
    assert 0 < noised < 4, "some clips carry noise, others do not"
