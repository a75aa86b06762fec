"""One forward of the network as a value: made by a rollout, run alone or joined with those of other rollouts.

It is made of groups, each one block of frames.
"""

import dataclasses
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from cfpp_rt.core.camera import Projections
from cfpp_rt.model.attention import CachePass
from cfpp_rt.model.transformer import LayerText, TimeEmbedding
from cfpp_rt.ops.token_ranges import TokenRanges
from cfpp_rt.runtime.time_rows import Actions


@dataclasses.dataclass(frozen=True)
class Group:
    """One block's part of a pass: latents [B, n, C, h, w], first frame, timestep, and the frames its queries see.

    actions: n of them for each row of the batch; none for a model without actions. cameras: of its n frames, or None.
    """

    latents: Tensor
    start: int
    timestep: float
    actions: Actions
    cameras: Projections | None
    sees: list[int]


@dataclasses.dataclass(frozen=True)
class Clean:
    """A finished block: latents [B, n, C, h, w], and the timestep, actions and cameras with which its keys are made."""

    latents: Tensor
    timestep: float
    actions: Actions
    cameras: Projections | None


@dataclasses.dataclass(frozen=True)
class Pass:
    """What `CausalWanTransformer.forward` takes, but the cache.

    latents: [B, F, C, h, w]. time: rows of its F frames. text: per layer, of B rows. place: in a cache of B rows. keep:
    of how many of its last groups the velocity is wanted; 0 = only keys and values are.
    """

    latents: Tensor
    time: TimeEmbedding
    text: Sequence[LayerText]
    place: CachePass
    keep: int

    @property
    def form(self) -> Hashable:
        """Passes of one form can be joined."""
        return self.latents.shape[1:], len(self.place.ranges), self.keep


def join_passes(passes: Sequence[Pass], text: Sequence[LayerText]) -> Pass:
    """Passes of one row each, without cameras, as one pass of len(passes) rows. text: `join_text` of theirs."""
    if len(passes) == 1:
        return passes[0]
    places = [single.place for single in passes]
    place = dataclasses.replace(
        places[0],
        write_index=torch.cat([place.write_index for place in places]),
        ranges=TokenRanges.join([place.ranges for place in places]),
        rope_time=torch.cat([place.rope_time for place in places]),
    )
    time = TimeEmbedding(
        torch.cat([single.time.blocks for single in passes], dim=1), torch.cat([single.time.head for single in passes])
    )
    return Pass(torch.cat([single.latents for single in passes]), time, text, place, passes[0].keep)


def join_text(texts: Sequence[Sequence[LayerText]]) -> list[LayerText]:
    """Keys and values per layer, [1, H, text_len, D] of each row, as [len(texts), H, text_len, D]; copies them."""
    joined: list[LayerText] = []
    for layer in zip(*texts, strict=True):
        pairs = [pair for pair in layer if pair is not None]
        joined.append((torch.cat([k for k, _ in pairs]), torch.cat([v for _, v in pairs])) if pairs else None)
    return joined
