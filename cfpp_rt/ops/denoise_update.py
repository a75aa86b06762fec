"""denoise_update: the clean estimate and the input of the next step from a velocity, in one pass over memory."""

import torch
from torch import Tensor

from cfpp_rt.errors import InputError
from cfpp_rt.ops._checks import argument_error
from cfpp_rt.ops._library import can_bypass_dispatcher, compiled_module, register
from cfpp_rt.ops._triton import triton_kernels
from cfpp_rt.reference.denoise_update import denoise_update as reference

_VELOCITY_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def denoise_update(
    x: Tensor, velocity: Tensor, sigma: Tensor, noise: Tensor | None, next_sigma: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return x0 = x - sigma * velocity and x_next = (1 - next_sigma) * x0 + next_sigma * noise, float32 like x.

    x: float32 [B, F, ...]; copied if not contiguous. (float64: the reference runs, all in float64 but the velocity.)
    velocity: float32, bfloat16 or float16, shape of x; copied if not contiguous.
    sigma: float32 [B or 1, F]. Noise level of x in 0..1, one per frame, on the device of x, so that one captured CUDA
        graph serves every step.
    noise: like x. None after the last step: next_sigma is then not read, and x_next is x0 itself.
    next_sigma: like sigma. Noise level of x_next.

    If gradients are enabled and an argument requires one, the reference computes the same, differentiably.
    Raises InputError naming the argument, what was wanted and what came. Source: see `cfpp_rt.core.schedule`.
    """
    tensors = (x, velocity, sigma) if noise is None else (x, velocity, sigma, noise)
    if can_bypass_dispatcher(tensors):
        clean, next_input = _run(x, velocity, sigma, noise, next_sigma)
    elif torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        _check(x, velocity, sigma, noise, next_sigma)
        clean, next_input = reference(x, velocity, sigma, noise, next_sigma)
    else:
        clean, next_input = _op(x, velocity, sigma, noise, next_sigma)
    return (clean, clean) if noise is None else (clean, next_input)


def _wrong(name: str, wanted: str, got: object) -> InputError:
    return argument_error("denoise_update", name, wanted, got)


def _check(x: Tensor, velocity: Tensor, sigma: Tensor, noise: Tensor | None, next_sigma: Tensor | None) -> None:
    if x.ndim < 3:
        raise _wrong("x", "[B, F, ...]", list(x.shape))
    if x.dtype not in (torch.float32, torch.float64):
        raise _wrong("x", "torch.float32", x.dtype)
    if velocity.dtype not in (*_VELOCITY_DTYPES, x.dtype):
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
    module = triton_kernels("denoise_update") if x.is_cuda else compiled_module("cpu")
    if module is None or x.is_cuda or x.dtype == torch.float64:  # the binding of the CPU kernel checks by itself
        _check(x, velocity, sigma, noise, next_sigma)
    if module is None or x.dtype == torch.float64:
        return reference(x, velocity, sigma, noise, next_sigma)
    x, velocity, noise = x.contiguous(), velocity.contiguous(), None if noise is None else noise.contiguous()
    if x.is_cuda:
        return module.denoise_update(x, velocity, sigma, noise, next_sigma)
    clean, next_input = _empty(x, noise)
    module.denoise_update(clean, next_input, x, velocity, sigma, noise, next_sigma, torch.get_num_threads())
    return clean, next_input


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
