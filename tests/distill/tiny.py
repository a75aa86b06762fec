"""A model that trains in milliseconds, and the comparison of training states."""

import torch

from cfpp_rt.config import ModelConfig
from cfpp_rt.model.transformer import random_model

SIZES = {"dim": 32, "ffn_dim": 64, "num_heads": 2, "num_layers": 2, "freq_dim": 16, "patch_size": (1, 2, 2)}


def tiny_model(*, seed=0, dtype=torch.float32, **sizes):
    config = ModelConfig(**{**SIZES, "text_len": 0, "text_dim": 1, **sizes})
    return random_model(config, seed=seed, dtype=dtype)


def same(one, other):
    """Return True if two nested states are equal bit by bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[name]) for name, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other
