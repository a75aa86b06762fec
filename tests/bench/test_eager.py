"""The baseline of `cfpp bench` computes what the runtime computes, compiled or not."""

import pytest
import torch

from cfpp_rt.bench.latency.baseline import EagerRollout, layer
from cfpp_rt.config import ModelConfig, RolloutConfig
from cfpp_rt.model.transformer import random_model
from cfpp_rt.runtime.rollout import Rollout
from tests.closeness import assert_close_max


def latents(kind, model, config, latent_frames, **options):
    generator = torch.Generator().manual_seed(3)
    sizes = model.config
    prompt_embeds = torch.randn(2, sizes.text_len, sizes.text_dim, generator=generator)
    rollout = kind(model, prompt_embeds, config, latent_size=(4, 6), latent_frames=latent_frames, seed=1, **options)
    return torch.cat([block.values for block in rollout], dim=1)


@pytest.mark.parametrize(
    "rollout_config,latent_frames",
    [
        (RolloutConfig(first_steps=(1000, 750, 500)), 4),
        (RolloutConfig(window=2), 5),
        (RolloutConfig(window=3, sinks=1, context_noise=100), 6),
        (RolloutConfig(frames_per_block=3, window=6), 9),
        (RolloutConfig(refresh="skip"), 3),
    ],
    ids=["first steps", "window", "sinks", "chunks", "skip"],
)
def test_eager_rollout_makes_the_same_latents(model, rollout_config, latent_frames):
    ours = latents(Rollout, model, rollout_config, latent_frames)
    assert_close_max(latents(EagerRollout, model, rollout_config, latent_frames), ours, 2e-4, "latents")


def test_eager_rollout_of_a_model_with_actions_and_no_text():
    world = ModelConfig(
        dim=64, ffn_dim=96, num_heads=2, num_layers=2, freq_dim=16, text_dim=1, text_len=0, num_actions=6
    )
    model = random_model(world, seed=0, dtype=torch.float32)
    config = RolloutConfig(window=2)
    assert_close_max(latents(EagerRollout, model, config, 4), latents(Rollout, model, config, 4), 2e-4, "latents")


@pytest.mark.slow
def test_compiled_layers_make_the_same_latents(model):
    pytest.importorskip("torch._inductor")
    config = RolloutConfig(window=2)
    compiled = latents(EagerRollout, model, config, 4, run_layer=torch.compile(layer))
    assert_close_max(compiled, latents(Rollout, model, config, 4), 2e-4, "latents")
