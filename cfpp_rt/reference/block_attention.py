"""block_attention in plain PyTorch. Products are in the dtype of the tensors, softmax in float32 or float64."""

import torch
from torch import Tensor

from cfpp_rt.errors import InputError


def block_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, ranges: Tensor, scale: float) -> Tensor:
    """Compute the op `cfpp_rt::block_attention`; works on any device and in float64 too."""
    batch, heads, queries, head_dim = q.shape
    groups = ranges.shape[1]
    softmax_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    check_ranges(ranges.tolist(), k_cache.shape[2])
    out = q.new_empty((batch, queries, heads, head_dim))
    for row, per_group in enumerate(ranges.tolist()):
        for group, visible in enumerate(per_group):
            tokens = torch.cat([torch.arange(first, last, device=q.device) for first, last in visible])
            keys, values = k_cache[row, :, tokens], v_cache[row, :, tokens]
            part = slice(group * queries // groups, (group + 1) * queries // groups)
            logits = (q[row, :, part] @ keys.mT).to(softmax_dtype) * scale
            out[row, part] = (logits.softmax(-1).to(q.dtype) @ values).transpose(0, 1)
    return out.flatten(2)


def check_ranges(ranges: list[list[list[list[int]]]], capacity: int) -> None:
    """Raise InputError unless the ranges of every group are in the cache and disjoint, and at least one is not (0, 0).

    ranges: [B, G, R, 2].
    """
    for b, row in enumerate(ranges):
        for g, visible in enumerate(row):
            end = 0
            for first, last in sorted(visible):
                if (first, last) != (0, 0) and not end <= first < last <= capacity:
                    raise InputError(
                        f"block_attention: ranges[{b}, {g}] must be disjoint [first, last) within 0..{capacity} "
                        f"and not empty, or (0, 0), got {visible}"
                    )
                end = max(end, last)
            if end == 0:
                raise InputError(f"block_attention: ranges[{b}, {g}] must contain at least one token, got {visible}")
