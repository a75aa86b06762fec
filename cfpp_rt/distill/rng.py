"""The random numbers of training, all from one generator on the CPU, so that a resumed run draws what it would have.

The generator is the same in every process. What is drawn per row of a batch is drawn for the rows of all processes, of
which each takes its own: two processes with half the batch train as one with all of it.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from cfpp_rt.distill.processes import count, rank


def rows(draw: Callable[[int], Tensor], batch: int) -> Tensor:
    """This process's `batch` rows of what `draw` makes for a number of rows."""
    return draw(batch * count())[rank() * batch : (rank() + 1) * batch]


def normal_like(like: Tensor, draws: torch.Generator) -> Tensor:
    """Standard normal noise, float32, of the shape and on the device of `like`, whose first axis are the rows.

    A row's noise has a key of its own, so that no process makes the noise of others.
    """
    keys = rows(lambda n: torch.randint(2**62, (n,), generator=draws), len(like)).tolist()
    noise = torch.empty(like.shape, dtype=torch.float32)
    for row, key in zip(noise, keys, strict=True):
        np.random.Generator(np.random.Philox(key=key)).standard_normal(dtype=np.float32, out=row.numpy())
    return sent(noise, like.device)


def block_indices(count: int, batch: int, frames: int, block: int, draws: torch.Generator) -> Tensor:
    """Indices 0..count - 1, one per block, repeated for its frames: int64 [batch, frames]."""
    drawn = rows(lambda n: torch.randint(count, (n, frames // block), generator=draws), batch)
    return drawn.repeat_interleave(block, dim=1)


def index(count: int, draws: torch.Generator) -> int:
    """One index 0..count - 1, the same in every process."""
    return int(torch.randint(count, (), generator=draws))


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device; a GPU's queue takes the copy and the host goes on at once."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
