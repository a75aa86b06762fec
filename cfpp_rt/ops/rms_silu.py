"""rms_silu_: RMS norm over channels, then SiLU, written into the input buffer of the next convolution in one pass."""

import torch
from torch import Tensor

from cfpp_rt.errors import InputError
from cfpp_rt.ops._checks import TOKEN_DTYPES, argument_error, require_same_dtype_and_device
from cfpp_rt.ops._library import can_bypass_dispatcher, register
from cfpp_rt.ops._triton import triton_kernels
from cfpp_rt.reference.rms_silu import rms_silu_ as reference


def rms_silu_(out: Tensor, x: Tensor, gamma: Tensor, bias: Tensor | None = None) -> None:
    """Write silu(y / max(|y|, 1e-12) * sqrt(C) * gamma) into out, where y = x + bias.

    |y| is the Euclidean norm over the C channels. On CUDA arithmetic is float32 with one rounding at the end. On the
    CPU every step rounds to the dtype of x, and the bits are those of the Wan VAE of diffusers 0.42. Has no gradient.

    out, x: [B, C, T, H, W], float32, bfloat16 or float16 (float64: the reference runs); they share no memory. On CUDA
        they are channels_last_3d, or a range of frames of such a tensor; elsewhere strides are free.
    gamma, bias: [C], contiguous. bias may be None.

    Raises InputError naming the argument, what was wanted and what came. Source: WanRMS_norm and SiLU in the residual
    blocks of Wan2.1's VAE.
    """
    tensors = (out, x, gamma) if bias is None else (out, x, gamma, bias)
    if can_bypass_dispatcher(tensors):
        _run(out, x, gamma, bias)
        return
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise InputError("rms_silu_: has no gradient, no argument may require one; use torch.no_grad()")
    _op(out, x, gamma, bias)


def _check(out: Tensor, x: Tensor, gamma: Tensor, bias: Tensor | None) -> None:
    if x.ndim != 5 or 0 in x.shape:
        raise argument_error("rms_silu_", "x", "[B, C, T, H, W]", list(x.shape))
    if x.dtype not in TOKEN_DTYPES:
        raise argument_error(
            "rms_silu_", "x", "torch.float32 or torch.bfloat16 or torch.float16 or torch.float64", x.dtype
        )
    for name, tensor, shape in (("out", out, x.shape), ("gamma", gamma, x.shape[1:2]), ("bias", bias, x.shape[1:2])):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise argument_error("rms_silu_", name, str(list(shape)), list(tensor.shape))
        require_same_dtype_and_device("rms_silu_", name, tensor, x)
    if x.device.type == "cuda":
        for name, tensor in (("out", out), ("x", x)):
            if not tensor[:1].is_contiguous(memory_format=torch.channels_last_3d):
                raise argument_error("rms_silu_", name, "channels-last on CUDA", f"strides {list(tensor.stride())}")
        for name, tensor in (("gamma", gamma), ("bias", gamma if bias is None else bias)):
            if not tensor.is_contiguous():
                raise argument_error("rms_silu_", name, "contiguous", f"stride {tensor.stride(0)}")


def _run(out: Tensor, x: Tensor, gamma: Tensor, bias: Tensor | None) -> None:
    _check(out, x, gamma, bias)
    module = triton_kernels("rms_silu") if x.is_cuda and x.dtype != torch.float64 else None
    (reference if module is None else module.rms_silu_)(out, x, gamma, bias)


def _fake(out: Tensor, x: Tensor, gamma: Tensor, bias: Tensor | None) -> None:
    _check(out, x, gamma, bias)


_op = register("rms_silu_(Tensor(a!) out, Tensor x, Tensor gamma, Tensor? bias) -> ()", _run, _fake)
