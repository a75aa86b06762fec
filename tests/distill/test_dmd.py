"""Stage 3: its rollout is the runtime's, its gradient the difference of the scores, and nothing else learns."""

import copy

import pytest
import torch

from cfpp_rt.config import ModelConfig, RolloutConfig
from cfpp_rt.distill.batch import Batch
from cfpp_rt.distill.dmd import DMD, clean_score, matching_loss, score_timesteps
from cfpp_rt.distill.forward import Condition, Denoiser
from cfpp_rt.distill.rng import normal_like
from cfpp_rt.distill.self_rollout import Exits, SelfRollout
from cfpp_rt.errors import InputError
from cfpp_rt.model.transformer import random_model
from cfpp_rt.runtime.rollout import Rollout
from cfpp_rt.values import empty_prompt_embeds
from tests.closeness import assert_close_max

SMALL = ModelConfig(dim=128, ffn_dim=256, num_heads=2, num_layers=2, freq_dim=32, text_len=0, text_dim=1, num_actions=3)


@pytest.fixture(scope="module")
def network():
    return random_model(SMALL, seed=0, dtype=torch.float32)


def condition_of(latent_frames, batch=1):
    return Condition(torch.zeros(batch, 0, 1), torch.arange(batch * latent_frames).reshape(batch, latent_frames) % 3)


def runtime(network, config, condition, noise, renoise, initial=None):
    rollout = Rollout(
        network,
        empty_prompt_embeds(len(noise), 1),
        config,
        latent_size=(4, 4),
        latent_frames=None if config.window else condition.actions.shape[1],
        noise=noise,
        renoise=renoise,
        initial_latents=initial,
    )
    n, given = config.frames_per_block, 0 if initial is None else initial.shape[1]
    made = []
    for start in range(given, condition.actions.shape[1], n):
        rollout.set_actions(condition.actions[:, start : start + n])
        made.append(next(rollout).values)
    return torch.cat(made, dim=1)


CONFIGS = [
    RolloutConfig(steps=(1000, 500)),
    RolloutConfig(steps=(1000,), first_steps=(1000, 500), window=3),
    RolloutConfig(steps=(1000, 500), window=4, frames_per_block=2, context_noise=50),
]


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("config", CONFIGS)
def test_last_exits_give_the_videos_that_the_runtime_makes(network, config, gradient):
    latent_frames, condition = 6, condition_of(6, batch=2)
    noise = torch.randn(2, latent_frames, 16, 4, 4, generator=torch.Generator().manual_seed(1))
    first = config.first_steps or config.steps
    generator = torch.Generator().manual_seed(2)
    renoise = []
    for block in range(latent_frames // config.frames_per_block):
        for _ in range(len(first if block == 0 else config.steps) - 1):
            renoise.append(normal_like(torch.empty(2, config.frames_per_block, 16, 4, 4), generator))
    made = SelfRollout(network, config)(
        noise,
        condition,
        Exits(len(first) - 1, len(config.steps) - 1),
        torch.Generator().manual_seed(2),
        gradient=gradient,
    )
    assert_close_max(made, runtime(network, config, condition, noise, renoise), 2e-4, "videos")


def test_given_frames_are_seen_and_come_first(network):
    initial = torch.randn(1, 2, 16, 4, 4)
    noise = torch.randn(1, 3, 16, 4, 4)
    config, condition = RolloutConfig(steps=(1000,), window=3), condition_of(5)
    made = SelfRollout(network, config)(noise, condition, Exits(0, 0), torch.Generator(), initial_latents=initial)
    assert torch.equal(made[:, :2], initial)
    # Given frames are prefilled without actions by the runtime: give it none here either.
    condition.actions[:, :2] = 0
    made = SelfRollout(network, config)(noise, condition, Exits(0, 0), torch.Generator(), initial_latents=initial)
    assert_close_max(made[:, 2:], runtime(network, config, condition, noise, [], initial), 2e-4, "videos")


def test_a_block_answers_for_itself_alone(network):
    """Its gradient does not reach the noise of the blocks before it, but its own."""
    noise = torch.randn(1, 3, 16, 4, 4, requires_grad=True)
    student = copy.deepcopy(network).requires_grad_(True)
    made = SelfRollout(student, RolloutConfig(steps=(1000, 500)))(
        noise, condition_of(3), Exits(0, 0), torch.Generator().manual_seed(0)
    )
    (gradient,) = torch.autograd.grad(made[:, 2].square().sum(), noise, retain_graph=True)
    assert not gradient[:, :2].any() and gradient[:, 2].any()
    made.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())


def test_the_gradient_is_the_normalised_difference_of_the_scores():
    video, real, fake = (torch.randn(2, 3, 4, 2, 2, dtype=torch.float64) for _ in range(3))
    video.requires_grad_(True)
    matching_loss(video, real, fake, slice(1, None)).backward()
    for b in range(2):
        size = (video[b, 1:] - real[b, 1:]).abs().mean()
        wanted = (fake[b, 1:] - real[b, 1:]) / size / video[:, 1:].numel()
        torch.testing.assert_close(video.grad[b, 1:], wanted.detach())
    assert not video.grad[:, 0].any()


def test_score_timesteps_are_shifted_and_clamped():
    t = score_timesteps(20000, 5.0, torch.Generator().manual_seed(0))
    assert t.min() == 20 and t.max() == 980
    assert abs(t.median().item() - 1000 * 5 * 0.5 / 3) < 15


def test_clean_score_is_the_formula(network):
    noisy, timesteps, condition = torch.randn(2, 3, 16, 4, 4), torch.tensor([100.0, 900.0]), condition_of(3, batch=2)
    with torch.no_grad():
        velocity = Denoiser(network).bidirectional(noisy, timesteps[:, None].expand(2, 3), condition)
        found = clean_score(Denoiser(network), noisy, timesteps, condition)
    for b, sigma in enumerate((0.1, 0.9)):
        assert_close_max(found[b], noisy[b] - sigma * velocity[b], 1e-5, f"video {b}")


@pytest.mark.parametrize("initial_latent_frames", [0, 1])
def test_the_student_learns_every_ratio_th_step_and_the_critic_always(network, initial_latent_frames):
    student, critic = (copy.deepcopy(network).requires_grad_(True) for _ in range(2))
    stage = DMD(
        SelfRollout(student, RolloutConfig(steps=(1000, 500), window=3)),
        network,
        Denoiser(random_model(SMALL, seed=1, dtype=torch.float32)),
        Denoiser(critic),
        latent_frames=4,
        latent_size=(16, 4, 4),
        initial_latent_frames=initial_latent_frames,
        ratio=2,
    )
    latents = torch.randn(2, 4, 16, 4, 4) if initial_latent_frames else None
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        names = []
        for name, loss in stage.updates(lambda: Batch(condition_of(4, batch=2), latents), generator, step):
            names.append(name)
            loss.backward()
            learns, other = (student, critic) if name == "student" else (critic, student)
            assert any(p.grad is not None and p.grad.any() for p in learns.parameters())
            assert all(p.grad is None for p in other.parameters())
            for p in learns.parameters():
                p.grad = None
        assert names == (["student", "critic"] if step % 2 == 0 else ["critic"])
    assert all(p.grad is None for p in network.parameters())


def test_frames_must_make_whole_blocks(network):
    rollout = SelfRollout(network, RolloutConfig(frames_per_block=2))
    with pytest.raises(InputError, match="blocks of 2 frames, got 3 and 0"):
        rollout(torch.randn(1, 3, 16, 4, 4), condition_of(3), Exits(0, 0), torch.Generator())
