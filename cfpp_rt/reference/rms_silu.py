"""rms_silu_ in plain PyTorch: the steps of the Wan VAE of diffusers 0.42, so that the bits are equal."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_silu_(out: Tensor, x: Tensor, gamma: Tensor, bias: Tensor | None = None) -> None:
    """Compute `cfpp_rt.ops.rms_silu.rms_silu_`; works on any device, in any layout and in float64 too.

    The norm is computed in float32 or wider; like diffusers, every step rounds to the dtype of x.
    """
    if bias is not None:
        x = x + bias.view(-1, 1, 1, 1)
    norm_dtype = torch.promote_types(x.dtype, torch.float32)
    normed = F.normalize(x.to(norm_dtype), dim=1).to(x.dtype)
    normed.mul_(x.shape[1] ** 0.5).mul_(gamma.view(-1, 1, 1, 1))
    # In place first: for a strided result torch may use other instructions for the exponential, with other last bits.
    out.copy_(F.silu(normed, inplace=True))
