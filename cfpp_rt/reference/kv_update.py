"""kv_update_ in plain PyTorch. Arithmetic is float32, for float64 tensors float64."""

import torch
from torch import Tensor

from cfpp_rt.errors import InputError


def _norm_rotate(x: Tensor, weight: Tensor, rotation: Tensor, heads: int, eps: float) -> Tensor:
    """RMS-normalise over all channels, then rotate adjacent pairs: [B, S, H * D] to [B, H, S, D], not rounded yet.

    rotation: [B, S, 1, D / 2, 2]. (cos, sin) of each pair.
    """
    normed = x.to(rotation.dtype)
    normed = normed * torch.rsqrt(normed.square().mean(-1, keepdim=True) + eps) * weight.to(rotation.dtype)
    first, second = normed.unflatten(2, (heads, -1, 2)).unbind(-1)
    cos, sin = rotation.unbind(-1)
    rotated = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return rotated.flatten(3).transpose(1, 2)


def to_float8(x: Tensor, scale: Tensor) -> Tensor:
    """Convert x [B, H, S, D] * (1 / scale [B, H]) to float8_e4m3fn.

    Values are rounded to nearest, ties to even, and saturated at 448; NaN becomes 0x7f.
    """
    scaled = x.to(torch.promote_types(x.dtype, torch.float32)) * scale.reciprocal()[:, :, None, None]
    # Older torch converts values that are too large to NaN, and keeps the sign of NaN.
    return scaled.clamp(-448, 448).masked_fill(scaled.isnan(), torch.nan).to(torch.float8_e4m3fn)


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
    """Compute `cfpp_rt.ops.kv_update.kv_update_`; works on any device and in float64 too."""
    batch, heads, capacity, _ = k_cache.shape
    tokens, groups = q.shape[1], write_index.shape[1]
    last = capacity - tokens // groups
    if write_index.device.type == "cpu" and not bool(((write_index >= 0) & (write_index <= last)).all()):
        raise InputError(f"kv_update_: write_index must be in 0..{last}, got {write_index.tolist()}")

    frames, rows, columns = rope_t.shape[1], rope_h.shape[0], rope_w.shape[0]
    grid = (batch, frames, rows, columns)
    rotation = torch.cat(
        [
            rope_t[:, :, None, None].expand(*grid, -1, 2),
            rope_h[:, None].expand(*grid, -1, 2),
            rope_w.expand(*grid, -1, 2),
        ],
        dim=-2,
    ).reshape(batch, tokens, 1, -1, 2)
    rotation = rotation.to(torch.float64 if q.dtype == torch.float64 else torch.float32)

    offsets = torch.arange(tokens // groups, device=q.device)
    slots = (write_index[:, :, None] + offsets).flatten(1)
    rows_of_batch = torch.arange(batch, device=q.device)[:, None]
    keys, values = _norm_rotate(k, k_norm, rotation, heads, eps), v.unflatten(2, (heads, -1)).transpose(1, 2)
    for name, cache, new, scale in (("k", k_cache, keys, k_scale), ("v", v_cache, values, v_scale)):
        if scale is None:
            stored = new.to(cache.dtype)
        else:
            if scale.device.type == "cpu" and not bool(((scale >= 2.0**-126) & (scale <= 2.0**126)).all()):
                raise InputError(f"kv_update_: {name}_scale must be in 2^-126..2^126, got {scale.tolist()}")
            stored = to_float8(new, scale)
        cache.transpose(1, 2)[rows_of_batch, slots] = stored.transpose(1, 2)
    return _norm_rotate(q, q_norm, rotation, heads, eps).to(q.dtype).contiguous()
