"""One transformer block: modulated self-attention, cross-attention to the text, modulated feed-forward."""

import torch
from torch import Tensor, nn

from cfpp_rt.config import ModelConfig
from cfpp_rt.model.attention import CachePass, CrossAttention, SelfAttention


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift, with x [B, S, dim] and one row of shift and scale per frame, [B, F, 1, dim]."""
    frames = x.unflatten(1, (shift.shape[1], -1))
    return torch.addcmul(shift, frames, 1 + scale).flatten(1, 2)


def add_gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate * y, with x and y [B, S, dim] and one row of gate per frame, [B, F, 1, dim]."""
    frames = gate.shape[1]
    return torch.addcmul(x.unflatten(1, (frames, -1)), y.unflatten(1, (frames, -1)), gate).flatten(1, 2)


class TransformerBlock(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=config.eps, elementwise_affine=False)
        self.self_attn = SelfAttention(config)
        self.norm3 = nn.LayerNorm(config.dim, eps=config.eps)
        self.cross_attn = CrossAttention(config)
        self.norm2 = nn.LayerNorm(config.dim, eps=config.eps, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, config.dim)
        )
        self.modulation = nn.Parameter(torch.empty(1, 6, config.dim))

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        text: tuple[Tensor, Tensor],
        cache: tuple[Tensor, Tensor],
        cached: CachePass,
        groups: int,
    ) -> Tensor:
        """Tokens x [B, S, dim] to tokens of their last `groups` groups; keys and values of all are written.

        time: [B, F, 6, dim], this block's modulation plus the timestep's: shift, scale, gate for attention, then for
        the feed-forward. text: keys and values [B, H, text_len, D]. cache: keys and values [B, H, capacity, D].
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = time.unsqueeze(3).unbind(2)
        total = len(cached.ranges)
        q = self.self_attn.write(modulate(self.norm1(x), shift1, scale1), *cache, cached)
        if groups == 0:
            return x[:, :0]
        y = self.self_attn.read(q, *cache, cached, groups)
        if groups < total:  # the rest was needed for its keys and values only
            x = x[:, x.shape[1] - y.shape[1] :]
            kept = gate1.shape[1] * groups // total
            gate1, shift2, scale2, gate2 = (row[:, -kept:] for row in (gate1, shift2, scale2, gate2))
        x = add_gated(x, y, gate1)
        x = x + self.cross_attn(self.norm3(x), *text)
        return add_gated(x, self.ffn(modulate(self.norm2(x), shift2, scale2)), gate2)
