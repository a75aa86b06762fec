"""Optional steps on a built model that make it faster and compute the same. The model runs without any of them."""

from cfpp_rt.speed.fuse import fuse_gelu as fuse_gelu
from cfpp_rt.speed.fuse import fuse_qkv as fuse_qkv
from cfpp_rt.speed.fuse import has_fused_gelu as has_fused_gelu
from cfpp_rt.speed.graph import Graphs as Graphs
