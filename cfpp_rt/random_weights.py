"""A small pipeline with random weights, to try the runtime without a checkpoint; it generates noise."""

import dataclasses
import hashlib
from typing import Any

import torch
from torch import Tensor

from cfpp_rt.codec.wan import WanVAE
from cfpp_rt.config import ModelConfig, RolloutConfig
from cfpp_rt.errors import MissingExtraError
from cfpp_rt.model.transformer import random_model
from cfpp_rt.pipeline import Pipeline

SMALL = ModelConfig(dim=256, ffn_dim=1024, num_heads=2, num_layers=4, freq_dim=64, text_dim=64, text_len=32)


def random_pipeline(
    config: RolloutConfig, *, dtype: torch.dtype, device: torch.device, seed: int = 0, camera: bool = False
) -> Pipeline:
    """Return a random student of 4 layers with a random Wan VAE of base width 8. It takes prompt_embeds only."""
    model = random_model(dataclasses.replace(SMALL, camera=camera), seed=seed, dtype=dtype, device=str(device))
    return Pipeline(model, random_vae(seed, dtype, device, base_dim=8), None, config)


def random_vae(seed: int, dtype: torch.dtype, device: torch.device, *, base_dim: int) -> WanVAE:
    """Return a Wan VAE with random weights. base_dim: width of its first layer, 96 in the published one."""
    try:
        from diffusers import AutoencoderKLWan
    except ImportError as error:
        raise MissingExtraError("diffusers", "wan", "the Wan VAE") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae: Any = AutoencoderKLWan(base_dim=base_dim)
    torch.nn.ModuleList([vae]).to(device, dtype)  # the `to` of diffusers warns of this cast, which is harmless
    return WanVAE(vae)


def random_prompt_embeds(prompt: str, config: ModelConfig) -> Tensor:
    """Return random text embeddings float32 [1, text_len, text_dim], seeded by a hash of the prompt."""
    seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:7], "big")
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, config.text_len, config.text_dim, generator=generator)
