"""Which implementation of block attention runs: one pure function of where and what, from measurements.

kernel is this project's own. sdpa (torch's choice), cudnn (through torch) and flash (FlashAttention 3 or 2 where it can
be imported) take one dense block of keys, so a group's ranges are gathered for them first.
"""

import dataclasses

import torch

BACKENDS = ("kernel", "sdpa", "cudnn", "flash")
KERNEL_HEAD_DIMS = (64, 128)  # of the CUDA kernels; the CPU kernel takes any even one


@dataclasses.dataclass(frozen=True)
class Problem:
    """One call. capability: of the GPU, (9, 0) for Hopper; (0, 0) on the CPU. queries, keys: tokens of one group."""

    device_type: str
    capability: tuple[int, int]
    dtype: torch.dtype
    head_dim: int
    queries: int
    keys: int


def kernel_takes(problem: Problem) -> bool:
    if problem.device_type == "cuda":
        return problem.dtype != torch.float32 and problem.head_dim in KERNEL_HEAD_DIMS and problem.capability >= (8, 0)
    return problem.device_type == "cpu" and problem.head_dim % 2 == 0


def choose_attention(problem: Problem) -> tuple[str, str]:
    """The backend for a problem, one of BACKENDS, and why."""
    if not kernel_takes(problem):
        what = f"{str(problem.dtype).removeprefix('torch.')}, head_dim {problem.head_dim}"
        return "sdpa", f"the kernel does not take {what} on {problem.device_type}"
    if problem.device_type == "cuda" and problem.capability[0] != 9:
        return "sdpa", "the kernel has not been timed on such a GPU yet; CFPP_BACKEND=cuda runs it"
    return "kernel", "faster than sdpa wherever it was timed"
