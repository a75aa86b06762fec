"""Linear layers as products of two 8-bit integer matrices on the CPU, every row of both with a scale of its own."""

import torch
from torch import Tensor, nn

from cfpp_rt.errors import InputError

_CHUNK = 2**18  # values quantised together: they stay in a core's cache from one step to the next
_OFFSET = 128  # oneDNN's fast product is of unsigned tokens and signed weights
# Scales are rounded to bfloat16, by 2^-9 of themselves at most: a code then still is within -127..127.
_LARGEST = 126.5
_SMALLEST = 2.0**-100


class Int8Linear(nn.Module):
    """x W^T + b in int8 by oneDNN: one scale per row of W, found here, and one per token, found as it comes.

    Takes tokens [B, S, K] and gives [B, S, N] in their dtype, float32 or bfloat16.
    """

    weight_scale: Tensor
    weight_zero: Tensor

    def __init__(self, linear: nn.Module):
        """linear: anything with a weight [N, K] and a bias [N]."""
        super().__init__()
        weight = linear.get_parameter("weight").detach().float()
        scale = weight.abs().amax(1).clamp(min=_SMALLEST) / 127
        codes = (weight / scale[:, None]).round().to(torch.int8)
        self.packed = torch.ops.onednn.qlinear_prepack(codes, None)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("weight_zero", torch.zeros(len(scale), dtype=torch.int64))
        self.bias = nn.Parameter(linear.get_parameter("bias").detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        codes, scales = quantize(x.flatten(0, -2))
        unscaled = (1.0, 0)  # of the result: a row's scale is not known to oneDNN
        y = torch.ops.onednn.qlinear_pointwise(
            codes,
            1.0,
            _OFFSET,
            self.packed,
            self.weight_scale,
            self.weight_zero,
            None,
            *unscaled,
            x.dtype,
            "none",
            [],
            "",
        )
        return torch.addcmul(self.bias, y, scales).unflatten(0, x.shape[:-1])


def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [M, K], about (codes - 128) * scales, to codes uint8 [M, K] and scales [M, 1] in the dtype of rows."""
    codes = torch.empty(rows.shape, dtype=torch.uint8)
    scales = rows.new_empty(len(rows), 1)
    step = max(1, _CHUNK // rows.shape[1])
    for first in range(0, len(rows), step):
        part, own = rows[first : first + step], scales[first : first + step]
        largest = part.abs().amax(-1, keepdim=True).float().clamp(min=_SMALLEST)
        own.copy_((largest / _LARGEST).bfloat16())
        # Cutting off after + 1/2 is rounding, since what is cut is positive.
        codes[first : first + step] = (part * own.float().reciprocal()).add_(_OFFSET + 0.5)
    return codes, scales


def require_int8(device: torch.device, dtype: torch.dtype) -> None:
    """InputError unless the product is there and fast: float32 or bfloat16 on a CPU with oneDNN and VNNI."""
    found = torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16) or not found:
        raise InputError(
            "int8 linears need a float32 or bfloat16 model on a CPU with VNNI and torch with oneDNN, got"
            f" {dtype} on {device}" + ("" if found or device.type != "cpu" else " without them")
        )
