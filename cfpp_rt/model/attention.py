"""Self-attention over the KV cache, with its camera branch where a model has one, and cross-attention to the text."""

import dataclasses
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from cfpp_rt.cache import LayerCache
from cfpp_rt.config import ModelConfig
from cfpp_rt.core.camera import Projections
from cfpp_rt.errors import InputError
from cfpp_rt.model.rope import rotate
from cfpp_rt.ops.block_attention import block_attention
from cfpp_rt.ops.kv_update import kv_update_
from cfpp_rt.ops.token_ranges import TokenRanges

# Attention of a whole sequence, for training: queries, keys and values [B, H, S, D] to [B, H, S, D].
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
# What a pass's keys are compared with, [B, H, S, D] each: rotated queries, and those of the camera branch if it runs.
Queries = tuple[Tensor, Tensor | None]


@dataclasses.dataclass(frozen=True)
class CameraPass:
    """Cameras of one pass. projections: of its F frames. slots: int64 [F], where their keys lie, on the device."""

    projections: Projections
    slots: Tensor


@dataclasses.dataclass(frozen=True)
class CachePass:
    """Where one pass writes its keys and values, and what each of its groups of queries sees.

    The tokens of a pass are G equal groups (blocks of frames); group g is written to the cache from token
    `write_index[:, g]` on and attends to the ranges of group g. write_index: int32 [B, G], on the cache's device.
    rope_time: float32 [B, F, n_time, 2]; rope_rows, rope_columns: float32, as in `RotaryTables`. camera: None = the
    camera branch is left out.
    """

    write_index: Tensor
    ranges: TokenRanges
    rope_time: Tensor
    rope_rows: Tensor
    rope_columns: Tensor
    camera: CameraPass | None = None


@dataclasses.dataclass(frozen=True)
class MaskedCamera:
    """Cameras of a whole sequence, for training. projections: of its F frames. attend: the camera branch's."""

    projections: Projections
    attend: Attend


def per_frame(x: Tensor, matrices: Tensor) -> Tensor:
    """Every group of 4 channels of x [B, S, dim], as a row, times its frame's matrix [B, F, 4, 4]; float32 inside."""
    rows = x.float().reshape(x.shape[0], matrices.shape[1], -1, 4)
    return (rows @ matrices).reshape(x.shape).to(x.dtype)


class SelfAttention(nn.Module):
    """Attention with rotary positions; with cameras, plus attention with projective ones: o(rope) + prope_o(camera).

    The camera branch (`cfpp_rt.core.camera`) takes the same queries, keys and values: with P of its own frame, groups
    of 4 channels become P^T q, P^-1 k and P^-1 v, and what is read is multiplied by P of the query's frame.
    """

    prope_o: nn.Linear | None

    def __init__(self, config: ModelConfig):
        super().__init__()
        dim = config.dim
        self.eps = config.eps
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q = nn.RMSNorm(dim, eps=config.eps)
        self.norm_k = nn.RMSNorm(dim, eps=config.eps)
        self.prope_o = nn.Linear(dim, dim) if config.camera else None

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, S, dim] of x, before norm and rotation."""
        return self.q(x), self.k(x), self.v(x)

    def write(self, x: Tensor, cache: LayerCache, cached: CachePass) -> Queries:
        """Write K and V of all tokens of x [B, S, dim] into the cache; returns the queries, for `read`."""
        q, k, v = self.project(x)
        if cache.waits_for_scales:
            cache.set_scales(self.norm_k.weight, v)
        camera_q = None
        if cached.camera is not None:
            camera_q = self._write_camera(q, k, v, cache.camera, cached.camera)
        rotated = kv_update_(
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
        return rotated, camera_q

    def read(self, queries: Queries, cache: LayerCache, cached: CachePass, groups: int) -> Tensor:
        """Attention of the last `groups` >= 1 groups of the queries, output projection included: [B, S', dim]."""
        q, camera_q = queries
        dropped = q.shape[2] - q.shape[2] * groups // len(cached.ranges)
        ranges = cached.ranges.last(groups)
        keys, values = cache.readable(ranges)
        y = self.o(self.attend_to(q[:, :, dropped:], keys, values, ranges))
        if camera_q is None or cached.camera is None or cache.camera is None:
            return y
        keys, values = cache.camera.readable(ranges)
        seen = self.attend_to(camera_q[:, :, dropped:], keys, values, ranges)
        matrices = cached.camera.projections.matrices
        return y + self._from_camera(seen, matrices[:, matrices.shape[1] * dropped // q.shape[2] :])

    def attend_to(self, q: Tensor, keys: Tensor, values: Tensor, ranges: TokenRanges) -> Tensor:
        """Queries [B, H, S, D] over what the ranges show of a cache: [B, S, dim]."""
        return block_attention(q, keys, values, ranges)

    def masked(self, x: Tensor, rope: Tensor, attend: Attend, camera: MaskedCamera | None = None) -> Tensor:
        """The same without a cache, differentiable: x [B, S, dim] to [B, S, dim]. rope: [S, D / 2, 2], as `rotate`."""
        q, k, v = self.project(x)
        q, k = self.norm_q(q), self.norm_k(k)
        heads = q.shape[2] // (2 * rope.shape[1])
        turned = [rotate(t.unflatten(2, (heads, -1)), rope[:, None]).to(v.dtype) for t in (q, k)]
        rotated_q, rotated_k, values = (t.transpose(1, 2) for t in (*turned, v.unflatten(2, (heads, -1))))
        y = self.o(attend(rotated_q, rotated_k, values).transpose(1, 2).flatten(2))
        if camera is None:
            return y
        seen = camera.attend(*self._to_camera(q, k, v, camera.projections, heads)).transpose(1, 2).flatten(2)
        return y + self._from_camera(seen, camera.projections.matrices)

    def _to_camera(
        self, q: Tensor, k: Tensor, v: Tensor, projections: Projections, heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """P^T q, P^-1 k, P^-1 v as [B, H, S, D], of normalised q and k and of v [B, S, dim]. Rows times P are P^T q."""
        inverses = projections.inverses.mT
        turned = per_frame(q, projections.matrices), per_frame(k, inverses), per_frame(v, inverses)
        q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in turned)
        return q, k, v

    def _from_camera(self, seen: Tensor, matrices: Tensor) -> Tensor:
        """What was read [B, S, dim], back from its world: P times it, output projection included."""
        if self.prope_o is None:
            raise InputError("cameras must not be given to a model without the camera branch")
        return self.prope_o(per_frame(seen, matrices.mT))

    def _write_camera(self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache | None, camera: CameraPass) -> Tensor:
        """Write the branch's K and V into its cache, in place; returns its queries [B, H, S, D]."""
        if cache is None:
            raise InputError("cache must have room for the camera branch where cameras are given: CacheShape.camera")
        _, heads, capacity, _ = cache.keys.shape
        q, k, v = self._to_camera(self.norm_q(q), self.norm_k(k), v, camera.projections, heads)
        frames = len(camera.slots)
        tokens = k.shape[2] // frames
        for stored, new in ((cache.keys, k), (cache.values, v)):
            by_frame = stored.unflatten(2, (capacity // tokens, tokens))
            by_frame.index_copy_(2, camera.slots, new.unflatten(2, (frames, tokens)))
        return q


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
        return self.o(self.attend_to(q, keys, values).transpose(1, 2).flatten(2))

    def attend_to(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Queries [B, H, S, D] over keys and values of the text: [B, H, S, D]."""
        return F.scaled_dot_product_attention(q, keys, values)
