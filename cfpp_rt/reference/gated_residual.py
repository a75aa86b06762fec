"""gated_residual in plain PyTorch. Arithmetic is float32, for float64 tensors float64."""

import torch
import torch.nn.functional as F
from torch import Tensor

from cfpp_rt.reference.adaln_modulate import per_token


def gated_residual(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Compute `cfpp_rt.ops.gated_residual.gated_residual`; works on any device and in float64 too."""
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    total = x.to(compute_dtype) + (
        y.to(compute_dtype) if gate is None else per_token(gate.to(compute_dtype), x.shape[1]) * y.to(compute_dtype)
    )
    normed = F.layer_norm(total, x.shape[-1:], eps=eps)
    factor = scale.to(compute_dtype) if scale.ndim == 1 else per_token(1 + scale.to(compute_dtype), x.shape[1])
    offset = shift.to(compute_dtype) if shift.ndim == 1 else per_token(shift.to(compute_dtype), x.shape[1])
    return total.to(x.dtype), torch.addcmul(offset, normed, factor).to(x.dtype)
