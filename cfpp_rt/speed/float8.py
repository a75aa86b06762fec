"""Linear layers as products of two float8 matrices, with one scale per row of both."""

import torch
from torch import Tensor, nn

from cfpp_rt.errors import InputError
from cfpp_rt.ops.quantize_rows import quantize_rows

Quantized = tuple[Tensor, Tensor]  # codes [B, S, K] and scales [B, S, 1], see `quantize_rows`


class Float8Linear(nn.Module):
    """x W^T + b in float8_e4m3fn, with one scale per row of W, computed once, and one per token, computed per call.

    The input is tokens [B, S, K], or codes and scales if a norm has quantised them already. The output is [B, S, N] in
    the dtype of the bias.
    """

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, linear: nn.Module, *, gelu: bool = False, emulated: bool = False):
        """Quantise the weight of a linear layer.

        linear: a module with a weight [N, K] and a bias [N]. N and K must be multiples of 16 unless emulated.
        gelu: apply GELU, tanh form, to the tokens first.
        emulated: multiply the same codes and scales in float32, on any device. The result differs from that of a GPU
            only in the rounding of sums.

        Raises InputError if N or K is not a multiple of 16.
        """
        super().__init__()
        weight = linear.get_parameter("weight")
        if not emulated and (weight.shape[0] % 16 or weight.shape[1] % 16):
            raise InputError(f"float8 linears: weight must be of multiples of 16, got {list(weight.shape)}")
        codes, scales = quantize_rows(weight.detach()[None])
        self.gelu, self.emulated = gelu, emulated
        self.register_buffer("weight", codes[0].float() if emulated else codes[0])  # [N, K]
        self.register_buffer("weight_scale", scales[0].mT.contiguous())  # float32 [1, N]
        self.bias = nn.Parameter(linear.get_parameter("bias").detach(), requires_grad=False)

    def forward(self, x: Tensor | Quantized) -> Tensor:
        codes, scales = quantize_rows(x, self.gelu) if isinstance(x, Tensor) else x
        if self.emulated:
            y = (codes.float() @ self.weight.mT) * scales * self.weight_scale + self.bias.float()
            return y.to(self.bias.dtype)
        y = torch._scaled_mm(
            codes.flatten(0, 1),
            self.weight.t(),
            scale_a=scales.flatten(0, 1),
            scale_b=self.weight_scale,
            bias=self.bias,
            out_dtype=self.bias.dtype,
            use_fast_accum=True,
        )
        return y.unflatten(0, codes.shape[:2])


def require_float8(device: torch.device, dtype: torch.dtype) -> None:
    """Raise InputError unless float8 products exist: in bfloat16 on a GPU of capability 8.9 (Ada, Hopper) or more."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if capability is None or capability < (8, 9) or dtype != torch.bfloat16:
        where = device.type if capability is None else f"a GPU of capability {capability[0]}.{capability[1]}"
        raise InputError(
            f"float8_e4m3 linears need a bfloat16 model on a GPU of capability 8.9 or more, got {dtype} on {where}"
        )
