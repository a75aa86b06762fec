"""Batches from a folder of shards: what `data.source: cfpp_rt.distill.data.data_source:open_data_source` names."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cfpp_rt.core.camera import INTRINSICS, Cameras
from cfpp_rt.distill.batch import Batch
from cfpp_rt.distill.data.shards import ShardFolder
from cfpp_rt.distill.forward import Condition
from cfpp_rt.errors import InputError

# What a folder's columns are called, and the dtype in which training wants them.
CLIPS = {"latents": torch.float32, "trajectory": torch.float32, "weights": torch.float32}
CONDITIONS = {
    **{"embeds": torch.float32, "actions": torch.int64},
    **{"views": torch.float32, "intrinsics": torch.float32},  # [F, 4, 4] and [F, 3, 3], as `Cameras.of`
}
COLUMNS = {**CLIPS, **CONDITIONS}


@dataclasses.dataclass
class ShardDataSource:
    """Batch number n holds rows n * batch, n * batch + 1, ... of an endless order: the folder's rows, each epoch
    shuffled by (seed, epoch). So a batch is a function of its number alone.

    frames: the first frames of every clip that are used, None = all.
    """

    folder: ShardFolder
    batch: int
    seed: int
    frames: int | None = None
    _order: tuple[int, NDArray[np.int64]] | None = None

    def __call__(self, position: int) -> Batch:
        first = position * self.batch
        rows = [self.folder.row(self._row(first + i)) for i in range(self.batch)]
        columns = {name: torch.stack([row[name] for row in rows]) for name in self.folder.columns}
        found = {name: self._cut(name, columns[name].to(COLUMNS[name])) for name in columns}
        return Batch(condition_of(found, self.batch), *(found.get(name) for name in CLIPS))

    def _row(self, place: int) -> int:
        epoch, inside = divmod(place, len(self.folder))
        if self._order is None or self._order[0] != epoch:
            rng = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            self._order = epoch, rng.permutation(len(self.folder))
        return int(self._order[1][inside])

    def _cut(self, name: str, rows: Tensor) -> Tensor:
        if self.frames is None or name == "embeds":
            return rows
        axis = 2 if name == "trajectory" else 1
        if rows.shape[axis] < self.frames:
            raise InputError(f"data.frames must be <= {rows.shape[axis]}, the frames of {name}, got {self.frames}")
        return rows.narrow(axis, 0, self.frames)


def condition_of(columns: Mapping[str, Tensor], batch: int) -> Condition:
    """What stacked columns of `batch` rows say about conditions; without `intrinsics` the published lens is taken."""
    prompt_embeds, views = columns.get("embeds"), columns.get("views")
    cameras = None if views is None else Cameras.of(views, columns.get("intrinsics", INTRINSICS["training"]))
    return Condition(
        torch.zeros(batch, 0, 1) if prompt_embeds is None else prompt_embeds, columns.get("actions"), cameras
    )


def open_data_source(*, batch: int, folder: str, seed: int = 0, frames: int | None = None) -> Callable[[int], Batch]:
    """A feed over the folder's shards. seed: 0..2**63 - 1, of the shuffle. frames: as `ShardFeed`.

    Raises InputError for a folder whose columns are not those of `COLUMNS`, or that is not whole.
    """
    shards = ShardFolder(Path(folder))
    if unknown := sorted(set(shards.columns) - set(COLUMNS)):
        raise InputError(f"{folder}: columns must be of {', '.join(COLUMNS)}, got {', '.join(unknown)}")
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise InputError(f"data.seed must be an integer in 0..2**63 - 1, got {seed!r}")
    if frames is not None and (not isinstance(frames, int) or frames < 1):
        raise InputError(f"data.frames must be an integer >= 1, got {frames!r}")
    return ShardDataSource(shards, batch, seed, frames)
