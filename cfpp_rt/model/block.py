"""One transformer block: modulated self-attention, cross-attention to the text if any, modulated feed-forward."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cfpp_rt.cache import LayerCache
from cfpp_rt.config import ModelConfig
from cfpp_rt.model.attention import Attend, AttentionMetadata, CrossAttention, SelfAttention, SequenceCamera
from cfpp_rt.ops.adaln_modulate import adaln_modulate
from cfpp_rt.ops.gated_residual import gated_residual


def add_gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """Return x + gate * y, with x and y [B, S, dim] and one row of gate per latent frame, [B, F, dim]."""
    frames = gate.shape[1]
    x, y = (tokens.unflatten(1, (frames, -1)) for tokens in (x, y))
    return torch.addcmul(x, y, gate.unsqueeze(2)).flatten(1, 2)


class TransformerBlock(nn.Module):
    cross_attn: CrossAttention | None

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.eps = config.eps
        self.self_attn = SelfAttention(config)
        if config.text_len:
            self.norm3 = nn.LayerNorm(config.dim, eps=config.eps)
            self.cross_attn = CrossAttention(config)
        else:
            self.cross_attn = None
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, config.dim)
        )
        self.modulation = nn.Parameter(torch.empty(1, 6, config.dim))
        # `cfpp_rt.speed` replaces these by versions whose normalised tokens are in the dtype of its linear layers.
        self.modulate: Callable[..., Any] = adaln_modulate
        self.add_and_modulate: Callable[..., Any] = gated_residual

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        text: tuple[Tensor, Tensor] | None,
        cache: LayerCache,
        attn: AttentionMetadata,
        num_outputs: int,
    ) -> Tensor:
        """Run the block in a pass with a cache; keys and values of all tokens are written.

        x: [B, S, dim].
        time: [B or 1, F, 6, dim]. Modulation of this block plus that of the timestep: shift, scale and gate for
            attention, then for the feed-forward.
        text: keys and values [B, H, text_len, D]; None for a model without text.
        cache: of this layer.
        num_outputs: number of last groups (see `AttentionMetadata`) whose tokens are returned.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = time.unbind(2)
        total = len(attn.ranges)
        queries = self.self_attn.write(self.modulate(x, shift1, scale1, self.eps), cache, attn)
        if num_outputs == 0:
            return x[:, :0]
        y = self.self_attn.read(queries, cache, attn, num_outputs)
        if num_outputs < total:  # the rest was needed for its keys and values only
            x = x[:, x.shape[1] - y.shape[1] :]
            kept = gate1.shape[1] * num_outputs // total
            gate1, shift2, scale2, gate2 = (row[:, -kept:] for row in (gate1, shift2, scale2, gate2))
        return self.after_attention(x, y, gate1, shift2, scale2, gate2, text)

    def forward_sequence(
        self,
        x: Tensor,
        rows: Tensor,
        text: Tensor | None,
        rope: Tensor,
        attend: Attend,
        camera: SequenceCamera | None = None,
    ) -> Tensor:
        """Run the block over a whole sequence without a cache; differentiable.

        x: [B, S, dim]. rows: [B or 1, F, 6, dim], modulation of the timestep alone. text: projected text
        [B, text_len, dim]. rope: [S, D / 2, 2].
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + rows).unbind(2)
        y = self.self_attn.forward_sequence(adaln_modulate(x, shift1, scale1, self.eps), rope, attend, camera)
        projected = None if self.cross_attn is None or text is None else self.cross_attn.project_text(text)
        return self.after_attention(x, y, gate1, shift2, scale2, gate2, projected)

    def after_attention(
        self,
        x: Tensor,
        y: Tensor,
        gate1: Tensor,
        shift2: Tensor,
        scale2: Tensor,
        gate2: Tensor,
        text: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """Run the rest of the block on tokens x and the output y of self-attention; rows are [B or 1, F, dim]."""
        if self.cross_attn is None or text is None:
            x, normed = self.add_and_modulate(x, y, gate1, shift2, scale2, self.eps)
        else:
            x, normed = self.add_and_modulate(x, y, gate1, self.norm3.bias, self.norm3.weight, self.eps)
            x, normed = self.add_and_modulate(x, self.cross_attn(normed, *text), None, shift2, scale2, self.eps)
        return add_gated(x, self.ffn(normed), gate2)
