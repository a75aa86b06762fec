"""A model that trains in milliseconds."""

import torch

from cfpp_rt.config import ModelConfig
from cfpp_rt.model.transformer import random_model

SIZES = {"dim": 32, "ffn_dim": 64, "num_heads": 2, "num_layers": 2, "freq_dim": 16, "patch_size": (1, 2, 2)}


def tiny_model(*, seed=0, dtype=torch.float32, **sizes):
    config = ModelConfig(**{**SIZES, "text_len": 0, "text_dim": 1, **sizes})
    return random_model(config, seed=seed, dtype=dtype)
