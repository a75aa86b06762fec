"""Modulation rows of a rollout's passes: a handful of combinations of timesteps and actions, each embedded once."""

import torch

from cfpp_rt.model.transformer import CausalWanTransformer, TimeEmbedding

Actions = tuple[tuple[int, ...], ...]  # of one block: n for each row of the batch; none for a model without actions
_MOST = 512  # a batch may act in more ways than it pays to keep


class TimeRows:
    """What `CausalWanTransformer.embed_time` makes of the blocks of a pass, kept. len(): how many are."""

    def __init__(self, model: CausalWanTransformer, frames_per_block: int):
        self._model, self._frames = model, frames_per_block
        self._kept: dict[tuple[tuple[float, Actions], ...], TimeEmbedding] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def of(self, blocks: tuple[tuple[float, Actions], ...]) -> TimeEmbedding:
        """Rows of blocks given as timestep and actions, one row per frame."""
        if blocks not in self._kept:
            if len(self._kept) >= _MOST:
                self._kept.clear()
            timesteps = torch.tensor([timestep for timestep, _ in blocks]).repeat_interleave(self._frames)
            acting = bool(self._model.config.num_actions)
            actions = torch.cat([torch.tensor(actions) for _, actions in blocks], dim=1) if acting else None
            self._kept[blocks] = self._model.embed_time(timesteps, actions)
        return self._kept[blocks]
