"""kv_update_ in plain PyTorch; arithmetic in float32, in float64 for float64 tensors."""

import torch
from torch import Tensor

from cfpp_rt.errors import InputError


def _norm_rotate(x: Tensor, weight: Tensor, rotation: Tensor, heads: int, eps: float) -> Tensor:
    """RMS-norm over all channels, then the turn of adjacent pairs: [B, S, H * D] to [B, H, S, D].

    rotation: [B, S, 1, D / 2, 2] (cos, sin).
    """
    wide = x.to(rotation.dtype)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(rotation.dtype)
    first, second = wide.unflatten(2, (heads, -1, 2)).unbind(-1)
    cos, sin = rotation.unbind(-1)
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return turned.flatten(3).transpose(1, 2).to(x.dtype)


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
    """The contract of `cfpp_rt.ops.kv_update.kv_update_`; works on any device and in float64 too."""
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
    turned = _norm_rotate(k, k_norm, rotation, heads, eps)
    k_cache.transpose(1, 2)[rows_of_batch, slots] = turned.transpose(1, 2)
    v_cache.transpose(1, 2)[rows_of_batch, slots] = v.unflatten(2, (heads, -1))
    return _norm_rotate(q, q_norm, rotation, heads, eps).contiguous()
