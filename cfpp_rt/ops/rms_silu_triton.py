"""Triton kernel of rms_silu_: one program per few pixels, whose channels are adjacent in memory."""

# mypy: allow-untyped-defs

import triton
import triton.language as tl
from torch import Tensor

_TILE = 2048  # values per program: two accesses of 16 bytes for each of 128 threads in 16-bit dtypes


def launch_shape(channels: int) -> dict[str, int]:
    """Return launch options: BLOCK covers the channels of a pixel, PIXELS fills the tile of a program."""
    block = triton.next_power_of_2(channels)
    return {"BLOCK": block, "PIXELS": max(1, _TILE // block), "num_warps": 4}


@triton.jit
def _rms_silu(
    out_ptr,
    x_ptr,
    gamma_ptr,
    bias_ptr,
    pixels,
    pixels_per_clip,
    channels,
    out_batch,
    x_batch,
    root,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    PIXELS: tl.constexpr,
):
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    batch = pixel // pixels_per_clip
    offset = (pixel - batch * pixels_per_clip) * channels
    channel = tl.arange(0, BLOCK)
    inside = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    x = tl.load(x_ptr + (batch * x_batch + offset)[:, None] + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)
        x += bias[None, :]
    gamma = tl.load(gamma_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)
    norm = tl.maximum(tl.sqrt(tl.sum(x * x, axis=1)), 1e-12, propagate_nan=tl.PropagateNan.ALL)
    y = x * (root / norm)[:, None] * gamma[None, :]
    y = y / (1 + tl.exp(-y))
    target = out_ptr + (batch * out_batch + offset)[:, None] + channel[None, :]
    tl.store(target, y.to(out_ptr.dtype.element_ty), mask=inside)


def rms_silu_(out: Tensor, x: Tensor, gamma: Tensor, bias: Tensor | None = None) -> None:
    """Launch the kernel of `cfpp_rt.ops.rms_silu.rms_silu_`; arguments have been checked."""
    batch, channels = x.shape[:2]
    pixels_per_clip = x[0, 0].numel()
    pixels = batch * pixels_per_clip
    shape = launch_shape(channels)
    _rms_silu[(triton.cdiv(pixels, shape["PIXELS"]),)](
        out,
        x,
        gamma,
        bias,
        pixels,
        pixels_per_clip,
        channels,
        out.stride(0),
        x.stride(0),
        channels**0.5,
        HAS_BIAS=bias is not None,
        **shape,
    )
