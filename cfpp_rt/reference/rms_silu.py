"""rms_silu_ in plain PyTorch: step by step as diffusers' Wan VAE has it, so that the bits are the library's."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_silu_(out: Tensor, x: Tensor, gamma: Tensor, bias: Tensor | None = None) -> None:
    """The contract of `cfpp_rt.ops.rms_silu.rms_silu_`; works on any device, in any layout and in float64 too.

    The norm is taken in float32 at least; like the library it rounds to the dtype of x after each step.
    """
    if bias is not None:
        x = x + bias.view(-1, 1, 1, 1)
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = F.normalize(x.to(wide), dim=1).to(x.dtype)
    normed.mul_(x.shape[1] ** 0.5).mul_(gamma.view(-1, 1, 1, 1))
    # In place first: a strided result may take other instructions for the exponential, and other last bits.
    out.copy_(F.silu(normed, inplace=True))
