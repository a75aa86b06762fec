"""Optional steps on a built model that make it faster. The model runs without any of them.

All compute the same but `quantize_linears`, which is approximate.
"""

from cfpp_rt.speed.fuse import fuse_gelu as fuse_gelu
from cfpp_rt.speed.fuse import fuse_qkv as fuse_qkv
from cfpp_rt.speed.fuse import has_fused_gelu as has_fused_gelu
from cfpp_rt.speed.graph import Graphs as Graphs
from cfpp_rt.speed.quantize import quantize_linears as quantize_linears
