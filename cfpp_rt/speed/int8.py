"""Linear layers as products of two 8-bit integer matrices on the CPU, with one scale per row of both."""

import torch
from torch import Tensor, nn

from cfpp_rt.errors import InputError

_CHUNK = 2**18  # values quantised together: few enough to stay in the cache of a core between the steps
_OFFSET = 128  # the fast product of oneDNN takes unsigned tokens and signed weights
# Rounding a scale to bfloat16 changes it by at most 2^-9 of its value: codes still stay within -127..127.
_LARGEST = 126.5
_SMALLEST = 2.0**-100


class Int8Linear(nn.Module):
    """x W^T + b in int8 by oneDNN, with one scale per row of W, computed once, and one per token, computed per call.

    The input is tokens [B, S, K] in float32 or bfloat16, the output [B, S, N] in the same dtype.
    """

    weight_scale: Tensor
    weight_zero: Tensor

    def __init__(self, linear: nn.Module):
        """Quantise the weight of a linear layer, a module with a weight [N, K] and a bias [N]."""
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
        unscaled = (1.0, 0)  # scale and zero point of the result; row scales are applied below
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
    """Quantise rows [M, K] to codes and scales, so that rows are about (codes - 128) * scales.

    Returns codes uint8 [M, K] and scales [M, 1] in the dtype of rows.
    """
    codes = torch.empty(rows.shape, dtype=torch.uint8)
    scales = rows.new_empty(len(rows), 1)
    step = max(1, _CHUNK // rows.shape[1])
    for first in range(0, len(rows), step):
        part, part_scales = rows[first : first + step], scales[first : first + step]
        largest = part.abs().amax(-1, keepdim=True).float().clamp(min=_SMALLEST)
        part_scales.copy_((largest / _LARGEST).bfloat16())
        # Truncation after adding 1/2 rounds to nearest, since the values are positive.
        codes[first : first + step] = (part * part_scales.float().reciprocal()).add_(_OFFSET + 0.5)
    return codes, scales


def require_int8(device: torch.device, dtype: torch.dtype) -> None:
    """Raise InputError unless int8 products exist and are fast: float32 or bfloat16 on a CPU with oneDNN and VNNI."""
    supported = torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16) or not supported:
        raise InputError(
            "int8 linears need a float32 or bfloat16 model on a CPU with VNNI and torch with oneDNN, got"
            f" {dtype} on {device}" + ("" if supported or device.type != "cpu" else " without them")
        )
