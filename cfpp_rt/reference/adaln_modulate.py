"""adaln_modulate in plain PyTorch. Arithmetic is float32, for float64 tensors float64."""

import torch
import torch.nn.functional as F
from torch import Tensor


def per_token(rows: Tensor, tokens: int) -> Tensor:
    """Repeat one row per frame, [B or 1, F, dim], to one per token, [B or 1, tokens, dim]; no copy if F is 1."""
    frames = rows.shape[1]
    return rows if frames == 1 else rows.repeat_interleave(tokens // frames, dim=1)


def adaln_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Compute `cfpp_rt.ops.adaln_modulate.adaln_modulate`; works on any device and in float64 too."""
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    normed = F.layer_norm(x.to(compute_dtype), x.shape[-1:], eps=eps)
    shift, scale = (per_token(rows.to(compute_dtype), x.shape[1]) for rows in (shift, scale))
    return torch.addcmul(shift, normed, 1 + scale).to(x.dtype)
