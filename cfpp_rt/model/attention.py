"""Self-attention over the KV cache, and cross-attention to the text."""

import dataclasses
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from cfpp_rt.cache import LayerCache
from cfpp_rt.config import ModelConfig
from cfpp_rt.model.rope import rotate
from cfpp_rt.ops.block_attention import block_attention
from cfpp_rt.ops.kv_update import kv_update_
from cfpp_rt.ops.token_ranges import TokenRanges

# Attention of a whole sequence, for training: queries, keys and values [B, H, S, D] to [B, H, S, D].
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class CachePass:
    """Where one pass writes its keys and values, and what each of its groups of queries sees.

    The tokens of a pass are G equal groups (blocks of frames); group g is written to the cache from token
    `write_index[:, g]` on and attends to `ranges.host[g]`. write_index: int32 [B, G], on the cache's device.
    rope_time: float32 [B, F, n_time, 2]; rope_rows, rope_columns: float32, as in `RotaryTables`.
    """

    write_index: Tensor
    ranges: TokenRanges
    rope_time: Tensor
    rope_rows: Tensor
    rope_columns: Tensor


class SelfAttention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        dim = config.dim
        self.eps = config.eps
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q = nn.RMSNorm(dim, eps=config.eps)
        self.norm_k = nn.RMSNorm(dim, eps=config.eps)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, S, dim] of x, before norm and rotation."""
        return self.q(x), self.k(x), self.v(x)

    def write(self, x: Tensor, cache: LayerCache, cached: CachePass) -> Tensor:
        """Write K and V of all tokens of x [B, S, dim] into the cache; returns the rotated queries [B, H, S, D]."""
        q, k, v = self.project(x)
        if cache.waits_for_scales:
            cache.set_scales(self.norm_k.weight, v)
        return kv_update_(
            cache.keys,
            cache.values,
            q,
            k,
            v,
            self.norm_q.weight,
            self.norm_k.weight,
            cached.rope_time,
            cached.rope_rows,
            cached.rope_columns,
            cached.write_index,
            self.eps,
            *cache.scales,
        )

    def read(self, q: Tensor, cache: LayerCache, cached: CachePass, groups: int) -> Tensor:
        """Attention of the last `groups` >= 1 groups of q [B, H, S, D], output projection included: [B, S', dim]."""
        dropped = q.shape[2] - q.shape[2] * groups // len(cached.ranges)
        ranges = cached.ranges.last(groups)
        keys, values = cache.readable(ranges)
        return self.o(block_attention(q[:, :, dropped:], keys, values, ranges))

    def masked(self, x: Tensor, rope: Tensor, attend: Attend) -> Tensor:
        """The same without a cache, differentiable: x [B, S, dim] to [B, S, dim]. rope: [S, D / 2, 2], as `rotate`."""
        q, k, v = self.project(x)
        q, k, v = (t.unflatten(2, (-1, 2 * rope.shape[1])) for t in (self.norm_q(q), self.norm_k(k), v))
        q, k = (rotate(t, rope[:, None]).to(v.dtype) for t in (q, k))
        return self.o(attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        dim = config.dim
        self.num_heads = config.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q = nn.RMSNorm(dim, eps=config.eps)
        self.norm_k = nn.RMSNorm(dim, eps=config.eps)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def project_text(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, text_len, D] of projected text [B, text_len, dim]; once per prompt and layer."""
        return self._heads(self.norm_k(self.k(text))), self._heads(self.v(text))

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q = self._heads(self.norm_q(self.q(x)))
        return self.o(F.scaled_dot_product_attention(q, keys, values).transpose(1, 2).flatten(2))
