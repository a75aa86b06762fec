"""Self-attention over the KV cache, with its camera branch where a model has one, and cross-attention to the text."""

import dataclasses
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfpp_rt.cache import KVCache, LayerCache
from cfpp_rt.config import ModelConfig
from cfpp_rt.device.transfer import to_device
from cfpp_rt.errors import InputError
from cfpp_rt.model.projections import Projections
from cfpp_rt.model.rope import RotaryTables, rotate
from cfpp_rt.ops.block_attention import block_attention
from cfpp_rt.ops.kv_update import kv_update_
from cfpp_rt.ops.token_ranges import TokenRanges

# Attention of a whole sequence, for training: queries, keys and values [B, H, S, D] to [B, H, S, D].
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
# Queries of a pass, [B, H, S, D] each: rotated ones, and those of the camera branch; None without cameras.
Queries = tuple[Tensor, Tensor | None]


@dataclasses.dataclass(frozen=True)
class CameraMetadata:
    """The cameras of one forward pass.

    projections: of its F latent frames.
    slots: int64 [F], on the device. The cache slot of each latent frame.
    """

    projections: Projections
    slots: Tensor


@dataclasses.dataclass(frozen=True)
class AttentionMetadata:
    """Positions of a forward pass in the cache: where it writes keys and values, and which ones its queries attend to.

    The tokens of a pass are G groups of equal size, one per block. Group g is written to the cache from token
    `write_index[:, g]` on, and its queries attend to the ranges of group g.

    write_index: int32 [B, G], on the cache's device. First token of each group in the cache.
    ranges: visible tokens of each group.
    rope_time: float32 [B, F, n_time, 2]; rope_rows, rope_columns: float32. Rotary tables, see `RotaryTables`.
    camera: None = the pass runs without the camera branch.
    """

    write_index: Tensor
    ranges: TokenRanges
    rope_time: Tensor
    rope_rows: Tensor
    rope_columns: Tensor
    camera: CameraMetadata | None = None

    @classmethod
    def build(
        cls,
        cache: KVCache,
        tables: RotaryTables,
        blocks: Sequence[range],
        visible: Sequence[list[int]],
        projections: Projections | None = None,
    ) -> "AttentionMetadata":
        """Build the metadata of a pass over `blocks`, whose slots the cache's ring has claimed already.

        blocks: latent frames of each group.
        visible: latent frames that the queries of each group attend to.
        projections: cameras of all latent frames of the pass; None = without the camera branch.
        """
        device, batch = cache.data.device, cache.data.shape[2]
        frames = [frame for block in blocks for frame in block]
        first_tokens = [cache.ring.slot(block.start) * cache.tokens_per_frame for block in blocks]
        camera = None
        if projections is not None:
            slots = torch.tensor([cache.ring.slot(frame) for frame in frames])
            camera = CameraMetadata(projections, to_device(slots, device))
        return cls(
            write_index=to_device(torch.tensor([first_tokens] * batch, dtype=torch.int32), device),
            ranges=cache.token_ranges(list(visible)),
            rope_time=tables.time(frames).expand(batch, -1, -1, -1),
            rope_rows=tables.rows,
            rope_columns=tables.columns,
            camera=camera,
        )


@dataclasses.dataclass(frozen=True)
class SequenceCamera:
    """The cameras of a whole sequence, for training.

    projections: of its F latent frames.
    attend: attention of the camera branch.
    """

    projections: Projections
    attend: Attend


def per_frame(x: Tensor, matrices: Tensor) -> Tensor:
    """Multiply every group of 4 channels of x [B, S, dim], as a row, by its frame's matrix [B, F, 4, 4], in float32."""
    rows = x.float().reshape(x.shape[0], matrices.shape[1], -1, 4)
    return (rows @ matrices).reshape(x.shape).to(x.dtype)


