"""kv_dequantize_ in plain PyTorch."""

import torch
from torch import Tensor

from cfpp_rt.errors import InputError


def kv_dequantize_(
    k_out: Tensor,
    v_out: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    ranges: Tensor,
) -> None:
    """Compute the op `cfpp_rt::kv_dequantize_`; works on any device, and into float64 too."""
    capacity_tokens = k_cache.shape[2]
    compute_dtype, largest = torch.promote_types(k_out.dtype, torch.float32), torch.finfo(k_out.dtype).max
    for b, visible in enumerate(ranges.flatten(1, 2).tolist()):
        for first, end in visible:
            if (first, end) != (0, 0) and not 0 <= first < end <= capacity_tokens:
                raise InputError(
                    f"kv_dequantize_: ranges[{b}] must be (0, 0) or 0 <= first < end <= capacity_tokens "
                    f"{capacity_tokens}, got [{first}, {end})"
                )
    for b, visible in enumerate(ranges.flatten(1, 2).tolist()):
        for first, end in visible:
            for out, cache, scale in ((k_out, k_cache, k_scale), (v_out, v_cache, v_scale)):
                values = cache[b, :, first:end].to(compute_dtype) * scale[b, :, None, None].to(compute_dtype)
                out[b, :, first:end] = values.clamp(-largest, largest)
