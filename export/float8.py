"""The arithmetic of linear layers in 8 bits (e4m3) in the graphs, the same as in `cfpp_rt.speed.quantize_linears`.

Weights have a scale per output channel. Inputs have a scale per token, computed at run time, so nothing is calibrated:

    y = (e4m3(512 * x / size) / 512) @ (e4m3(w / scale) * scale) * size + bias
    size = max|x| * 512 / 448 of each token

e4m3() rounds to the nearest e4m3 number. 512 * x / size fills the range of e4m3, which ends at 448. Dividing by a power
of two is exact and keeps the products in the range of float16. In ONNX this is QuantizeLinear and DequantizeLinear with
one constant, 1 / 512, for all inputs: the form that TensorRT computes in 8 bits. Embeddings, the head and the text's
keys and values keep their dtype.
"""

import torch
from torch import Tensor

FLOAT8 = "float8_e4m3"
LINEARS = (
    *("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "self_attn.prope_o"),
    *("cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2"),
)
LARGEST = 448.0  # the largest value of e4m3
UNIT = 2.0**-9
FILL = 512 / LARGEST  # size of a token per max|x|
SMALLEST = 1e-12  # size of a token of zeros


def is_float8(name: str) -> bool:
    """Return True if the linear layer of this name, such as "blocks.3.ffn.0", is computed in 8 bits."""
    return name.startswith("blocks.") and name.split(".", 2)[2] in LINEARS


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes of weights [out, in], float8_e4m3fn [out, in], and their scales [out].

    Scales have the dtype of the weights, as ONNX needs for the product. They are rounded before the codes are computed.
    """
    wide = weight.detach().float()
    scale = (wide.abs().amax(dim=1) / LARGEST).to(weight.dtype)
    scale = scale.clamp_min(torch.finfo(weight.dtype).tiny)  # a channel of zeros
    codes = (wide / scale.float()[:, None]).clamp(-LARGEST, LARGEST)
    return codes.to(torch.float8_e4m3fn), scale
