"""adaln_modulate: LayerNorm without weights, then one shift and scale per latent frame, in one pass over memory."""

import torch
from torch import Tensor

from cfpp_rt.ops._checks import require_modulation, require_tokens
from cfpp_rt.ops._library import can_bypass_dispatcher, compiled_module, register
from cfpp_rt.ops._triton import triton_kernels
from cfpp_rt.reference.adaln_modulate import adaln_modulate as reference
from cfpp_rt.reference.quantize_rows import empty_codes, quantize_rows


def adaln_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Return LayerNorm(x) * (1 + scale) + shift: [B, S, dim], contiguous, in the dtype of x.

    The norm is over the last dimension, without weights: (x - mean) / sqrt(variance + eps). Arithmetic is float32,
    with one rounding at the end.

    x: [B, S, dim], last dimension contiguous, other strides free. float32, bfloat16 or float16 (float64: the reference
        runs).
    shift, scale: [B or 1, F, dim] of the same dtype, F a divisor of S. Row f modulates the S / F tokens of frame f.
        Last dimension contiguous, other strides free.
    eps: added to the variance.

    If gradients are enabled and an argument requires one, the reference computes the same, differentiably.
    Raises InputError naming the argument, what was wanted and what came. Source: adaptive layer norm of DiT (Peebles
    and Xie 2022, arXiv 2212.09748), as in Wan2.1's blocks and head.
    """
    tensors = (x, shift, scale)
    if can_bypass_dispatcher(tensors):
        return _run(x, shift, scale, eps)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        _check(x, shift, scale)
        return reference(x, shift, scale, eps)
    return _op(x, shift, scale, eps)


def adaln_modulate_quantized(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return `quantize_rows` of `adaln_modulate`, without rounding in between: codes [B, S, dim], scales [B, S, 1].

    The arguments are those of `adaln_modulate`. The op has no gradient and no compiled CPU kernel.
    """
    if can_bypass_dispatcher((x, shift, scale)):
        return _run_quantized(x, shift, scale, eps)
    return _op_quantized(x, shift, scale, eps)


def _check(x: Tensor, shift: Tensor, scale: Tensor) -> None:
    require_tokens("adaln_modulate", x)
    require_modulation("adaln_modulate", "shift", shift, x)
    require_modulation("adaln_modulate", "scale", scale, x, shift.shape[1])


def _run(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    module = triton_kernels("adaln_modulate") if x.is_cuda else compiled_module("cpu")
    if module is None or x.is_cuda or x.dtype == torch.float64:  # the binding of the CPU kernel checks by itself
        _check(x, shift, scale)
    if module is None or x.dtype == torch.float64:
        return reference(x, shift, scale, eps)
    if x.is_cuda:
        return module.adaln_modulate(x, shift, scale, eps)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    module.adaln_modulate(out, x, shift, scale, eps, torch.get_num_threads())
    return out


def _fake(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    _check(x, shift, scale)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_op = register("adaln_modulate(Tensor x, Tensor shift, Tensor scale, float eps) -> Tensor", _run, _fake)


def _run_quantized(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _check(x, shift, scale)
    module = triton_kernels("adaln_modulate") if x.is_cuda else None
    if module is None:
        return quantize_rows(reference(x.float(), shift, scale, eps))
    return module.adaln_modulate_quantized(x, shift, scale, eps)


def _fake_quantized(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _check(x, shift, scale)
    return empty_codes(x)


_op_quantized = register(
    "adaln_modulate_quantized(Tensor x, Tensor shift, Tensor scale, float eps) -> (Tensor, Tensor)",
    _run_quantized,
    _fake_quantized,
)
