"""adaln_modulate: LayerNorm without weights, then one shift and scale per latent frame, in one pass over memory."""

import torch
from torch import Tensor

from cfpp_rt.ops._library import kernels, plain, register, wrong
from cfpp_rt.ops._triton import triton_kernels
from cfpp_rt.reference.adaln_modulate import adaln_modulate as reference
from cfpp_rt.reference.quantize_rows import empty_codes, quantize_rows

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def adaln_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift, [B, S, dim] contiguous, dtype of x.

    The norm is over the last dimension, without weights: (x - mean) / sqrt(variance + eps). Arithmetic is float32
    with one rounding at the end.

    x: [B, S, dim], last dimension contiguous, other strides free. float32, bfloat16 or float16 (float64: the reference
    serves it). shift, scale: [B or 1, F, dim] of the same dtype, F a divisor of S: frame f's rows serve the tokens
    f * S / F and on; last dimension contiguous, other strides free.

    Where gradients are enabled and an argument requires one, plain PyTorch computes the same, differentiably.
    Raises InputError naming the argument, what was wanted and what came. Source: adaptive layer norm of DiT (Peebles
    and Xie 2022, arXiv 2212.09748), as in Wan2.1's blocks and head.
    """
    tensors = (x, shift, scale)
    if plain(tensors):
        return _run(x, shift, scale, eps)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        _check(x, shift, scale)
        return reference(x, shift, scale, eps)
    return _op(x, shift, scale, eps)


def adaln_modulate_quantized(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`adaln_modulate` straight to float8, without rounding between: codes [B, S, dim] and scales [B, S, 1] of
    `quantize_rows`. Arguments as there; has no gradient and no compiled CPU kernel.
    """
    if plain((x, shift, scale)):
        return _run_quantized(x, shift, scale, eps)
    return _op_quantized(x, shift, scale, eps)


def check_tokens(op: str, x: Tensor) -> None:
    """x [B, S, dim] of a float dtype, rows contiguous, or InputError."""
    if x.ndim != 3:
        raise wrong(op, "x", "[B, S, dim]", list(x.shape))
    if x.dtype not in _DTYPES:
        raise wrong(op, "x", "torch.float32 or torch.bfloat16 or torch.float16 or torch.float64", x.dtype)
    check_like(op, "x", x, x)


def check_rows(op: str, name: str, rows: Tensor, x: Tensor, frames: int | None = None) -> None:
    """Modulation rows [B or 1, F, dim] for x [B, S, dim], F a divisor of S (or `frames`), or InputError."""
    batch, tokens, dim = x.shape
    fits = rows.ndim == 3 and rows.shape[0] in (1, batch) and rows.shape[2] == dim
    if not fits or rows.shape[1] < 1 or tokens % rows.shape[1] or frames not in (None, rows.shape[1]):
        wanted = f"F a divisor of S={tokens}" if frames is None else f"F={frames}"
        raise wrong(op, name, f"[B={batch} or 1, F, dim={dim}] with {wanted}", list(rows.shape))
    check_like(op, name, rows, x)


def check_like(op: str, name: str, tensor: Tensor, x: Tensor) -> None:
    """Dtype and device of x and contiguous in its last dimension, or InputError."""
    if tensor.dtype != x.dtype:
        raise wrong(op, name, f"{x.dtype} like x", tensor.dtype)
    if tensor.device != x.device:
        raise wrong(op, name, f"on {x.device} like x", tensor.device)
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise wrong(op, name, "contiguous in its last dimension", f"stride {tensor.stride(-1)}")


def _check(x: Tensor, shift: Tensor, scale: Tensor) -> None:
    check_tokens("adaln_modulate", x)
    check_rows("adaln_modulate", "shift", shift, x)
    check_rows("adaln_modulate", "scale", scale, x, shift.shape[1])


def _run(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    module = triton_kernels("adaln_modulate") if x.is_cuda else kernels("cpu")
    if module is None or x.is_cuda or x.dtype == torch.float64:  # the CPU kernel's binding checks by itself
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
