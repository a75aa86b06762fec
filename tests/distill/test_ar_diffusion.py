"""The loss of stage ar from its definition, and the distribution of its random numbers."""

import copy

import pytest
import torch

from cfpp_rt.core.schedule import FlowMatchSchedule
from cfpp_rt.distill.ar_diffusion import ArDiffusion, Bidirectional, ar_diffusion_loss, flow_loss, mix
from cfpp_rt.distill.batch import Batch
from cfpp_rt.distill.forward import Condition, Denoiser, Layout
from cfpp_rt.errors import InputError


@pytest.fixture
def batch(config):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 16, 4, 4, generator=generator)
    return Batch(Condition(torch.randn(2, config.text_len, config.text_dim, generator=generator)), latents)


def test_the_loss_is_the_weighted_error_of_the_velocity(model, batch):
    schedule, network = FlowMatchSchedule(5.0), Denoiser(model)
    noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(1))
    levels = torch.tensor([[0, 500, 990, 3], [10, 20, 30, 40]])
    with torch.no_grad():
        loss = ar_diffusion_loss(network, batch.latents, noise, levels, batch.condition, schedule)
        noisy = torch.stack(
            [
                torch.stack([(1 - s) * x + s * e for x, e, s in zip(clip, draw, schedule.sigmas[row], strict=True)])
                for clip, draw, row in zip(batch.latents, noise, levels, strict=True)
            ]
        )
        velocity = network.teacher_forced(batch.latents, noisy, schedule.timesteps[levels], batch.condition)
    weights = schedule.training_weights()[levels]
    per_frame = (velocity - (noise - batch.latents)).square().mean(dim=(2, 3, 4))
    torch.testing.assert_close(loss, (per_frame * weights).mean())


def test_perfect_velocity_costs_nothing_and_weights_pick_cells(batch):
    noise = torch.randn(batch.latents.shape)
    assert flow_loss(noise - batch.latents, batch.latents, noise, torch.ones(1, 4)) == 0
    cells = torch.zeros(2, 4, 4, 4)
    cells[1, 2, 3, 0] = 128
    velocity = torch.zeros_like(noise)
    wanted = (noise - batch.latents)[1, 2, :, 3, 0].square().mean()
    torch.testing.assert_close(flow_loss(velocity, batch.latents, noise, torch.ones(1, 4), cells), wanted)


def test_mix_has_a_level_per_frame():
    clean, noise = torch.zeros(1, 2, 1, 1, 1), torch.ones(1, 2, 1, 1, 1)
    assert mix(clean, noise, torch.tensor([[0.25, 1.0]])).flatten().tolist() == [0.25, 1.0]


@pytest.mark.parametrize("block", [1, 2])
def test_gradients_reach_every_weight(model, batch, block):
    for stage_of in (ArDiffusion, Bidirectional):
        student = copy.deepcopy(model).requires_grad_(True)
        stage = stage_of(Denoiser(student, Layout(block)), model, schedule=FlowMatchSchedule(5.0))
        ((name, loss),) = stage.updates(lambda: batch, torch.Generator().manual_seed(0), 0)
        loss.backward()
        assert name == "student" and all(p.grad is not None and p.grad.any() for p in student.parameters())


def test_checkpointing_changes_no_gradient(model, batch):
    gradients = []
    for checkpointing in (False, True):
        student = copy.deepcopy(model).requires_grad_(True)
        stage = ArDiffusion(
            Denoiser(student, checkpointing=checkpointing),
            model,
            schedule=FlowMatchSchedule(5.0),
            max_context_noise=0.2,
        )
        ((_, loss),) = stage.updates(lambda: batch, torch.Generator().manual_seed(0), 0)
        loss.backward()
        gradients.append([p.grad for p in student.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain)


def test_prompts_alone_are_refused(model, batch):
    stage = ArDiffusion(Denoiser(model), model, schedule=FlowMatchSchedule(5.0))
    with pytest.raises(InputError, match="batch must have latents"):
        next(stage.updates(lambda: Batch(batch.condition), torch.Generator(), 0))
