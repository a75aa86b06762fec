"""What makes a built model faster, and what the model runs without: steps on its layers, and `Graphs` for its passes.

`fuse_qkv` and `fuse_gelu` compute the same to rounding, `Graphs` bit by bit; `quantize_linears` is approximate.
"""

from cfpp_rt.speed.fuse import fuse_gelu as fuse_gelu
from cfpp_rt.speed.fuse import fuse_qkv as fuse_qkv
from cfpp_rt.speed.fuse import has_fused_gelu as has_fused_gelu
from cfpp_rt.speed.graph import Graphs as Graphs
from cfpp_rt.speed.quantize import quantize_linears as quantize_linears
