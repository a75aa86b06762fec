"""denoise_update: from a velocity to the clean estimate and to the next step's input, in one pass over memory."""

import torch
from torch import Tensor

from cfpp_rt.errors import InputError
from cfpp_rt.ops._library import DTYPE_CODES, kernels, plain, register, wrong
from cfpp_rt.ops._triton import triton_kernels
from cfpp_rt.reference.denoise_update import denoise_update as reference


def denoise_update(
    x: Tensor, velocity: Tensor, sigma: Tensor, noise: Tensor | None, next_sigma: Tensor | None
) -> tuple[Tensor, Tensor]:
    """x0 = x - sigma * velocity and x_next = (1 - next_sigma) * x0 + next_sigma * noise, float32 like x.

    x, noise: float32 [B, F, ...]. velocity: of the same shape, float32, bfloat16 or float16. Where these are not
    contiguous they are copied. sigma, next_sigma: float32 [B or 1, F], noise levels in 0..1, one per frame, on the
    device of x: a captured graph serves every step. (x in float64: the reference serves it, all in float64 but the
    velocity.) Without noise, after the last step, next_sigma is not read and x_next is x0 itself.

    Where gradients are enabled and an argument requires one, plain PyTorch computes the same, differentiably.
    Raises InputError naming the argument, what was wanted and what came. Source: see `cfpp_rt.core.schedule`.
    """
    tensors = (x, velocity, sigma) if noise is None else (x, velocity, sigma, noise)
    if plain(tensors):
        clean, following = _run(x, velocity, sigma, noise, next_sigma)
    elif torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        _check(x, velocity, sigma, noise, next_sigma)
        clean, following = reference(x, velocity, sigma, noise, next_sigma)
    else:
        clean, following = _op(x, velocity, sigma, noise, next_sigma)
    return (clean, clean) if noise is None else (clean, following)


def _wrong(name: str, wanted: str, got: object) -> InputError:
    return wrong("denoise_update", name, wanted, got)


def _check(x: Tensor, velocity: Tensor, sigma: Tensor, noise: Tensor | None, next_sigma: Tensor | None) -> None:
    if x.ndim < 3:
        raise _wrong("x", "[B, F, ...]", list(x.shape))
    if x.dtype not in (torch.float32, torch.float64):
        raise _wrong("x", "torch.float32", x.dtype)
    if velocity.dtype not in (*DTYPE_CODES, x.dtype):
        raise _wrong("velocity", "torch.float32 or torch.bfloat16 or torch.float16", velocity.dtype)
    if noise is not None and next_sigma is None:
        raise _wrong("next_sigma", "a tensor where noise is given", None)
    for name, tensor in (("velocity", velocity), ("noise", noise)):
        if tensor is not None and tensor.shape != x.shape:
            raise _wrong(name, f"{list(x.shape)} like x", list(tensor.shape))
    for name, levels in (("sigma", sigma), ("next_sigma", None if noise is None else next_sigma)):
        if levels is None:
            continue
        if levels.ndim != 2 or levels.shape[0] not in (1, x.shape[0]) or levels.shape[1] != x.shape[1]:
            raise _wrong(name, f"[B={x.shape[0]} or 1, F={x.shape[1]}]", list(levels.shape))
        if levels.dtype != x.dtype:
            raise _wrong(name, f"{x.dtype}", levels.dtype)
    if noise is not None and noise.dtype != x.dtype:
        raise _wrong("noise", f"{x.dtype}", noise.dtype)
    for name, tensor in (("velocity", velocity), ("sigma", sigma), ("noise", noise), ("next_sigma", next_sigma)):
        if tensor is not None and tensor.device != x.device:
            raise _wrong(name, f"on {x.device} like x", tensor.device)


def _empty(x: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    clean = torch.empty_like(x, memory_format=torch.contiguous_format)
    return clean, x.new_empty(0) if noise is None else torch.empty_like(clean)


def _run(
    x: Tensor, velocity: Tensor, sigma: Tensor, noise: Tensor | None, next_sigma: Tensor | None
) -> tuple[Tensor, Tensor]:
    module = triton_kernels("denoise_update") if x.is_cuda else kernels("cpu")
    if module is None or x.is_cuda or x.dtype == torch.float64:  # the CPU kernel's binding checks by itself
        _check(x, velocity, sigma, noise, next_sigma)
    if module is None or x.dtype == torch.float64:
        return reference(x, velocity, sigma, noise, next_sigma)
    x, velocity, noise = x.contiguous(), velocity.contiguous(), None if noise is None else noise.contiguous()
    if x.is_cuda:
        return module.denoise_update(x, velocity, sigma, noise, next_sigma)
    clean, following = _empty(x, noise)
    module.denoise_update(clean, following, x, velocity, sigma, noise, next_sigma, torch.get_num_threads())
    return clean, following


def _fake(
    x: Tensor, velocity: Tensor, sigma: Tensor, noise: Tensor | None, next_sigma: Tensor | None
) -> tuple[Tensor, Tensor]:
    _check(x, velocity, sigma, noise, next_sigma)
    return _empty(x, noise)


_op = register(
    "denoise_update(Tensor x, Tensor velocity, Tensor sigma, Tensor? noise, Tensor? next_sigma) -> (Tensor, Tensor)",
    _run,
    _fake,
)
