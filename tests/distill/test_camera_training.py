"""Cameras in training: training runs the network of the runtime, all networks get the cameras, the branch learns."""

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cfpp_rt.config import ModelConfig, RolloutConfig
from cfpp_rt.core.camera import Cameras, parse_trajectory
from cfpp_rt.core.schedule import FlowMatchSchedule
from cfpp_rt.distill.ar_diffusion import ArDiffusion, Bidirectional
from cfpp_rt.distill.assemble import InitPaths, build_stage, fresh_model
from cfpp_rt.distill.batch import Batch
from cfpp_rt.distill.causal_cd import CausalCD, Guidance, timestep_table
from cfpp_rt.distill.causal_ode import CausalODE
from cfpp_rt.distill.dmd import DMD
from cfpp_rt.distill.forward import Condition, Denoiser, Layout
from cfpp_rt.distill.rng import normal_like
from cfpp_rt.distill.self_rollout import Exits, SelfRollout
from cfpp_rt.distill.settings import Settings, StageSettings
from cfpp_rt.errors import CheckpointError, InputError
from cfpp_rt.model.attention import per_frame
from cfpp_rt.model.transformer import CausalWanTransformer, random_model
from cfpp_rt.runtime.rollout import Rollout
from tests.closeness import assert_close_max

SMALL = ModelConfig(
    dim=128, ffn_dim=256, num_heads=2, num_layers=2, freq_dim=32, text_len=4, text_dim=8, camera=True, eps=1e-6
)
PATHS = ("w*2,j*3", "l*3,u*2")


@pytest.fixture(scope="module")
def network():
    return random_model(SMALL, seed=0, dtype=torch.float32)


def cameras_of(batch=2):
    made = [Cameras.of(parse_trajectory(text), (0.5, 0.9)) for text in PATHS[:batch]]
    return Cameras(np.concatenate([one.views for one in made]), np.concatenate([one.focal for one in made]))


def condition_of(batch=2, seed=0):
    prompt_embeds = torch.randn(batch, 4, 8, generator=torch.Generator().manual_seed(seed))
    return Condition(prompt_embeds, cameras=cameras_of(batch))


def noise_of(frames, batch=2, seed=1):
    return torch.randn(batch, frames, 16, 4, 4, generator=torch.Generator().manual_seed(seed))


def test_teacher_forcing_is_what_the_runtime_computes(network):
    """At t = 1000 a block's velocity is its noise less the estimate that a one-step rollout makes of it."""
    clean, noisy, condition = noise_of(6), noise_of(6, seed=2), condition_of()
    layout = Layout(block=2, window=4)
    with torch.no_grad():
        velocity = Denoiser(network, layout).teacher_forced(clean, noisy, torch.full((2, 6), 1000.0), condition)
    rollout = Rollout(
        network,
        condition.prompt_embeds,
        RolloutConfig((1000,), frames_per_block=2, window=4),
        latent_size=(4, 4),
        latent_frames=6,
        initial_latents=clean[:, :4],
        cameras=condition.cameras,
        noise=noisy[:, 4:],
    )
    assert_close_max(noisy[:, 4:] - next(rollout).values, velocity[:, 4:], 1e-4, "velocity")


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("window", [None, 4])
def test_self_rollout_makes_the_videos_of_the_runtime(network, window, gradient):
    config = RolloutConfig((1000, 500), frames_per_block=2, window=window, context_noise=50)
    condition, noise = condition_of(), noise_of(6)
    generator = torch.Generator().manual_seed(2)
    renoise = [normal_like(torch.empty(2, 2, 16, 4, 4), generator) for _ in range(3)]
    made = SelfRollout(network, config)(
        noise, condition, Exits(1, 1), torch.Generator().manual_seed(2), gradient=gradient
    )
    rollout = Rollout(
        network,
        condition.prompt_embeds,
        config,
        latent_size=(4, 4),
        latent_frames=6,
        cameras=condition.cameras,
        noise=noise,
        renoise=renoise,
    )
    assert_close_max(made, torch.cat([block.values for block in rollout], dim=1), 2e-4, "videos")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_branch_learns(network, checkpointing):
    student = copy.deepcopy(network).requires_grad_(True)
    made = SelfRollout(student, RolloutConfig((1000, 500), frames_per_block=2), checkpointing=checkpointing)(
        noise_of(6), condition_of(), Exits(0, 0), torch.Generator().manual_seed(0)
    )
    made.square().sum().backward()
    gradients = {name: p.grad for name, p in student.named_parameters()}
    assert all(g is not None and g.isfinite().all() and g.any() for g in gradients.values())
    assert sum("prope_o" in name for name in gradients) == 4


def test_a_fresh_branch_is_zero_and_learns_from_the_first_step():
    student = fresh_model(SMALL, 0).requires_grad_(True)
    assert not any(block.self_attn.prope_o.weight.any() for block in student.blocks)
    with torch.no_grad():
        student.head.head.weight.normal_()  # zero in a fresh model, which then learns this first
    velocity = Denoiser(student).diffusion_forced(noise_of(6), torch.full((2, 6), 500.0), condition_of())
    velocity.square().sum().backward()
    assert all(block.self_attn.prope_o.weight.grad.any() for block in student.blocks)


