"""The inputs of one forward pass: built by a rollout, run alone or joined with those of other rollouts.

The tokens of a pass are those of one block or of two: with the fused refresh the clean pass of a finished block is
computed in the same pass as the first step of the next block.
"""

import dataclasses
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from cfpp_rt.cache import KVCache
from cfpp_rt.core.controls import Actions
from cfpp_rt.model.attention import AttentionMetadata
from cfpp_rt.model.projections import Projections
from cfpp_rt.model.transformer import CausalWanTransformer, LayerText, TimeEmbedding
from cfpp_rt.ops.token_ranges import TokenRanges

_MAX_TIME_EMBEDDINGS = 512  # a batch may combine more actions than are worth keeping


@dataclasses.dataclass(frozen=True)
class BlockInput:
    """One block's part of a forward pass.

    latents: float32 [B, n, C, h, w], noisy or clean.
    start: index of its first latent frame.
    timestep: 0..1000, of the latents.
    actions: of its n latent frames, for each row of the batch.
    cameras: projections of its n latent frames; None = without the camera branch.
    visible: latent frames that its queries attend to.
    """

    latents: Tensor
    start: int
    timestep: float
    actions: Actions
    cameras: Projections | None
    visible: list[int]

    @property
    def frames(self) -> range:
        """Indices of its latent frames."""
        return range(self.start, self.start + self.latents.shape[1])


@dataclasses.dataclass(frozen=True)
class FinishedBlock:
    """A finished block, kept as long as its keys are in the cache.

    latents: float32 [B, n, C, h, w], clean.
    timestep, actions, cameras: what its clean pass computes the keys and values with.
    """

    latents: Tensor
    timestep: float
    actions: Actions
    cameras: Projections | None


@dataclasses.dataclass(frozen=True)
class ForwardInputs:
    """The arguments of `CausalWanTransformer.forward`, except the cache.

    latents: [B, F, C, h, w].
    time: embedded timesteps of the F latent frames.
    text: cross-attention keys and values of every layer.
    attn: where keys and values are written, and which ones each block attends to.
    num_outputs: number of last blocks whose velocity is returned; 0 = the pass only updates the cache.
    """

    latents: Tensor
    time: TimeEmbedding
    text: Sequence[LayerText]
    attn: AttentionMetadata
    num_outputs: int

    @property
    def shape_key(self) -> Hashable:
        """Key under which passes can be joined: they have equal shapes, groups and outputs."""
        return self.latents.shape[1:], len(self.attn.ranges), self.num_outputs


class TimeEmbeddingCache:
    """Embedded timesteps and actions, computed once for each combination that a rollout uses.

    len(): number of combinations kept.
    """

    def __init__(self, model: CausalWanTransformer, frames_per_block: int):
        self._model, self._frames_per_block = model, frames_per_block
        self._embedded: dict[tuple[tuple[float, Actions], ...], TimeEmbedding] = {}

    def __len__(self) -> int:
        return len(self._embedded)

    def get(self, blocks: tuple[tuple[float, Actions], ...]) -> TimeEmbedding:
        """Return the embedding of a pass over blocks given as (timestep, actions): one row per latent frame."""
        if blocks not in self._embedded:
            if len(self._embedded) >= _MAX_TIME_EMBEDDINGS:
                self._embedded.clear()
            timesteps = torch.tensor([timestep for timestep, _ in blocks]).repeat_interleave(self._frames_per_block)
            has_actions = bool(self._model.config.num_actions)
            actions = torch.cat([torch.tensor(actions) for _, actions in blocks], dim=1) if has_actions else None
            self._embedded[blocks] = self._model.embed_time(timesteps, actions)
        return self._embedded[blocks]


class ForwardBuilder:
    """Builds the inputs of a rollout's forward passes.

    model: the network. latent_size: (h, w). frames_per_block: latent frames of a block.
    """

    def __init__(self, model: CausalWanTransformer, latent_size: tuple[int, int], frames_per_block: int):
        self.tables = model.rotary_tables(*latent_size)
        self.time_embeddings = TimeEmbeddingCache(model, frames_per_block)

    def build(
        self, cache: KVCache, blocks: Sequence[BlockInput], text: Sequence[LayerText], num_outputs: int
    ) -> ForwardInputs:
        """Return the inputs of a pass over `blocks`, whose slots the cache's ring has claimed already."""
        latents = blocks[0].latents if len(blocks) == 1 else torch.cat([block.latents for block in blocks], dim=1)
        time = self.time_embeddings.get(tuple((block.timestep, block.actions) for block in blocks))
        cameras = [block.cameras for block in blocks if block.cameras is not None]
        attn = AttentionMetadata.build(
            cache,
            self.tables,
            [block.frames for block in blocks],
            [block.visible for block in blocks],
            Projections.cat(cameras) if cameras else None,
        )
        return ForwardInputs(latents, time, text, attn, num_outputs)


def join_inputs(inputs: Sequence[ForwardInputs], text: Sequence[LayerText]) -> ForwardInputs:
    """Join passes of one row each, without cameras and of one `shape_key`, into one pass of len(inputs) rows.

    text: `join_text` of their texts.
    """
    if len(inputs) == 1:
        return inputs[0]
    metadata = [single.attn for single in inputs]
    attn = dataclasses.replace(
        metadata[0],
        write_index=torch.cat([single.write_index for single in metadata]),
        ranges=TokenRanges.join([single.ranges for single in metadata]),
        rope_time=torch.cat([single.rope_time for single in metadata]),
    )
    time = TimeEmbedding(
        torch.cat([single.time.blocks for single in inputs], dim=1), torch.cat([single.time.head for single in inputs])
    )
    return ForwardInputs(torch.cat([single.latents for single in inputs]), time, text, attn, inputs[0].num_outputs)


def join_text(texts: Sequence[Sequence[LayerText]]) -> list[LayerText]:
    """Copy keys and values per layer, [1, H, text_len, D] of each row, into [len(texts), H, text_len, D]."""
    joined: list[LayerText] = []
    for layer in zip(*texts, strict=True):
        pairs = [pair for pair in layer if pair is not None]
        joined.append((torch.cat([k for k, _ in pairs]), torch.cat([v for _, v in pairs])) if pairs else None)
    return joined
