"""Triton kernel of gated_residual: one program per token; the sum is normalised in registers."""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from cfpp_rt.ops.adaln_modulate_triton import layer_norm, row_strides
from cfpp_rt.ops.quantize_rows_triton import launch_shape, store_codes
from cfpp_rt.reference.quantize_rows import empty_codes


@triton.jit
def _gated_residual(
    sum_ptr,
    normed_ptr,
    codes_scale_ptr,
    x_ptr,
    y_ptr,
    gate_ptr,
    shift_ptr,
    scale_ptr,
    tokens,
    tokens_per_frame,
    dim,
    x_batch,
    x_token,
    y_batch,
    y_token,
    gate_batch,
    gate_frame,
    shift_batch,
    shift_frame,
    scale_batch,
    scale_frame,
    eps,
    HAS_GATE: tl.constexpr,
    SCALE_OFFSET: tl.constexpr,
    QUANTIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    frame = token // tokens_per_frame
    channel = tl.arange(0, BLOCK)
    inside = channel < dim
    x = tl.load(x_ptr + batch * x_batch + token * x_token + channel, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + batch * y_batch + token * y_token + channel, mask=inside, other=0.0).to(tl.float32)
    if HAS_GATE:
        gate = tl.load(gate_ptr + batch * gate_batch + frame * gate_frame + channel, mask=inside, other=0.0)
        y = gate.to(tl.float32) * y
    shift = tl.load(shift_ptr + batch * shift_batch + frame * shift_frame + channel, mask=inside).to(tl.float32)
    scale = tl.load(scale_ptr + batch * scale_batch + frame * scale_frame + channel, mask=inside).to(tl.float32)
    total = x + y
    tl.store(sum_ptr + row * dim + channel, total.to(sum_ptr.dtype.element_ty), mask=inside)
    normed = layer_norm(total, inside, dim, eps) * (SCALE_OFFSET + scale) + shift
    if QUANTIZE:
        store_codes(normed_ptr, codes_scale_ptr, tl.where(inside, normed, 0.0), row, dim, channel, inside)
    else:
        tl.store(normed_ptr + row * dim + channel, normed.to(normed_ptr.dtype.element_ty), mask=inside)


def gated_residual(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Launch the kernel of `cfpp_rt.ops.gated_residual.gated_residual`; arguments have been checked."""
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    normed = torch.empty_like(total)
    _launch(total, normed, None, x, y, gate, shift, scale, eps)
    return total, normed


def gated_residual_quantized(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernel of the op `cfpp_rt::gated_residual_quantized`; arguments have been checked."""
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    codes, codes_scale = empty_codes(x)
    _launch(total, codes, codes_scale, x, y, gate, shift, scale, eps)
    return total, codes, codes_scale


def _launch(
    total: Tensor,
    normed: Tensor,
    codes_scale: Tensor | None,
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    eps: float,
) -> None:
    batch, tokens, dim = x.shape
    rows = shift if gate is None else gate
    frames = 1 if rows.ndim == 1 else rows.shape[1]
    _gated_residual[(batch * tokens,)](
        total,
        normed,
        codes_scale,
        x,
        y,
        gate,
        shift,
        scale,
        tokens,
        tokens // frames,
        dim,
        *x.stride()[:2],
        *y.stride()[:2],
        *((0, 0) if gate is None else row_strides(gate)),
        *row_strides(shift),
        *row_strides(scale),
        eps,
        HAS_GATE=gate is not None,
        SCALE_OFFSET=0.0 if scale.ndim == 1 else 1.0,
        QUANTIZE=codes_scale is not None,
        **launch_shape(dim),
    )
