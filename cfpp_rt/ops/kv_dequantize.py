"""kv_dequantize_: the visible part of a float8 cache in a dtype that block_attention reads."""

from typing import Any

import torch
from torch import Tensor

from cfpp_rt.ops._checks import argument_error, require_tensor
from cfpp_rt.ops._library import can_bypass_dispatcher, compiled_module, register
from cfpp_rt.ops.token_ranges import TokenRanges
from cfpp_rt.reference.kv_dequantize import kv_dequantize_ as reference


def kv_dequantize_(
    k_out: Tensor,
    v_out: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    ranges: TokenRanges,
) -> None:
    """Write code * scale of every visible token of a float8 cache into k_out and v_out, at the same position.

    k_out, v_out: [B, H, capacity, D], written; float32, bfloat16 or float16 (float64: the reference runs).
    k_cache, v_cache: float8_e4m3fn [B, H, capacity, D]. D is even; of all four the last dimension is contiguous, other
        strides are free.
    k_scale, v_scale: float32 [B, H], contiguous.
    ranges: token ranges that each group of queries attends to. A token in the ranges of several groups is written once,
        a token in none is neither read nor written. The compiled kernels read ranges.device when they run.

    The product is rounded once and saturated at the largest number of the dtype. With a scale that is a power of two,
    as KVCache makes them, it is exact wherever that dtype can represent it. NaN stays NaN.
    Raises InputError naming the argument, what was wanted and what came.
    """
    tensors = (k_out, v_out, k_cache, v_cache, k_scale, v_scale, ranges.device)
    if can_bypass_dispatcher(tensors):
        _run(*tensors)
    else:
        _op(*tensors)


def _check(
    k_out: Tensor,
    v_out: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    ranges: Tensor,
) -> None:
    """Check the arguments like the binding of the kernel, but of the strides only the last, which must be 1."""
    op, dtype, device = "kv_dequantize_", k_out.dtype, k_out.device
    if k_cache.ndim != 4 or k_cache.shape[3] % 2:
        raise argument_error(op, "k_cache", "[B, H, capacity, even D]", list(k_cache.shape))
    shape = dict(zip(("B", "H", "capacity", "D"), k_cache.shape, strict=True))
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise argument_error(op, "k_out", "torch.float32, torch.bfloat16, torch.float16 or torch.float64", dtype)
    for name, tensor, wanted_dtype in (
        *(("k_out", k_out, dtype), ("v_out", v_out, dtype)),
        *(("k_cache", k_cache, torch.float8_e4m3fn), ("v_cache", v_cache, torch.float8_e4m3fn)),
    ):
        require_tensor(op, name, tensor, shape, wanted_dtype, device)
        if tensor.stride(-1) != 1:
            raise argument_error(op, name, "contiguous in its last dimension", f"stride {tensor.stride(-1)}")
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        require_tensor(op, name, scale, {"B": shape["B"], "H": shape["H"]}, torch.float32, device)
    if ranges.ndim != 4 or ranges.shape[0] != shape["B"] or ranges.shape[3] != 2:
        raise argument_error(op, "ranges", f"[B={shape['B']}, G, R, 2]", list(ranges.shape))
    if ranges.dtype != torch.int32:
        raise argument_error(op, "ranges", "torch.int32", ranges.dtype)


def _run(*arguments: Any) -> None:
    k_out = arguments[0]
    module = compiled_module("cuda" if k_out.is_cuda else "cpu")
    if module is None or k_out.dtype == torch.float64:
        _check(*arguments)
        reference(*arguments)
    else:
        module.kv_dequantize_(*arguments, torch.get_num_threads())


_op = register(
    "kv_dequantize_(Tensor(a!) k_out, Tensor(b!) v_out, Tensor k_cache, Tensor v_cache, Tensor k_scale, "
    "Tensor v_scale, Tensor ranges) -> ()",
    _run,
    _check,
)
