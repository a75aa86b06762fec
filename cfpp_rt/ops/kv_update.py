"""kv_update_: normalise and rotate queries and keys, write keys and values into the cache, in one pass over memory."""

from typing import Any

import torch
from torch import Tensor

from cfpp_rt.errors import InputError
from cfpp_rt.ops._library import DTYPE_CODES, LIBRARY, kernels
from cfpp_rt.reference.kv_update import kv_update_ as reference

LIBRARY.define(
    "kv_update_(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor q, Tensor k, Tensor v, Tensor q_norm, Tensor k_norm, "
    "Tensor rope_t, Tensor rope_h, Tensor rope_w, Tensor write_index, float eps) -> Tensor"
)


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
) -> Tensor:
    """Write the keys and values of S tokens into the cache in place; return the queries, [B, H, S, D] contiguous.

    q and k are RMS-normalised over all H * D channels, scaled by their weights, and rotated: of a head's D / 2
    adjacent pairs the first n_time turn by the token's frame, the next n_row by its row, the rest by its column. v is
    moved as it is. Arithmetic is float32 with one rounding at the end.

    k_cache, v_cache: [B, H, capacity, D], written. float32, bfloat16 or float16 (float64: the reference serves it).
    q, k, v: [B, S, H * D], last dimension contiguous, other strides free. q_norm, k_norm: [H * D].
    rope_t: float32 [B, F, n_time, 2] (cos, sin); rope_h: [rows, n_row, 2]; rope_w: [columns, n_col, 2];
    n_time + n_row + n_col = D / 2 and S = F * rows * columns, tokens frame-major, then row, then column.
    write_index: int32 [B, G], G divides S: group g of S / G tokens goes to cache tokens write_index[b, g] and on. Out
    of range it is an error on the CPU, before anything is written, and a trap on CUDA, where only the device knows it.

    Raises InputError naming the argument, what was wanted and what came. Source: Wan2.1's self-attention
    (RMSNorm over the model width, 3-D RoPE over frame, row and column).
    """
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise InputError("kv_update_: has no gradient, q, k and v must not require one; use torch.no_grad()")
    return torch.ops.cfpp_rt.kv_update_(
        k_cache, v_cache, q, k, v, q_norm, k_norm, rope_t, rope_h, rope_w, write_index, eps
    )


