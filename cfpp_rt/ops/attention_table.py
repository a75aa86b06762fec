"""The choice of the backend of block_attention: a pure function of device, dtype and sizes, based on measurements.

kernel is the compiled kernel of this project. sdpa (the choice of torch), cudnn (through torch) and flash
(FlashAttention 3 or 2, if it can be imported) take one dense block of keys, so the ranges of a group are gathered for
them first.
"""

import dataclasses

import torch

BACKENDS = ("kernel", "sdpa", "cudnn", "flash")
KERNEL_HEAD_DIMS = (64, 128)  # supported by the CUDA kernels; the CPU kernel supports every even number


@dataclasses.dataclass(frozen=True)
class Problem:
    """The kind of one call of block_attention.

    capability: compute capability of the GPU, such as (9, 0) for Hopper; (0, 0) on the CPU.
    head_dim: D.
    queries, keys: number of tokens of one group.
    """

    device_type: str
    capability: tuple[int, int]
    dtype: torch.dtype
    head_dim: int
    queries: int
    keys: int


def kernel_supports(problem: Problem) -> bool:
    """Return True if the compiled kernel supports this device, dtype and head dimension."""
    if problem.device_type == "cuda":
        return problem.dtype != torch.float32 and problem.head_dim in KERNEL_HEAD_DIMS and problem.capability >= (8, 0)
    return problem.device_type == "cpu" and problem.head_dim % 2 == 0


def choose_attention(problem: Problem) -> tuple[str, str]:
    """Return the backend for a problem, one of BACKENDS, and the reason."""
    if not kernel_supports(problem):
        unsupported = f"{str(problem.dtype).removeprefix('torch.')}, head_dim {problem.head_dim}"
        return "sdpa", f"the kernel does not take {unsupported} on {problem.device_type}"
    if problem.device_type == "cuda" and problem.capability[0] != 9:
        return "sdpa", "the kernel has not been timed on this kind of GPU yet; CFPP_BACKEND=cuda runs it"
    return "kernel", "faster than sdpa wherever it was timed"
