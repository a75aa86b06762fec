"""The CPU threads of a command: how many compute, and how a thread without work waits.

How many: a network whose largest product has fewer than `SMALL_PRODUCT` FLOPs runs on one thread. One core makes
about 100 GFLOP/s in float32, so such a product takes less than 5 milliseconds, and most of the pass far less. More
threads gain little on a quiet machine: a training step of the built-in world (3e8 FLOPs) takes as long on two as on
one. Beside another process every product waits until the scheduler has run all of its threads.

How a thread waits: by default an OpenMP thread without work spins for several milliseconds, which takes the core from
the thread that has work. `set_wait_policy` makes it sleep.

A setting of the user wins in both. Only the commands call these functions: importing the package changes nothing. This
module imports torch only where it must, since the wait policy has to be set before.
"""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `cfpp --help` must not wait for it
    from cfpp_rt.config import ModelConfig

SMALL_PRODUCT = 5e8  # FLOPs
# GNU's OpenMP, which torch uses on Linux, reads the first; LLVM's and Intel's, elsewhere, need the second as well.
_WAITING = {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}


def set_wait_policy() -> None:
    """Make the OpenMP threads of this process and its children sleep while they wait, unless the environment says how.

    Must run before torch is imported: OpenMP reads the environment when its library is loaded.
    """
    for name, value in _WAITING.items():
        os.environ.setdefault(name, value)


def largest_product(config: "ModelConfig", tokens: int) -> float:
    """Return the FLOPs of the largest matrix product of a forward pass.

    tokens: rows of the product: batch * latent frames of the pass * tokens per latent frame.
    """
    return 2.0 * tokens * config.dim * max(config.ffn_dim, 3 * config.dim)


def thread_count(flops: float) -> int | None:
    """Return the number of threads for a network, or None if the library's default is to stay.

    flops: of the largest product of a pass. OMP_NUM_THREADS wins; else 1 where the product is small.
    """
    chosen = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # a list names nested levels
    if chosen.isdecimal() and int(chosen) > 0:
        return int(chosen)
    return 1 if flops < SMALL_PRODUCT else None


def set_thread_count(flops: float) -> None:
    """Set the number of torch's threads to `thread_count`. flops: of the largest product of a pass."""
    count = thread_count(flops)
    if count is not None:
        import torch

        torch.set_num_threads(count)
