"""quantize_rows in plain PyTorch. Arithmetic is float32."""

import torch
import torch.nn.functional as F
from torch import Tensor

FLOAT8_MAX = 448.0  # largest number of float8_e4m3fn
SMALLEST = 2.0**-100  # lower bound of the largest value of a row, so that 448 / largest stays finite


def quantize_rows(x: Tensor, gelu: bool = False) -> tuple[Tensor, Tensor]:
    """Compute `cfpp_rt.ops.quantize_rows.quantize_rows`; works on any device."""
    values = x.float().contiguous()
    if gelu:
        values = F.gelu(values, approximate="tanh")
    largest = values.abs().amax(-1, keepdim=True).clamp(min=SMALLEST)
    return (values * (FLOAT8_MAX / largest)).to(torch.float8_e4m3fn), largest / FLOAT8_MAX


def empty_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Allocate the codes and scales of x [B, S, dim]."""
    codes = torch.empty_like(x, dtype=torch.float8_e4m3fn, memory_format=torch.contiguous_format)
    return codes, x.new_empty((*x.shape[:2], 1), dtype=torch.float32)
