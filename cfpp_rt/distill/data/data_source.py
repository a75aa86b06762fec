"""The data source of stored clips, `data.source: cfpp_rt.distill.data.data_source:open_data_source` in a config."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cfpp_rt.core.camera import INTRINSICS, Cameras
from cfpp_rt.distill.batch import Batch, DataSource
from cfpp_rt.distill.data.shards import ShardFolder
from cfpp_rt.distill.forward import Condition
from cfpp_rt.errors import InputError

# Names of the columns of a folder, and their dtypes in training.
CLIPS = {"latents": torch.float32, "trajectory": torch.float32, "weights": torch.float32}
CONDITIONS = {
    **{"embeds": torch.float32, "actions": torch.int64},
    **{"views": torch.float32, "intrinsics": torch.float32},  # [F, 4, 4] and [F, 3, 3], see `Cameras.of`
}
COLUMNS = {**CLIPS, **CONDITIONS}


@dataclasses.dataclass
class ShardDataSource:
    """Batches of the rows of a folder, which every epoch shuffles anew by (seed, epoch).

    Batch number n has rows n * batch, n * batch + 1, ... of this endless sequence, so it depends on n alone.
    latent_frames: number of latent frames of every clip that are used, from its start; None = all.
    """

    folder: ShardFolder
    batch: int
    seed: int
    latent_frames: int | None = None
    _order: tuple[int, NDArray[np.int64]] | None = None

    def __call__(self, position: int) -> Batch:
        first = position * self.batch
        rows = [self.folder.row(self._row(first + i)) for i in range(self.batch)]
        columns = {name: torch.stack([row[name] for row in rows]) for name in self.folder.columns}
        tensors = {name: self._cut(name, columns[name].to(COLUMNS[name])) for name in columns}
        return Batch(condition_of(tensors, self.batch), *(tensors.get(name) for name in CLIPS))

    def _row(self, place: int) -> int:
        epoch, inside = divmod(place, len(self.folder))
        if self._order is None or self._order[0] != epoch:
            rng = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            self._order = epoch, rng.permutation(len(self.folder))
        return int(self._order[1][inside])

    def _cut(self, name: str, rows: Tensor) -> Tensor:
        if self.latent_frames is None or name == "embeds":
            return rows
        axis = 2 if name == "trajectory" else 1
        if rows.shape[axis] < self.latent_frames:
            raise InputError(
                f"data.frames must be <= {rows.shape[axis]}, the frames of {name}, got {self.latent_frames}"
            )
        return rows.narrow(axis, 0, self.latent_frames)


def condition_of(columns: Mapping[str, Tensor], batch: int) -> Condition:
    """Return the conditions in stacked columns of `batch` rows. Without `intrinsics` the published lens is used."""
    prompt_embeds, views = columns.get("embeds"), columns.get("views")
    cameras = None if views is None else Cameras.of(views, columns.get("intrinsics", INTRINSICS["training"]))
    return Condition(
        torch.zeros(batch, 0, 1) if prompt_embeds is None else prompt_embeds, columns.get("actions"), cameras
    )


def open_data_source(*, batch: int, folder: str, seed: int = 0, frames: int | None = None) -> DataSource:
    """Return the data source of a folder of shards; the arguments are keys of `data` in a config.

    batch: clips per batch.
    seed: 0..2**63 - 1, seed of the shuffle.
    frames: number of latent frames of every clip that are used; None = all.
    Raise InputError if a column is not in `COLUMNS` or the folder is not complete.
    """
    shards = ShardFolder(Path(folder))
    if unknown := sorted(set(shards.columns) - set(COLUMNS)):
        raise InputError(f"{folder}: columns must be of {', '.join(COLUMNS)}, got {', '.join(unknown)}")
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise InputError(f"data.seed must be an integer in 0..2**63 - 1, got {seed!r}")
    if frames is not None and (not isinstance(frames, int) or frames < 1):
        raise InputError(f"data.frames must be an integer >= 1, got {frames!r}")
    return ShardDataSource(shards, batch, seed, frames)
