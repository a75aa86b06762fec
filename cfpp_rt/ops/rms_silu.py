"""rms_silu_: RMS norm over channels, then SiLU, written where the next convolution reads it, in one pass."""

import torch
from torch import Tensor

from cfpp_rt.errors import InputError
from cfpp_rt.ops._library import plain, register, wrong
from cfpp_rt.ops._triton import triton_kernels
from cfpp_rt.reference.rms_silu import rms_silu_ as reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def rms_silu_(out: Tensor, x: Tensor, gamma: Tensor, bias: Tensor | None = None) -> None:
    """Write silu(y / max(|y|, 1e-12) * sqrt(C) * gamma) into out, where y = x + bias; |y| is the Euclidean norm over
    the C channels.

    out, x: [B, C, T, H, W], float32, bfloat16 or float16 (float64: the reference serves it); they share no memory. On
    CUDA the channels of a pixel lie side by side, and pixels and frames follow one another without gaps
    (channels_last_3d, or frames cut out of it); elsewhere strides are free. gamma, bias: [C], contiguous.

    On CUDA arithmetic is float32 with one rounding at the end. On the CPU every step rounds to the dtype of x, and the
    bits are those of diffusers' Wan VAE. Has no gradient.

    Raises InputError naming the argument, what was wanted and what came. Source: WanRMS_norm and SiLU in the residual
    blocks of Wan2.1's VAE.
    """
    tensors = (out, x, gamma) if bias is None else (out, x, gamma, bias)
    if plain(tensors):
        _run(out, x, gamma, bias)
        return
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise InputError("rms_silu_: has no gradient, no argument may require one; use torch.no_grad()")
    _op(out, x, gamma, bias)


def _check(out: Tensor, x: Tensor, gamma: Tensor, bias: Tensor | None) -> None:
    if x.ndim != 5 or 0 in x.shape:
        raise wrong("rms_silu_", "x", "[B, C, T, H, W]", list(x.shape))
    if x.dtype not in _DTYPES:
        raise wrong("rms_silu_", "x", "torch.float32 or torch.bfloat16 or torch.float16 or torch.float64", x.dtype)
    for name, tensor, shape in (("out", out, x.shape), ("gamma", gamma, x.shape[1:2]), ("bias", bias, x.shape[1:2])):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise wrong("rms_silu_", name, str(list(shape)), list(tensor.shape))
        if tensor.dtype != x.dtype:
            raise wrong("rms_silu_", name, f"{x.dtype} like x", tensor.dtype)
        if tensor.device != x.device:
            raise wrong("rms_silu_", name, f"on {x.device} like x", tensor.device)
    if x.device.type == "cuda":
        for name, tensor in (("out", out), ("x", x)):
            if not tensor[:1].is_contiguous(memory_format=torch.channels_last_3d):
                raise wrong("rms_silu_", name, "channels-last on CUDA", f"strides {list(tensor.stride())}")
        for name, tensor in (("gamma", gamma), ("bias", gamma if bias is None else bias)):
            if not tensor.is_contiguous():
                raise wrong("rms_silu_", name, "contiguous", f"stride {tensor.stride(0)}")


def _run(out: Tensor, x: Tensor, gamma: Tensor, bias: Tensor | None) -> None:
    _check(out, x, gamma, bias)
    module = triton_kernels("rms_silu") if x.is_cuda and x.dtype != torch.float64 else None
    (reference if module is None else module.rms_silu_)(out, x, gamma, bias)


def _fake(out: Tensor, x: Tensor, gamma: Tensor, bias: Tensor | None) -> None:
    _check(out, x, gamma, bias)


_op = register("rms_silu_(Tensor(a!) out, Tensor x, Tensor gamma, Tensor? bias) -> ()", _run, _fake)
