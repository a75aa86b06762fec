"""A model whose attention is plain PyTorch in the model's dtype: what half precision is measured by.

The runtime's attention keeps scores and weights in float32. onnxruntime's on the CPU rounds them to the dtype, as the
two lines here do, and bit for bit as coarse; a student that attends sharply makes that several times the error.
"""

import copy

import torch
from torch import Tensor

from cfpp_rt.model.transformer import CausalWanTransformer
from cfpp_rt.ops.token_ranges import TokenRanges


def with_plain_attention(model: CausalWanTransformer) -> CausalWanTransformer:
    """A copy of the model with such attention."""
    model = copy.deepcopy(model)
    for block in model.blocks:
        block.self_attn.attend_to = _attention_to_ranges  # type: ignore[method-assign]
        if block.cross_attn is not None:
            block.cross_attn.attend_to = _attention  # type: ignore[method-assign]
    return model


def _attention(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """q [B, H, S, D] to [B, H, S, D]; every step rounded."""
    scores = (q @ keys.mT) * q.shape[-1] ** -0.5
    return scores.softmax(dim=-1) @ values


def _attention_to_ranges(q: Tensor, keys: Tensor, values: Tensor, ranges: TokenRanges) -> Tensor:
    assert ranges.host is not None  # it is on the CPU
    groups = []
    for rows, spans in zip(q.chunk(len(ranges), dim=2), ranges.host, strict=True):
        seen = [torch.cat([cache[:, :, first:last] for first, last in spans], dim=2) for cache in (keys, values)]
        groups.append(_attention(rows, *seen))
    return torch.cat(groups, dim=2).transpose(1, 2).flatten(2)
