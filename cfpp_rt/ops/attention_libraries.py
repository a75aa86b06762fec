"""Attention over token ranges by libraries that take one dense block of keys: the keys are gathered first.

Each backend takes q [B, H, S, D], keys and values [B, H, n, D] and the scale of the logits, and returns [B, H, S, D].
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cfpp_rt.ops.token_ranges import Range, TokenRanges

DenseAttention = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def _sdpa(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, keys, values, scale=scale)


def _cudnn(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _sdpa(q, keys, values, scale)


def _flash(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    flash = flash_module()
    assert flash is not None
    function = importlib.import_module(flash[1]).flash_attn_func
    result = function(*(t.transpose(1, 2) for t in (q, keys, values)), softmax_scale=scale)
    return (result[0] if isinstance(result, tuple) else result).transpose(1, 2)


# FlashAttention, the newest first. Version 3 is `flash_attn_interface` when built from its repository, and
# `fa3_fwd_interface` in the package fa3-fwd.
FLASH_MODULES = ((3, "flash_attn_interface"), (3, "fa3_fwd_interface"), (2, "flash_attn"))
LIBRARY_BACKENDS: dict[str, DenseAttention] = {"sdpa": _sdpa, "cudnn": _cudnn, "flash": _flash}


@functools.cache
def flash_module() -> tuple[int, str] | None:
    """Return FlashAttention's version, 3 or 2, and its module; None where neither is installed."""
    return next((flash for flash in FLASH_MODULES if importlib.util.find_spec(flash[1]) is not None), None)


def _gather(tensor: Tensor, ranges: tuple[Range, ...]) -> Tensor:
    parts = [tensor[:, :, first:last] for first, last in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def attend_gathered(
    dense: DenseAttention, q: Tensor, k_cache: Tensor, v_cache: Tensor, ranges: TokenRanges, scale: float
) -> Tensor:
    """Compute block_attention by one dense call per group, and per row of the batch where ranges differ.

    ranges: known to the host. Returns [B, S, H * D].
    """
    if ranges.by_row:
        sizes = [len(part.device) for part in ranges.by_row]
        parts = zip(q.split(sizes), k_cache.split(sizes), v_cache.split(sizes), ranges.by_row, strict=True)
        return torch.cat([attend_gathered(dense, *part, scale) for part in parts])
    assert ranges.host is not None
    outputs = [
        dense(part, _gather(k_cache, visible), _gather(v_cache, visible), scale).transpose(1, 2)
        for part, visible in zip(q.chunk(len(ranges), dim=2), ranges.host, strict=True)
    ]
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)).flatten(2)
