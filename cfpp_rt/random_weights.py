"""A small pipeline with random weights, to try streaming, cache and timings without a checkpoint; it generates noise."""

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
    """A student of 4 layers and a Wan VAE of base width 8, both random; prompts must be given as prompt_embeds."""
    model = random_model(dataclasses.replace(SMALL, camera=camera), seed=seed, dtype=dtype, device=str(device))
    return Pipeline(model, random_vae(seed, dtype, device, base_dim=8), None, config)


def random_vae(seed: int, dtype: torch.dtype, device: torch.device, *, base_dim: int) -> WanVAE:
    """A Wan VAE of random weights; the published one has base_dim 96."""
    try:
        from diffusers import AutoencoderKLWan
    except ImportError as error:
        raise MissingExtraError("diffusers", "wan", "the Wan VAE") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae: Any = AutoencoderKLWan(base_dim=base_dim)
    torch.nn.ModuleList([vae]).to(device, dtype)  # diffusers' own `to` warns of a cast that does no harm
    return WanVAE(vae)


def random_prompt_embeds(prompt: str, config: ModelConfig) -> Tensor:
    """Text embeddings drawn from a seed that is the prompt's hash: the same prompt, the same embeddings."""
    seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:7], "big")
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, config.text_len, config.text_dim, generator=generator)
