"""The random numbers of training, all from one generator on the CPU, so that a resumed run draws what it would have."""

import torch
from torch import Tensor


def normal_like(like: Tensor, draws: torch.Generator) -> Tensor:
    """Standard normal noise, float32, of the shape and on the device of `like`."""
    return torch.randn(like.shape, generator=draws).to(like.device)


def block_indices(count: int, batch: int, frames: int, block: int, draws: torch.Generator) -> Tensor:
    """Indices 0..count - 1, one per block, repeated for its frames: int64 [batch, frames]."""
    return torch.randint(count, (batch, frames // block), generator=draws).repeat_interleave(block, dim=1)


def index(count: int, draws: torch.Generator) -> int:
    """One index 0..count - 1."""
    return int(torch.randint(count, (), generator=draws))
