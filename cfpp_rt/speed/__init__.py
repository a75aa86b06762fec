"""Optional in-place optimisations of the layers of a loaded model.

`fuse_qkv` and `fuse_gelu` change results only by rounding; `quantize_linears` is approximate. None is required.
"""

from cfpp_rt.speed.fuse import fuse_gelu as fuse_gelu
from cfpp_rt.speed.fuse import fuse_qkv as fuse_qkv
from cfpp_rt.speed.fuse import has_fused_gelu as has_fused_gelu
from cfpp_rt.speed.quantize import quantize_linears as quantize_linears
