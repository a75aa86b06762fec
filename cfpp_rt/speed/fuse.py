"""Fusion of matrix products: packed query, key and value projections, and GELU in the epilogue of the product."""

import torch
from torch import Tensor, nn

from cfpp_rt.errors import InputError
from cfpp_rt.model.attention import SelfAttention
from cfpp_rt.model.transformer import CausalWanTransformer


class PackedSelfAttention(SelfAttention):
    """Self-attention whose queries, keys and values are chunks of one projection `qkv`."""

    def __init__(self, separate: SelfAttention):
        nn.Module.__init__(self)  # the parts of `separate` are used instead of new ones
        self.eps = separate.eps
        self.norm_q, self.norm_k, self.o = separate.norm_q, separate.norm_k, separate.o
        self.prope_o = separate.prope_o
        linears = (separate.q, separate.k, separate.v)
        dim = separate.o.in_features
        with torch.device("meta"):  # random weights would be thrown away
            self.qkv = nn.Linear(dim, 3 * dim)
        self.qkv.weight = nn.Parameter(torch.cat([linear.weight for linear in linears]), requires_grad=False)
        self.qkv.bias = nn.Parameter(torch.cat([linear.bias for linear in linears]), requires_grad=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute queries, keys and values, [B, S, dim] each."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return q, k, v


class GeluLinear(nn.Module):
    """GELU(x W^T + b), tanh form, computed in the epilogue of the product by cuBLASLt on CUDA and oneDNN on the CPU."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cuda:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "gelu", [], "tanh")
        rows = torch._addmm_activation(self.bias, x.flatten(0, -2), self.weight.t(), use_gelu=True)
        return rows.unflatten(0, x.shape[:-1])


def fuse_qkv(model: CausalWanTransformer) -> CausalWanTransformer:
    """Replace the three projections of each self-attention by one of three times the width, in place; for inference.

    Results differ only by rounding, with two launches fewer per layer. `state_dict` names change from
    `self_attn.{q,k,v}` to `self_attn.qkv`: load weights first. Raises InputError if the model is to be trained.
    """
    with torch.no_grad():
        for block in model.blocks:
            if block.self_attn.o.weight.requires_grad:
                raise InputError("fuse_qkv: model must not require gradients; call model.requires_grad_(False)")
            if not isinstance(block.self_attn, PackedSelfAttention):
                block.self_attn = PackedSelfAttention(block.self_attn)
    return model


def fuse_gelu(model: CausalWanTransformer) -> CausalWanTransformer:
    """Fuse GELU into the first product of each feed-forward, in place; for inference. `state_dict` names stay.

    Raises InputError if there is no such product for the tanh form that the model was trained with: on devices other
    than CUDA and CPU, and on the CPU without oneDNN or in dtypes other than float32 and bfloat16.
    """
    if not has_fused_gelu(model.device, model.dtype):
        raise InputError(
            "fuse_gelu: model must be on cuda, or on cpu in float32 or bfloat16 with oneDNN,"
            f" got {model.dtype} on {model.device}"
        )
    for block in model.blocks:
        first = block.ffn[0]
        if isinstance(first, nn.Linear):  # otherwise it is fused already
            block.ffn[0], block.ffn[1] = GeluLinear(first), nn.Identity()
    return model


def has_fused_gelu(device: torch.device, dtype: torch.dtype) -> bool:
    """Return True if `fuse_gelu` supports a model of this dtype on the device."""
    if device.type == "cpu":
        return torch.backends.mkldnn.is_available() and dtype in (torch.float32, torch.bfloat16)
    return device.type == "cuda"
