"""The data source of the world: batches are simulated on demand, and batch number n of a seed is always the same."""

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray

from cfpp_rt.distill.batch import Batch
from cfpp_rt.distill.forward import Condition
from cfpp_rt.world.codec import PatchCodec, fit_codec, to_pixels
from cfpp_rt.world.policy import Wanderer
from cfpp_rt.world.simulator import NONE, Simulator, State
from cfpp_rt.world.sprites import TILE, render

_LEAD_IN = 16  # a clip starts fewer steps than this after the start of its episode
_CHANGED, _THING = 4.0, 2.0  # extra loss weight of a cell that changes, and of one with a thing in it


@dataclasses.dataclass(frozen=True)
class WorldDataSource:
    """Batches of clips; no two of them share an episode.

    seed: 0..2**31 - 1.
    batch: clips per batch.
    num_frames: frames of a clip.
    """

    codec: PatchCodec
    seed: int
    batch: int
    num_frames: int

    def __call__(self, position: int) -> Batch:
        """Return batch number `position`: latents [B, F, 16, 6, 6], actions [B, F], weights [B, F, 6, 6]."""
        frames, actions, things = record(self.seed, position, self.batch, self.num_frames)
        prompt_embeds = torch.zeros(self.batch, 0, 1)
        return Batch(
            Condition(prompt_embeds, torch.from_numpy(actions)),
            self.codec.encode(to_pixels(frames)),
            weights=_cell_weights(frames, things),
        )


def open_data_source(*, batch: int, seed: int, frames: int) -> WorldDataSource:
    """Return the data source of a config; the arguments are keys of its `data`. The codec is fitted again."""
    return WorldDataSource(fit_codec(seed), seed, batch, frames)


def record(seed: int, position: int, batch: int, num_frames: int) -> tuple[NDArray[np.uint8], NDArray, NDArray]:
    """Simulate the clips of a batch.

    Return frames uint8 [B, F, 48, 48, 3], the action that led to each frame int64 [B, F], and the tiles with things in
    them bool [B, F, 6, 6].
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, position]))
    simulator = Simulator(rng.integers(0, 2**62, batch).tolist())
    wanderer = Wanderer(int(rng.integers(0, 2**62)), batch)
    for _ in range(rng.integers(0, _LEAD_IN)):
        simulator.step(wanderer(simulator.state))
    steps = [(render(simulator.state), np.full(batch, NONE), _things(simulator.state))]
    for _ in range(num_frames - 1):
        actions = wanderer(simulator.state)
        state = simulator.step(actions)
        steps.append((render(state), actions, _things(state)))
    frames, actions, things = (np.stack(parts, axis=1) for parts in zip(*steps, strict=True))
    return frames, actions, things


def _things(state: State) -> NDArray[np.bool_]:
    """Return the tiles that agent, crate, coin or gate touch: bool [B, 6, 6]."""
    touched = np.zeros(state.walls.shape, dtype=bool)
    rows = np.arange(len(touched))
    for corner in (state.agent, state.crate, 2 * state.coin, 2 * state.gate):
        for row in (corner[:, 0] // 2, (corner[:, 0] + 1) // 2):
            for column in (corner[:, 1] // 2, (corner[:, 1] + 1) // 2):
                touched[rows, row, column] = True
    return touched


def _cell_weights(frames: NDArray[np.uint8], things: NDArray[np.bool_]) -> torch.Tensor:
    """Return loss weights, float32 [B, F, 6, 6] of mean 1: most of a frame does not change and is easy to predict."""
    batch, num_frames, height, width, _ = frames.shape
    cells = (frames[:, 1:] != frames[:, :-1]).reshape(batch, num_frames - 1, height // TILE, TILE, width // TILE, -1)
    changed = np.pad(cells.any(axis=(3, 5)), ((0, 0), (1, 0), (0, 0), (0, 0)))
    weights = torch.from_numpy((1 + _CHANGED * changed + _THING * things).astype(np.float32))
    return weights / weights.mean()
