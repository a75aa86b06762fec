"""Fewer, larger matrix products: packed query, key and value projections, and GELU inside the product before it."""

import torch
from torch import Tensor, nn

from cfpp_rt.errors import InputError
from cfpp_rt.model.attention import SelfAttention
from cfpp_rt.model.transformer import CausalWanTransformer


class PackedSelfAttention(SelfAttention):
    """Self-attention whose queries, keys and values are chunks of one projection `qkv`."""

    def __init__(self, separate: SelfAttention):
        nn.Module.__init__(self)  # takes over the parts of `separate` instead of making its own
        self.eps = separate.eps
        self.norm_q, self.norm_k, self.o = separate.norm_q, separate.norm_k, separate.o
        self.prope_o = separate.prope_o
        linears = (separate.q, separate.k, separate.v)
        dim = separate.o.in_features
        with torch.device("meta"):  # its own weights would be random and thrown away
            self.qkv = nn.Linear(dim, 3 * dim)
        self.qkv.weight = nn.Parameter(torch.cat([linear.weight for linear in linears]), requires_grad=False)
        self.qkv.bias = nn.Parameter(torch.cat([linear.bias for linear in linears]), requires_grad=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return q, k, v


class GeluLinear(nn.Module):
    """GELU(x W^T + b), tanh form, in the epilogue of the product where cuBLASLt can; CUDA only."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = torch._addmm_activation(self.bias, x.flatten(0, -2), self.weight.t(), use_gelu=True)
        return rows.unflatten(0, x.shape[:-1])


def fuse_qkv(model: CausalWanTransformer) -> CausalWanTransformer:
    """Replace each self-attention's three projections by one of three times the width, in place; for inference.

    The result is the same to rounding, with two launches fewer per layer. `state_dict` names change from
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
    """Let each feed-forward's first product apply GELU itself, in place; state-dict names stay.

    Raises InputError off CUDA: there the fused product computes GELU's erf form, and the model was trained with tanh.
    """
    if model.device.type != "cuda":
        raise InputError(f"fuse_gelu: model must be on cuda, where the fused GELU is the tanh form, got {model.device}")
    for block in model.blocks:
        first = block.ffn[0]
        if isinstance(first, nn.Linear):  # else it is fused already
            block.ffn[0], block.ffn[1] = GeluLinear(first), nn.Identity()
    return model
