"""block_attention: softmax attention of one block of queries over token ranges of the KV cache."""

import functools
import os

import torch
from torch import Tensor

from cfpp_rt.errors import InputError
from cfpp_rt.ops._checks import argument_error, require_tensor
from cfpp_rt.ops._library import can_bypass_dispatcher, compiled_module, find_module, register
from cfpp_rt.ops.attention_choice import ATTENTION_BACKENDS, AttentionCall, choose_attention, kernel_supports
from cfpp_rt.ops.attention_libraries import FLASH_MODULES, LIBRARY_BACKENDS, attend_gathered, flash_module
from cfpp_rt.ops.token_ranges import TokenRanges
from cfpp_rt.reference.block_attention import block_attention as reference


def block_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, ranges: TokenRanges, scale: float | None = None
) -> Tensor:
    """Return softmax(scale * q k^T) v of every query over the token ranges of its group: [B, Sq, H * D].

    q: [B, H, Sq, D]. Queries, in G consecutive groups of equal size.
    k_cache, v_cache: [B, H, capacity_tokens, D] of the same dtype. Tokens outside the ranges of a group do not affect
        its output, whatever their values are.
    ranges: token ranges that each group attends to, in any order; G divides Sq. `TokenRanges.of` checks them.
    scale: factor of the logits; None = 1 / sqrt(D).

    The dtype is bfloat16, float16 or float32; logits and sums are float32. The last dimension of q and the caches is
    contiguous, other strides are free (on CUDA multiples of 16 bytes).

    `choose_attention` chooses the backend; CFPP_BACKEND overrides it. The compiled kernels read ranges.tensor when they
    run and are bit-reproducible; the libraries get the keys gathered by ranges.host_ranges. If the host does not know
    the ranges, the kernel runs regardless of the choice; see `why_not_kernel`.

    Raises InputError for arguments that do not fit, and if a gradient is required, because there is none.
    """
    if torch.is_grad_enabled() and (q.requires_grad or k_cache.requires_grad or v_cache.requires_grad):
        raise InputError("block_attention: has no gradient, q must not require one; use torch.no_grad()")
    if scale is None:
        scale = q.shape[-1] ** -0.5
    backend = _backend(q, ranges)
    if backend == "kernel":
        tensors = (q, k_cache, v_cache, ranges.tensor)
        return _run(*tensors, scale) if can_bypass_dispatcher(tensors) else _op(*tensors, scale)
    _check(q, k_cache, v_cache, ranges.tensor)
    return attend_gathered(LIBRARY_BACKENDS[backend], q, k_cache, v_cache, ranges, scale)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@functools.cache
def _forced() -> str:
    forced = os.environ.get("CFPP_BACKEND", "auto")
    if forced == "flash" and flash_module() is None:
        names = ", ".join(name for _, name in FLASH_MODULES)
        raise InputError(f"CFPP_BACKEND=flash cannot be met: none of {names} is installed")
    return forced


def _attention_call(q: Tensor, ranges: TokenRanges) -> AttentionCall:
    queries = q.shape[2] // len(ranges)
    return AttentionCall(q.device.type, _capability(q.device), q.dtype, q.shape[-1], queries, ranges.max_keys)


def why_not_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Return why the compiled kernel cannot run on a device, or None if it can.

    No other backend can attend to ranges that are known only to the device.
    """
    forced = _forced()
    if forced in LIBRARY_BACKENDS:
        return f"CFPP_BACKEND={forced} gathers keys by ranges that the host knows"
    if compiled_module(device.type) is None:
        return f"no attention kernel: {find_module(device.type)[1]}"
    call = AttentionCall(device.type, _capability(device), dtype, head_dim, 1, 1)
    return None if kernel_supports(call) else choose_attention(call)[1]


# The choice is cached per kind of call, because making it takes as long as the kernel of a small call.
_decided: dict[tuple[object, ...], str] = {}


def _backend(q: Tensor, ranges: TokenRanges) -> str:
    if ranges.host_ranges is None and not ranges.parts:
        if reason := why_not_kernel(q.device, q.dtype, q.shape[-1]):
            raise argument_error(
                "block_attention", "ranges", f"known to the host, since {reason}", "ranges known only to the device"
            )
        return "kernel"
    forced = _forced()
    if forced in ATTENTION_BACKENDS:
        return forced
    if torch.compiler.is_compiling():  # the op reads the ranges when it runs: one graph serves all frames
        return "kernel" if kernel_supports(_attention_call(q, ranges)) else "sdpa"
    key = (q.device, q.dtype, q.shape, len(ranges), ranges.max_keys)
    if (backend := _decided.get(key)) is None:
        device = q.device.type
        # The op itself runs its reference where that is requested or no kernel is built.
        runs_op = forced in ("reference", device) or compiled_module(device) is None
        backend = "kernel" if runs_op else choose_attention(_attention_call(q, ranges))[0]
        _decided[key] = backend
    return backend


def _check(q: Tensor, k_cache: Tensor, v_cache: Tensor, ranges: Tensor) -> None:
    """Check the arguments like the binding of the kernel."""
    op = "block_attention"
    if q.ndim != 4 or 0 in q.shape:
        raise argument_error(op, "q", "[B, H, Sq, D], none of them 0", list(q.shape))
    batch, heads, queries, head_dim = q.shape
    capacity_tokens = k_cache.shape[2] if k_cache.ndim == 4 else 0
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        shape = {"B": batch, "H": heads, "capacity_tokens": capacity_tokens, "D": head_dim}
        require_tensor(op, name, cache, shape, q.dtype, q.device)
    groups = ranges.shape[1] if ranges.ndim == 4 else 0
    if groups < 1 or ranges.shape[0] != batch or ranges.shape[3] != 2 or queries % groups:
        raise argument_error(op, "ranges", f"[B={batch}, G, R, 2] with G a divisor of Sq={queries}", list(ranges.shape))


def _run(q: Tensor, k_cache: Tensor, v_cache: Tensor, ranges: Tensor, scale: float) -> Tensor:
    module = compiled_module("cuda" if q.is_cuda else "cpu")
    if module is None or q.dtype is torch.float64:
        _check(q, k_cache, v_cache, ranges)
        return reference(q, k_cache, v_cache, ranges, scale)
    out = _fake(q, k_cache, v_cache, ranges, scale)
    if q.is_cuda:
        size = module.block_attention_workspace(q, k_cache, v_cache, ranges) // 4  # number of float32 partial results
        workspace = q.new_empty(size, dtype=torch.float32)
        module.block_attention(out, workspace, q, k_cache, v_cache, ranges, scale)
    else:
        module.block_attention(out, q, k_cache, v_cache, ranges, scale, torch.get_num_threads())
    return out


def _fake(q: Tensor, k_cache: Tensor, v_cache: Tensor, ranges: Tensor, scale: float) -> Tensor:
    if q.ndim != 4:
        raise argument_error("block_attention", "q", "[B, H, Sq, D]", list(q.shape))
    batch, heads, queries, head_dim = q.shape
    return q.new_empty(batch, queries, heads * head_dim)  # sizes in a tuple would take 50 % longer


def _meta(q: Tensor, k_cache: Tensor, v_cache: Tensor, ranges: Tensor, scale: float) -> Tensor:
    for name, tensor in (("k_cache", k_cache), ("v_cache", v_cache), ("ranges", ranges)):
        if tensor.device != q.device:
            raise argument_error("block_attention", name, f"on {q.device}", tensor.device)
    return _fake(q, k_cache, v_cache, ranges, scale)


_op = register(
    "block_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor ranges, float scale) -> Tensor", _run, _meta
)