def _wrong(name: str, wanted: str, got: object) -> InputError:
    return InputError(f"kv_update_: {name} must be {wanted}, got {got}")


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
) -> tuple[int, ...]:
    """Raise InputError for what the kernels cannot take; return B, H, D, capacity, F, rows, columns, G."""
    if k_cache.ndim != 4 or k_cache.shape[3] % 2:
        raise _wrong("k_cache", "[B, H, capacity, even D]", list(k_cache.shape))
    batch, heads, capacity, head_dim = k_cache.shape
    if rope_t.ndim != 4 or rope_h.ndim != 3 or rope_w.ndim != 3:
        shapes = [list(t.shape) for t in (rope_t, rope_h, rope_w)]
        raise _wrong("rope_t, rope_h, rope_w", "[B, F, n, 2], [rows, n, 2], [columns, n, 2]", shapes)
    frames, rows, columns = rope_t.shape[1], rope_h.shape[0], rope_w.shape[0]
    pairs = rope_t.shape[2] + rope_h.shape[1] + rope_w.shape[1]
    if pairs != head_dim // 2 or any(t.shape[-1] != 2 for t in (rope_t, rope_h, rope_w)) or rope_t.shape[0] != batch:
        raise _wrong("rope_t, rope_h, rope_w", f"(cos, sin) of D/2={head_dim // 2} pairs for B={batch} rows", pairs)
    tokens = frames * rows * columns
    if tokens < 1:
        raise _wrong("S = F * rows * columns", "at least 1", tokens)
    wanted = (batch, tokens, heads * head_dim)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.shape != wanted:
            raise _wrong(name, f"[B={batch}, S={tokens}, H*D={heads * head_dim}]", list(tensor.shape))
        if tensor.stride(2) != 1:
            raise _wrong(name, "contiguous in its last dimension", f"stride {tensor.stride(2)}")
    if v_cache.shape != k_cache.shape:
        raise _wrong("v_cache", f"{list(k_cache.shape)} like k_cache", list(v_cache.shape))
    if k_cache.stride(3) != 1 or v_cache.stride(3) != 1:
        raise _wrong("k_cache, v_cache", "contiguous in their last dimension", "another stride")
    if q_norm.shape != wanted[2:] or k_norm.shape != wanted[2:]:
        raise _wrong("q_norm, k_norm", f"[H*D={heads * head_dim}]", [list(q_norm.shape), list(k_norm.shape)])
    groups = write_index.shape[1] if write_index.ndim == 2 else 0
    if groups < 1 or write_index.shape[0] != batch or tokens % groups:
        raise _wrong("write_index", f"[B={batch}, G] with G a divisor of S={tokens}", list(write_index.shape))
    if write_index.dtype != torch.int32:
        raise _wrong("write_index", "int32", write_index.dtype)
    for name, tensor in (("rope_t", rope_t), ("rope_h", rope_h), ("rope_w", rope_w)):
        if tensor.dtype != torch.float32:
            raise _wrong(name, "float32", tensor.dtype)
    dtype, device = q.dtype, q.device
    if dtype not in DTYPE_CODES and dtype != torch.float64:
        raise _wrong("q", "float32, bfloat16, float16 or float64", dtype)
    for name, tensor in (("k_cache", k_cache), ("v_cache", v_cache), ("k", k), ("v", v), ("q_norm", q_norm)):
        if tensor.dtype != dtype:
            raise _wrong(name, f"{dtype} like q", tensor.dtype)
    if k_norm.dtype != dtype:
        raise _wrong("k_norm", f"{dtype} like q", k_norm.dtype)
    for tensor in (k_cache, v_cache, k, v, q_norm, k_norm, rope_t, rope_h, rope_w, write_index):
        if tensor.device != device:
            raise _wrong("every tensor", f"on {device} like q", tensor.device)
    return batch, heads, head_dim, capacity, frames, rows, columns, groups


def _pointers(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for tensor in tensors)


def _run(
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
) -> Tensor:
    sizes = _check(k_cache, v_cache, q, k, v, q_norm, k_norm, rope_t, rope_h, rope_w, write_index)
    device_type = q.device.type
    module = kernels(device_type)
    if module is None or q.dtype == torch.float64:
        return reference(k_cache, v_cache, q, k, v, q_norm, k_norm, rope_t, rope_h, rope_w, write_index, eps)
    batch, heads, head_dim = sizes[:3]
    q_out = q.new_empty((batch, heads, q.shape[1], head_dim))
    rope_t = rope_t if rope_t.stride()[2:] == (2, 1) else rope_t.contiguous()
    # Held by name until the launch: a copy that dies earlier would free what its pointer names.
    rope_h, rope_w, q_norm, k_norm = (t.contiguous() for t in (rope_h, rope_w, q_norm, k_norm))
    pointers = _pointers(k_cache, v_cache, q_out, q, k, v, q_norm, k_norm, rope_t, rope_h, rope_w, write_index)
    layout = (
        *sizes,
        *(rope_t.shape[2], rope_h.shape[1], rope_w.shape[1]),
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *rope_t.stride()[:2],
        *write_index.stride(),
    )
    code = DTYPE_CODES[q.dtype]
    if device_type == "cuda":
        stream = torch.cuda.current_stream(q.device).cuda_stream
        module.kv_update_(code, pointers, layout, eps, q.device.index, stream)
    else:
        try:
            module.kv_update_(code, pointers, layout, eps, torch.get_num_threads())
        except ValueError as error:
            raise InputError(str(error)) from None
    return q_out


def _fake(*arguments: Any) -> Tensor:
    sizes = _check(*arguments[:-1])
    q = arguments[2]
    return q.new_empty((sizes[0], sizes[1], q.shape[1], sizes[2]))


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("kv_update_", _run, _key)
torch.library.register_fake("cfpp_rt::kv_update_", _fake, lib=LIBRARY)
