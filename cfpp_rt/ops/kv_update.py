"""kv_update_: normalise and rotate queries and keys, write keys and values into the cache, in one pass over memory."""

from typing import Any

import torch
from torch import Tensor

from cfpp_rt.errors import InputError
from cfpp_rt.ops._checks import argument_error, require_tensor
from cfpp_rt.ops._library import can_bypass_dispatcher, compiled_module, register
from cfpp_rt.reference.kv_update import kv_update_ as reference


def kv_update_(
    k_cache: Tensor,
    v_cache: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    rope_t: Tensor,
    rope_h: Tensor,
    rope_w: Tensor,
    write_index: Tensor,
    eps: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Write the keys and values of S tokens into the cache in place and return the queries.

    Queries and keys are RMS-normalised over all H * D channels, scaled by their weights and rotated: of the D / 2
    adjacent channel pairs of a head, the first n_time rotate with the frame of the token, the next n_row with its row
    and the rest with its column. Values are copied. Arithmetic is float32, with one rounding at the end.

    k_cache, v_cache: [B, H, capacity, D], written. float32, bfloat16 or float16 (float64: the reference runs).
    q, k, v: [B, S, H * D] of the same dtype, last dimension contiguous, other strides free.
    q_norm, k_norm: [H * D], contiguous. Weights of the norms.
    rope_t: float32 [B, F, n_time, 2]. (cos, sin) per frame; the table of one frame is contiguous.
    rope_h: float32 [rows, n_row, 2], contiguous. (cos, sin) per row.
    rope_w: float32 [columns, n_col, 2], contiguous. (cos, sin) per column. n_time + n_row + n_col = D / 2, and
        S = F * rows * columns: tokens are ordered by frame, then row, then column.
    write_index: int32 [B, G], G a divisor of S. Group g of S / G tokens is written to the cache tokens from
        write_index[b, g] on. A value out of range is an error on the CPU, before anything is written, and a trap on
        CUDA, where only the device knows it.
    eps: added to the mean square before the root.
    k_scale, v_scale: float32 [B, H], contiguous, in 2^-126..2^126. Given for caches in float8_e4m3fn and only for
        these. Such a cache stores x * (1 / scale) in float32, rounded once to nearest, ties to even, saturated at 448;
        NaN becomes 0x7f. A scale out of range is an error on the CPU, before anything is written; CUDA does not check.

    Returns the queries, [B, H, S, D], contiguous.
    Raises InputError naming the argument, what was wanted and what came. Source: Wan2.1's self-attention
    (RMSNorm over the model width, 3-D RoPE over frame, row and column).
    """
    tensors = (k_cache, v_cache, q, k, v, q_norm, k_norm, rope_t, rope_h, rope_w, write_index)
    if (
        can_bypass_dispatcher(tensors)
        and (k_scale is None or can_bypass_dispatcher((k_scale,)))
        and (v_scale is None or can_bypass_dispatcher((v_scale,)))
    ):
        return _run(*tensors, eps, k_scale, v_scale)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise InputError("kv_update_: has no gradient, q, k and v must not require one; use torch.no_grad()")
    return _op(*tensors, eps, k_scale, v_scale)


def _check(
    k_cache: Tensor,
    v_cache: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    rope_t: Tensor,
    rope_h: Tensor,
    rope_w: Tensor,
    write_index: Tensor,
    eps: float,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    """Check the arguments like the binding of the kernel, but of the strides only the last, which must be 1."""
    op, dtype, device = "kv_update_", q.dtype, q.device
    if k_cache.ndim != 4 or k_cache.shape[3] % 2:
        raise argument_error(op, "k_cache", "[B, H, capacity, even D]", list(k_cache.shape))
    batch, heads, capacity, head_dim = k_cache.shape
    if rope_t.ndim != 4 or rope_h.ndim != 3 or rope_w.ndim != 3:
        shapes = [list(t.shape) for t in (rope_t, rope_h, rope_w)]
        raise argument_error(op, "rope_t, rope_h, rope_w", "[B, F, n, 2], [rows, n, 2], [columns, n, 2]", shapes)
    frames, rows, columns = rope_t.shape[1], rope_h.shape[0], rope_w.shape[0]
    pairs = (rope_t.shape[2], rope_h.shape[1], rope_w.shape[1])
    if 2 * sum(pairs) != head_dim:
        raise argument_error(
            op, "rope_t, rope_h, rope_w", f"(cos, sin) of D/2={head_dim // 2} pairs together", sum(pairs)
        )
    tokens = frames * rows * columns
    if tokens < 1:
        raise argument_error(op, "S = F * rows * columns", "at least 1", tokens)
    groups = write_index.shape[1] if write_index.ndim == 2 else 0
    if groups < 1 or tokens % groups:
        raise argument_error(
            op, "write_index", f"[B={batch}, G] with G a divisor of S={tokens}", list(write_index.shape)
        )
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise argument_error(op, "q", "torch.float32, torch.bfloat16, torch.float16 or torch.float64", dtype)
    row = {"B": batch, "S": tokens, "H*D": heads * head_dim}
    cache = {"B": batch, "H": heads, "capacity": capacity, "D": head_dim}
    stored = dtype if k_scale is None and v_scale is None else torch.float8_e4m3fn
    if stored == dtype and torch.float8_e4m3fn in (k_cache.dtype, v_cache.dtype):
        raise argument_error(op, "k_scale and v_scale", "given for caches in torch.float8_e4m3fn", None)
    for name, tensor, shape, wanted_dtype in (
        *(("q", q, row, dtype), ("k", k, row, dtype), ("v", v, row, dtype)),
        *(("k_cache", k_cache, cache, stored), ("v_cache", v_cache, cache, stored)),
        *(("q_norm", q_norm, {"H*D": heads * head_dim}, dtype), ("k_norm", k_norm, {"H*D": heads * head_dim}, dtype)),
    ):
        require_tensor(op, name, tensor, shape, wanted_dtype, device)
        if tensor.stride(-1) != 1:
            raise argument_error(op, name, "contiguous in its last dimension", f"stride {tensor.stride(-1)}")
    require_tensor(op, "rope_t", rope_t, {"B": batch, "F": frames, "n": pairs[0], "2": 2}, torch.float32, device)
    require_tensor(op, "rope_h", rope_h, {"rows": rows, "n": pairs[1], "2": 2}, torch.float32, device)
    require_tensor(op, "rope_w", rope_w, {"columns": columns, "n": pairs[2], "2": 2}, torch.float32, device)
    require_tensor(op, "write_index", write_index, {"B": batch, "G": groups}, torch.int32, device)
    if stored != dtype:
        for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
            if scale is None:
                raise argument_error(op, name, "a tensor, as the other scale is", None)
            require_tensor(op, name, scale, {"B": batch, "H": heads}, torch.float32, device)


def _new_queries(k_cache: Tensor, q: Tensor) -> Tensor:
    if k_cache.ndim != 4 or q.ndim != 3:
        shapes = [list(k_cache.shape), list(q.shape)]
        raise argument_error("kv_update_", "k_cache, q", "[B, H, capacity, even D], [B, S, H*D]", shapes)
    batch, heads, _, head_dim = k_cache.shape
    return q.new_empty(batch, heads, q.shape[1], head_dim)  # sizes in a tuple would take 50 % longer


def _run(k_cache: Tensor, v_cache: Tensor, q: Tensor, *others: Any) -> Tensor:
    module = compiled_module("cuda" if q.is_cuda else "cpu")
    if module is None or q.dtype == torch.float64:
        _check(k_cache, v_cache, q, *others)
        return reference(k_cache, v_cache, q, *others)
    q_out = _new_queries(k_cache, q)
    module.kv_update_(q_out, k_cache, v_cache, q, *others, torch.get_num_threads())
    return q_out


def _fake(k_cache: Tensor, v_cache: Tensor, q: Tensor, *others: Any) -> Tensor:
    _check(k_cache, v_cache, q, *others)
    return _new_queries(k_cache, q)


# The scales have no default here, so that the dispatcher passes all arguments on.
_op = register(
    "kv_update_(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor q, Tensor k, Tensor v, Tensor q_norm, Tensor k_norm, "
    "Tensor rope_t, Tensor rope_h, Tensor rope_w, Tensor write_index, float eps, Tensor? k_scale, Tensor? v_scale) "
    "-> Tensor",
    _run,
    _fake,
)
