"""Random numbers of training. All come from one generator on the CPU, so that a resumed run continues the sequence.

The generator is the same in every process. Numbers that belong to rows of a batch are drawn for the rows of all
processes, and each process takes its own: two processes with half the batch train as one with the full batch.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from cfpp_rt.device.transfer import to_device
from cfpp_rt.distill.processes import rank, world_size


def rows(draw: Callable[[int], Tensor], batch: int) -> Tensor:
    """Return this process's `batch` rows of draw(n), called with n = the number of rows of all processes."""
    return draw(batch * world_size())[rank() * batch : (rank() + 1) * batch]


def normal_like(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return standard normal noise, float32, in the shape of `like` [B, ...] and on its device.

    Every row's noise has a key of its own, so that no process makes the noise of another's rows.
    """
    keys = rows(lambda n: torch.randint(2**62, (n,), generator=generator), len(like)).tolist()
    noise = torch.empty(like.shape, dtype=torch.float32)
    for row, key in zip(noise, keys, strict=True):
        np.random.Generator(np.random.Philox(key=key)).standard_normal(dtype=np.float32, out=row.numpy())
    return to_device(noise, like.device)


def block_indices(
    count: int, batch: int, latent_frames: int, frames_per_block: int, generator: torch.Generator
) -> Tensor:
    """Draw an index in 0..count - 1 for every block and repeat it for the block's frames: int64 [batch, F]."""
    per_block = rows(lambda n: torch.randint(count, (n, latent_frames // frames_per_block), generator=generator), batch)
    return per_block.repeat_interleave(frames_per_block, dim=1)


def index(count: int, generator: torch.Generator) -> int:
    """Draw one index in 0..count - 1, the same in every process."""
    return int(torch.randint(count, (), generator=generator))
