"""adaln_modulate in plain PyTorch; arithmetic in float32, in float64 for float64 tensors."""

import torch
import torch.nn.functional as F
from torch import Tensor


def per_token(rows: Tensor, tokens: int) -> Tensor:
    """One row per frame, [B or 1, F, dim], to one row per token, [B or 1, tokens, dim] (a copy where F > 1)."""
    frames = rows.shape[1]
    return rows if frames == 1 else rows.repeat_interleave(tokens // frames, dim=1)


def adaln_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """The contract of `cfpp_rt.ops.adaln_modulate.adaln_modulate`; works on any device and in float64 too."""
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = F.layer_norm(x.to(wide), x.shape[-1:], eps=eps)
    shift, scale = (per_token(rows.to(wide), x.shape[1]) for rows in (shift, scale))
    return torch.addcmul(shift, normed, 1 + scale).to(x.dtype)
