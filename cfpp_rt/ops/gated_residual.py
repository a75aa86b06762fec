"""gated_residual: x + gate * y and the modulated LayerNorm of the sum, in one pass over memory."""

import torch
from torch import Tensor

from cfpp_rt.ops._checks import argument_error, require_like_tokens, require_modulation, require_tokens
from cfpp_rt.ops._library import can_bypass_dispatcher, compiled_module, register
from cfpp_rt.ops._triton import triton_kernels
from cfpp_rt.reference.gated_residual import gated_residual as reference
from cfpp_rt.reference.quantize_rows import empty_codes, quantize_rows


def gated_residual(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the sum x + gate * y and its norm LayerNorm(sum) * (1 + scale) + shift: two of [B, S, dim], contiguous.

    Arithmetic is float32. The norm is taken of the sum before the sum is rounded to the dtype of x, which is closer to
    the exact result than the norm of the rounded sum. Each output is rounded once.

    x, y: [B, S, dim] of one dtype: float32, bfloat16 or float16 (float64: the reference runs).
    gate: [B or 1, F, dim], F a divisor of S. Row f serves the S / F tokens of frame f. None = x + y.
    shift, scale: either [B or 1, F, dim], as gate, or [dim]: the bias and weight of the LayerNorm itself, so that the
        factor is scale instead of 1 + scale.
    eps: added to the variance.

    Of all tensors the last dimension is contiguous, other strides are free.
    If gradients are enabled and an argument requires one, the reference computes the same, differentiably.
    Raises InputError naming the argument, what was wanted and what came. Source: the residual branches of Wan2.1's
    blocks, each fused with the norm that follows it.
    """
    tensors = (x, y, shift, scale) if gate is None else (x, y, gate, shift, scale)
    if can_bypass_dispatcher(tensors):
        return _run(x, y, gate, shift, scale, eps)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        _check(x, y, gate, shift, scale)
        return reference(x, y, gate, shift, scale, eps)
    return _op(x, y, gate, shift, scale, eps)


def gated_residual_quantized(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return the sum of `gated_residual`, and `quantize_rows` of its norm without rounding in between.

    The arguments are those of `gated_residual`. The op has no gradient and no compiled CPU kernel.
    Returns the sum [B, S, dim], and a pair of codes [B, S, dim] and scales [B, S, 1].
    """
    tensors = (x, y, shift, scale) if gate is None else (x, y, gate, shift, scale)
    run = _run_quantized if can_bypass_dispatcher(tensors) else _op_quantized
    total, codes, codes_scale = run(x, y, gate, shift, scale, eps)
    return total, (codes, codes_scale)


def _check(x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor) -> None:
    op = "gated_residual"
    require_tokens(op, x)
    if y.shape != x.shape:
        raise argument_error(op, "y", f"{list(x.shape)} like x", list(y.shape))
    require_like_tokens(op, "y", y, x)
    if gate is not None:
        require_modulation(op, "gate", gate, x)
    if shift.ndim == 1:
        for name, row in (("shift", shift), ("scale", scale)):
            if row.shape != x.shape[2:]:
                raise argument_error(op, name, f"[dim={x.shape[2]}]", list(row.shape))
            require_like_tokens(op, name, row, x)
        return
    require_modulation(op, "shift", shift, x, None if gate is None else gate.shape[1])
    require_modulation(op, "scale", scale, x, shift.shape[1])


def _empty(x: Tensor) -> tuple[Tensor, Tensor]:
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    return total, torch.empty_like(total)


def _run(x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    module = triton_kernels("gated_residual") if x.is_cuda else compiled_module("cpu")
    if module is None or x.is_cuda or x.dtype == torch.float64:  # the binding of the CPU kernel checks by itself
        _check(x, y, gate, shift, scale)
    if module is None or x.dtype == torch.float64:
        return reference(x, y, gate, shift, scale, eps)
    if x.is_cuda:
        return module.gated_residual(x, y, gate, shift, scale, eps)
    total, normed = _empty(x)
    module.gated_residual(total, normed, x, y, gate, shift, scale, eps, torch.get_num_threads())
    return total, normed


def _fake(x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _check(x, y, gate, shift, scale)
    return _empty(x)


_op = register(
    "gated_residual(Tensor x, Tensor y, Tensor? gate, Tensor shift, Tensor scale, float eps) -> (Tensor, Tensor)",
    _run,
    _fake,
)


def _run_quantized(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, y, gate, shift, scale)
    module = triton_kernels("gated_residual") if x.is_cuda else None
    if module is not None:
        return module.gated_residual_quantized(x, y, gate, shift, scale, eps)
    total, normed = reference(x.float(), y, gate, shift, scale, eps)
    return total.to(x.dtype), *quantize_rows(normed)


def _fake_quantized(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, y, gate, shift, scale)
    return _empty(x)[0], *empty_codes(x)


_op_quantized = register(
    "gated_residual_quantized(Tensor x, Tensor y, Tensor? gate, Tensor shift, Tensor scale, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    _run_quantized,
    _fake_quantized,
)