def test_gradients_of_the_matrices_per_frame():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 8, generator=generator, requires_grad=True)
    matrices = torch.randn(1, 2, 4, 4, generator=generator)
    out = per_frame(x, matrices)
    for token in range(4):
        for group in (slice(0, 4), slice(4, 8)):
            torch.testing.assert_close(out[0, token, group], x[0, token, group] @ matrices[0, token // 2])
    (gradient,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(gradient[0, 3, :4], matrices[0, 1].sum(1))


def stages(networks):
    student, ema, teacher, critic = networks
    schedule, layout = FlowMatchSchedule(), Layout(block=2)
    s, e, t, c = (Denoiser(network, layout) for network in (student, ema, teacher, critic))
    guidance = Guidance(3.0, torch.zeros(1, 4, 8))
    table = timestep_table(8)
    return {
        "ar": (ArDiffusion(s, ema, schedule=schedule), {"student"}),
        "base": (Bidirectional(s, ema, schedule=schedule), {"student"}),
        "cd": (CausalCD(s, e, t, schedule=schedule, timesteps=table, guidance=guidance), {"student", "ema", "teacher"}),
        "ode": (CausalODE(s, ema, schedule=schedule, timesteps=table[:2]), {"student"}),
        "dmd": (
            DMD(
                SelfRollout(student, RolloutConfig((1000, 500), frames_per_block=2)),
                ema,
                t,
                c,
                latent_frames=6,
                latent_size=(16, 4, 4),
                guidance=guidance,
            ),
            {"student", "teacher", "critic"},
        ),
    }


@pytest.mark.parametrize("name", ["ar", "base", "cd", "ode", "dmd"])
def test_every_network_of_every_stage_sees_the_cameras(network, monkeypatch, name):
    """The pass of a guided teacher under the negative prompt, and those through the cache, included."""
    named = {role: copy.deepcopy(network) for role in ("student", "ema", "teacher", "critic")}
    for role in ("student", "critic"):
        named[role].requires_grad_(True)
    stage, wanted = stages(named.values())[name]
    calls = []

    def role_of(module):
        return next(role for role, one in named.items() if one is module)

    def forward_sequence(self, *arguments, cameras=None, **options):
        calls.append((role_of(self), cameras is not None))
        return real_forward_sequence(self, *arguments, cameras=cameras, **options)

    def forward(self, latents, time, text, cache, attn, *rest, **options):
        calls.append((role_of(self), attn.camera is not None))
        return real_forward(self, latents, time, text, cache, attn, *rest, **options)

    real_forward_sequence, real_forward = CausalWanTransformer.forward_sequence, CausalWanTransformer.forward
    monkeypatch.setattr(CausalWanTransformer, "forward_sequence", forward_sequence)
    monkeypatch.setattr(CausalWanTransformer, "forward", forward)
    batch = Batch(condition_of(), noise_of(6), torch.stack([noise_of(6, seed=s) for s in range(3)], dim=1))
    for _, loss in stage.updates(lambda: batch, torch.Generator().manual_seed(0), 0):
        loss.backward()
    assert {role for role, _ in calls} == wanted and all(seen for _, seen in calls)
    if name in ("cd", "dmd"):
        assert sum(role == "teacher" for role, _ in calls) == 2, "with and without the prompt"


def test_cameras_that_do_not_fit_the_clip_are_refused(network):
    with pytest.raises(InputError, match=r"cameras must be of the latents' \[B, F\] = \[2, 5\], got \[2, 6\]"):
        Denoiser(network).diffusion_forced(noise_of(5), torch.full((2, 5), 500.0), condition_of())
    three = Condition(torch.zeros(3, 4, 8), cameras=cameras_of())
    with pytest.raises(InputError, match="cameras must be of 1 video or of 3, got 2"):
        Denoiser(network).diffusion_forced(noise_of(6, batch=3), torch.full((3, 6), 500.0), three)
    plain = random_model(ModelConfig(**{**SMALL.to_dict(), "camera": False}), seed=0, dtype=torch.float32)
    with pytest.raises(InputError, match="model without the camera branch"):
        Denoiser(plain).diffusion_forced(noise_of(6), torch.full((2, 6), 500.0), condition_of())


def test_a_camera_model_starts_from_a_plain_one_where_it_has_it_all_to_learn(tmp_path):
    """Stages base and ar give the plain weights a branch of zeros; for the others its absence is an error."""
    plain = random_model(ModelConfig(**{**SMALL.to_dict(), "camera": False}), seed=3, dtype=torch.float32)
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    stage = StageSettings(steps=1)
    settings = Settings(SMALL, Layout(), RolloutConfig(), {}, {"ar": stage, "base": stage, "cd": stage})
    weights = InitPaths(init=tmp_path / "plain.safetensors")
    for name in ("ar", "base"):
        student = build_stage(name, settings, weights, (16, 4, 4)).trained["student"]
        state = student.state_dict()
        assert all(torch.equal(state[key], tensor) for key, tensor in plain.state_dict().items())
        added = {key for key in state if key not in plain.state_dict()}
        assert len(added) == 4 and not any(state[key].any() for key in added)
        assert all(p.requires_grad for p in student.parameters())
    with pytest.raises(CheckpointError, match="prope_o"):
        build_stage("cd", settings, weights, (16, 4, 4))
