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
    capacity = k_cache.shape[2]
    compute_dtype, largest = torch.promote_types(k_out.dtype, torch.float32), torch.finfo(k_out.dtype).max
    for b, visible in enumerate(ranges.flatten(1, 2).tolist()):
        for first, last in visible:
            if (first, last) != (0, 0) and not 0 <= first < last <= capacity:
                raise InputError(
                    f"kv_dequantize_: ranges[{b}] must be (0, 0) or 0 <= first < last <= capacity {capacity}, "
                    f"got [{first}, {last})"
                )
    for b, visible in enumerate(ranges.flatten(1, 2).tolist()):
        for first, last in visible:
            for out, cache, scale in ((k_out, k_cache, k_scale), (v_out, v_cache, v_scale)):
                values = cache[b, :, first:last].to(compute_dtype) * scale[b, :, None, None].to(compute_dtype)
                out[b, :, first:last] = values.clamp(-largest, largest)
