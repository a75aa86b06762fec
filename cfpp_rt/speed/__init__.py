"""Optional steps that make the layers of a loaded model faster, in place.

`fuse_qkv` and `fuse_gelu` compute the same to rounding; `quantize_linears` is approximate. A rollout needs none.
"""

from cfpp_rt.speed.fuse import fuse_gelu as fuse_gelu
from cfpp_rt.speed.fuse import fuse_qkv as fuse_qkv
from cfpp_rt.speed.fuse import has_fused_gelu as has_fused_gelu
from cfpp_rt.speed.quantize import quantize_linears as quantize_linears
