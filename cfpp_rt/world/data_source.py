"""Training data of the world, made while it is used: batch number n of a seed is always the same."""

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

_LEAD_IN = 16  # a clip begins at most so many steps after its episode did
_CHANGED, _THING = 4.0, 2.0  # what a cell counts more than floor and walls if it changes, and if something is there


@dataclasses.dataclass(frozen=True)
class WorldDataSource:
    """Clips of `frames` frames, `batch` at a time. seed: 0..2**31 - 1; no two batches share an episode."""

    codec: PatchCodec
    seed: int
    batch: int
    num_frames: int

    def __call__(self, position: int) -> Batch:
        """Batch number `position`: latents [B, F, 16, 6, 6], actions [B, F] (the first: none), cell weights."""
        frames, actions, things = record(self.seed, position, self.batch, self.num_frames)
        prompt_embeds = torch.zeros(self.batch, 0, 1)
        return Batch(
            Condition(prompt_embeds, torch.from_numpy(actions)),
            self.codec.encode(to_pixels(frames)),
            weights=_cell_weights(frames, things),
        )


def open_data_source(*, batch: int, seed: int, num_frames: int) -> WorldDataSource:
    """What a training config names as its data source; the codec is fitted anew, in a second."""
    return WorldDataSource(fit_codec(seed), seed, batch, num_frames)


def record(seed: int, position: int, batch: int, num_frames: int) -> tuple[NDArray[np.uint8], NDArray, NDArray]:
    """Pictures uint8 [B, F, 48, 48, 3], the actions that led to each int64 [B, F], where things are [B, F, 6, 6]."""
    rng = np.random.Generator(np.random.Philox(key=[seed, position]))
    simulator = Simulator(rng.integers(0, 2**62, batch).tolist())
    wanderer = Wanderer(int(rng.integers(0, 2**62)), batch)
    for _ in range(rng.integers(0, _LEAD_IN)):
        simulator.step(wanderer(simulator.state))
    made = [(render(simulator.state), np.full(batch, NONE), _things(simulator.state))]
    for _ in range(num_frames - 1):
        actions = wanderer(simulator.state)
        state = simulator.step(actions)
        made.append((render(state), actions, _things(state)))
    frames, actions, things = (np.stack(parts, axis=1) for parts in zip(*made, strict=True))
    return frames, actions, things


def _things(state: State) -> NDArray[np.bool_]:
    """Tiles that agent, crate, coin or gate touch: bool [B, 6, 6]."""
    found = np.zeros(state.walls.shape, dtype=bool)
    rows = np.arange(len(found))
    for corner in (state.agent, state.crate, 2 * state.coin, 2 * state.gate):
        for row in (corner[:, 0] // 2, (corner[:, 0] + 1) // 2):
            for column in (corner[:, 1] // 2, (corner[:, 1] + 1) // 2):
                found[rows, row, column] = True
    return found


def _cell_weights(frames: NDArray[np.uint8], things: NDArray[np.bool_]) -> torch.Tensor:
    """float32 [B, F, 6, 6] of mean 1: most of the picture stands still, and is easily right."""
    batch, num_frames, height, width, _ = frames.shape
    cells = (frames[:, 1:] != frames[:, :-1]).reshape(batch, num_frames - 1, height // TILE, TILE, width // TILE, -1)
    changed = np.pad(cells.any(axis=(3, 5)), ((0, 0), (1, 0), (0, 0), (0, 0)))
    weights = torch.from_numpy((1 + _CHANGED * changed + _THING * things).astype(np.float32))
    return weights / weights.mean()