class SelfAttention(nn.Module):
    """Attention with rotary positions; with cameras, o(rotary attention) + prope_o(projective attention).

    The camera branch (`cfpp_rt.core.camera`) takes the same queries, keys and values. With P of a token's own frame,
    groups of 4 channels become P^T q, P^-1 k and P^-1 v, and the result is multiplied by P of the query's frame.
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
        """Return queries, keys and values [B, S, dim] of x, before norm and rotation."""
        return self.q(x), self.k(x), self.v(x)

    def write(self, x: Tensor, cache: LayerCache, attn: AttentionMetadata) -> Queries:
        """Write keys and values of all tokens of x [B, S, dim] into the cache; return the queries, for `read`."""
        q, k, v = self.project(x)
        if cache.waits_for_scales:
            cache.set_scales(self.norm_k.weight, v)
        camera_q = None
        if attn.camera is not None:
            camera_q = self._write_camera(q, k, v, cache.camera, attn.camera)
        rotated = kv_update_(
            cache.keys,
            cache.values,
            q,
            k,
            v,
            self.norm_q.weight,
            self.norm_k.weight,
            attn.rope_time,
            attn.rope_rows,
            attn.rope_columns,
            attn.write_index,
            self.eps,
            *cache.scales,
        )
        return rotated, camera_q

    def read(self, queries: Queries, cache: LayerCache, attn: AttentionMetadata, num_outputs: int) -> Tensor:
        """Attend with the last `num_outputs` >= 1 groups of the queries, output projection included: [B, S', dim]."""
        q, camera_q = queries
        dropped = q.shape[2] - q.shape[2] * num_outputs // len(attn.ranges)
        ranges = attn.ranges.last(num_outputs)
        keys, values = cache.readable(ranges)
        y = self.o(self.attend_to(q[:, :, dropped:], keys, values, ranges))
        if camera_q is None or attn.camera is None or cache.camera is None:
            return y
        keys, values = cache.camera.readable(ranges)
        seen = self.attend_to(camera_q[:, :, dropped:], keys, values, ranges)
        matrices = attn.camera.projections.matrices
        return y + self._from_camera(seen, matrices[:, matrices.shape[1] * dropped // q.shape[2] :])

    def attend_to(self, q: Tensor, keys: Tensor, values: Tensor, ranges: TokenRanges) -> Tensor:
        """Attend with queries [B, H, S, D] to the ranges of a cache: [B, S, dim]."""
        return block_attention(q, keys, values, ranges)

    def forward_sequence(self, x: Tensor, rope: Tensor, attend: Attend, camera: SequenceCamera | None = None) -> Tensor:
        """Attend over a whole sequence x [B, S, dim] without a cache; differentiable.

        rope: [S, D / 2, 2], see `rotate`.
        """
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
        """Return P^T q, P^-1 k and P^-1 v as [B, H, S, D]; rows times P are P^T q.

        q, k: normalised, [B, S, dim]. v: [B, S, dim].
        """
        inverses = projections.inverses.mT
        turned = per_frame(q, projections.matrices), per_frame(k, inverses), per_frame(v, inverses)
        q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in turned)
        return q, k, v

    def _from_camera(self, seen: Tensor, matrices: Tensor) -> Tensor:
        """Return P times the result of projective attention [B, S, dim], output projection included."""
        if self.prope_o is None:
            raise InputError("cameras must not be given to a model without the camera branch")
        return self.prope_o(per_frame(seen, matrices.mT))

    def _write_camera(
        self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache | None, camera: CameraMetadata
    ) -> Tensor:
        """Write the branch's K and V into its cache, in place; returns its queries [B, H, S, D]."""
        if cache is None:
            raise InputError("cache must have memory for the camera branch where cameras are given: CacheShape.camera")
        _, heads, capacity, _ = cache.keys.shape
        q, k, v = self._to_camera(self.norm_q(q), self.norm_k(k), v, camera.projections, heads)
        frames = len(camera.slots)
        tokens = k.shape[2] // frames
        for stored, new in ((cache.keys, k), (cache.values, v)):
            by_frame = stored.unflatten(2, (capacity // tokens, tokens))
            by_frame.index_copy_(2, camera.slots, new.unflatten(2, (frames, tokens)))
        return q


class CrossAttention(nn.Module):
    """Attention to the text, whose keys and values are computed once per prompt."""

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
        """Return keys and values [B, H, text_len, D] of projected text [B, text_len, dim]."""
        return self._heads(self.norm_k(self.k(text))), self._heads(self.v(text))

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q = self._heads(self.norm_q(self.q(x)))
        return self.o(self.attend_to(q, keys, values).transpose(1, 2).flatten(2))

    def attend_to(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attend with queries [B, H, S, D] to keys and values of the text: [B, H, S, D]."""
        return F.scaled_dot_product_attention(q, keys, values)
