"""Triton kernel of adaln_modulate: one program per token; its row is read once and written once."""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from cfpp_rt.ops.quantize_rows_triton import launch_shape, store_codes
from cfpp_rt.reference.quantize_rows import empty_codes


def row_strides(rows: Tensor) -> tuple[int, int]:
    """Return batch and frame stride of rows [B or 1, F or 1, dim] or [dim]; 0 where one row serves all."""
    if rows.ndim == 1:
        return 0, 0
    batch, frame, _ = (0 if size == 1 else stride for size, stride in zip(rows.shape, rows.stride(), strict=True))
    return batch, frame


@triton.jit
def layer_norm(x, inside, dim, eps):
    """Return (x - mean) / sqrt(variance + eps) of a float32 row x, which is 0 outside the mask `inside`."""
    mean = tl.sum(x, axis=0) / dim
    centred = tl.where(inside, x - mean, 0.0)
    variance = tl.sum(centred * centred, axis=0) / dim
    return centred * (1 / tl.sqrt(variance + eps))


@triton.jit
def _adaln_modulate(
    out_ptr,
    codes_scale_ptr,
    x_ptr,
    shift_ptr,
    scale_ptr,
    tokens,
    tokens_per_frame,
    dim,
    x_batch,
    x_token,
    shift_batch,
    shift_frame,
    scale_batch,
    scale_frame,
    eps,
    QUANTIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    frame = token // tokens_per_frame
    channel = tl.arange(0, BLOCK)
    inside = channel < dim
    x = tl.load(x_ptr + batch * x_batch + token * x_token + channel, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + batch * shift_batch + frame * shift_frame + channel, mask=inside).to(tl.float32)
    scale = tl.load(scale_ptr + batch * scale_batch + frame * scale_frame + channel, mask=inside).to(tl.float32)
    out = layer_norm(x, inside, dim, eps) * (1 + scale) + shift
    if QUANTIZE:
        store_codes(out_ptr, codes_scale_ptr, tl.where(inside, out, 0.0), row, dim, channel, inside)
    else:
        tl.store(out_ptr + row * dim + channel, out.to(out_ptr.dtype.element_ty), mask=inside)


def adaln_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Launch the kernel of `cfpp_rt.ops.adaln_modulate.adaln_modulate`; arguments have been checked."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch(out, None, x, shift, scale, eps)
    return out


def adaln_modulate_quantized(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Launch the kernel of `cfpp_rt.ops.adaln_modulate.adaln_modulate_quantized`; arguments have been checked."""
    codes, codes_scale = empty_codes(x)
    _launch(codes, codes_scale, x, shift, scale, eps)
    return codes, codes_scale


def _launch(out: Tensor, codes_scale: Tensor | None, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> None:
    batch, tokens, dim = x.shape
    _adaln_modulate[(batch * tokens,)](
        out,
        codes_scale,
        x,
        shift,
        scale,
        tokens,
        tokens // shift.shape[1],
        dim,
        *x.stride()[:2],
        *row_strides(shift),
        *row_strides(scale),
        eps,
        QUANTIZE=codes_scale is not None,
        **launch_shape(dim),
    )
