"""Triton kernel of quantize_rows, and the step that the kernels of the norms share: a row in registers to codes."""

# mypy: allow-untyped-defs

import triton
import triton.language as tl
from torch import Tensor

from cfpp_rt.reference.quantize_rows import empty_codes


def launch_shape(dim: int) -> dict[str, int]:
    """Return launch options: BLOCK covers a row, a warp has 512 channels: 16 bytes per lane and access in 16 bits."""
    block = triton.next_power_of_2(dim)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


@triton.jit
def store_codes(codes_ptr, scales_ptr, x, row, dim, channel, inside):
    """Store the codes and the scale of a float32 row x, which is 0 outside the mask `inside`."""
    largest = tl.maximum(tl.max(tl.abs(x), axis=0), 7.888609052210118e-31)  # 2^-100, see the reference
    codes = x * (448.0 / largest)  # 448 is the largest number of float8_e4m3fn
    tl.store(codes_ptr + row * dim + channel, codes.to(codes_ptr.dtype.element_ty), mask=inside)
    tl.store(scales_ptr + row, largest / 448.0)


@triton.jit
def _quantize_rows(
    codes_ptr,
    scales_ptr,
    x_ptr,
    tokens,
    dim,
    x_batch,
    x_token,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    channel = tl.arange(0, BLOCK)
    inside = channel < dim
    x = tl.load(x_ptr + batch * x_batch + token * x_token + channel, mask=inside, other=0.0).to(tl.float32)
    if GELU:  # tanh form: x * (1 + tanh(u)) / 2 = x * sigmoid(2 u)
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    store_codes(codes_ptr, scales_ptr, x, row, dim, channel, inside)


def quantize_rows(x: Tensor, gelu: bool = False) -> tuple[Tensor, Tensor]:
    """Launch the kernel of `cfpp_rt.ops.quantize_rows.quantize_rows`; arguments have been checked."""
    batch, tokens, dim = x.shape
    codes, scales = empty_codes(x)
    _quantize_rows[(batch * tokens,)](codes, scales, x, tokens, dim, *x.stride()[:2], GELU=gelu, **launch_shape(dim))
    return codes, scales
