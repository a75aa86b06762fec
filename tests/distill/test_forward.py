"""The training forwards against the published implementation's, and against the cached rollout of the same module."""

import torch

from cfpp_rt.distill.forward import Condition, Denoiser
from tests.closeness import assert_close_max


def condition_of(vectors) -> Condition:
    return Condition(vectors["prompt_embeds"])


def test_teacher_forcing_equals_the_published_implementation(model, vectors):
    clean, noisy = vectors["teacher_forcing.clean"], vectors["teacher_forcing.latent"]
    with torch.no_grad():
        flow = Denoiser(model).teacher_forced(clean, noisy, vectors["teacher_forcing.timestep"], condition_of(vectors))
    assert_close_max(flow, vectors["teacher_forcing.flow"], 2e-5, "flow")


def test_diffusion_forcing_equals_the_published_implementation(model, vectors):
    noisy, timesteps = vectors["teacher_forcing.latent"], vectors["teacher_forcing.timestep"]
    with torch.no_grad():
        flow = Denoiser(model).diffusion_forced(noisy, timesteps, condition_of(vectors))
    assert_close_max(flow, vectors["diffusion_forcing.flow"], 2e-5, "flow")
