"""Choose the backend of block_attention from device, dtype and sizes, based on measurements.

"kernel" is the compiled kernel of this project. "sdpa" (torch chooses the implementation), "cudnn" (called through
torch) and "flash" (FlashAttention 3 or 2, if it can be imported) take one dense tensor of keys, so the keys in the
ranges of a group are gathered for them first.
"""

import dataclasses

import torch

ATTENTION_BACKENDS = ("kernel", "sdpa", "cudnn", "flash")
KERNEL_HEAD_DIMS = (64, 128)  # supported by the CUDA kernels; the CPU kernel supports every even number


@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """Device, dtype and sizes of a call of block_attention.

    capability: compute capability of the GPU, such as (9, 0) for Hopper; (0, 0) on the CPU.
    head_dim: D.
    queries, keys: number of queries and of visible keys of one group.
    """

    device_type: str
    capability: tuple[int, int]
    dtype: torch.dtype
    head_dim: int
    queries: int
    keys: int


def kernel_supports(call: AttentionCall) -> bool:
    """Return True if the compiled kernel supports this device, dtype and head dimension."""
    if call.device_type == "cuda":
        return call.dtype != torch.float32 and call.head_dim in KERNEL_HEAD_DIMS and call.capability >= (8, 0)
    return call.device_type == "cpu" and call.head_dim % 2 == 0


def choose_attention(call: AttentionCall) -> tuple[str, str]:
    """Return the backend for a call, one of ATTENTION_BACKENDS, and the reason."""
    if not kernel_supports(call):
        unsupported = f"{str(call.dtype).removeprefix('torch.')}, head_dim {call.head_dim}"
        return "sdpa", f"the kernel does not take {unsupported} on {call.device_type}"
    if call.device_type == "cuda" and call.capability[0] != 9:
        return "sdpa", "the kernel has not been timed on this kind of GPU yet; CFPP_BACKEND=cuda runs it"
    return "kernel", "faster than sdpa wherever it was timed"
