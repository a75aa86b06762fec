"""gated_residual in plain PyTorch; arithmetic in float32, in float64 for float64 tensors."""

import torch
import torch.nn.functional as F
from torch import Tensor

from cfpp_rt.reference.adaln_modulate import per_token


def gated_residual(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The contract of `cfpp_rt.ops.gated_residual.gated_residual`; works on any device and in float64 too."""
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.to(wide) + (y.to(wide) if gate is None else per_token(gate.to(wide), x.shape[1]) * y.to(wide))
    normed = F.layer_norm(total, x.shape[-1:], eps=eps)
    factor = scale.to(wide) if scale.ndim == 1 else per_token(1 + scale.to(wide), x.shape[1])
    offset = shift.to(wide) if shift.ndim == 1 else per_token(shift.to(wide), x.shape[1])
    return total.to(x.dtype), torch.addcmul(offset, normed, factor).to(x.dtype)
