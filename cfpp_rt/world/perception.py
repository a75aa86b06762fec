"""Perception of frames of the world: positions of things, matched by their sprites, and an artifact score."""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cfpp_rt.world.simulator import State
from cfpp_rt.world.sprites import SPRITES, STEP, TILE, render


def find(frames: NDArray[np.uint8], name: str, stride: int = 1) -> NDArray[np.int64]:
    """Return the best match of a sprite in each frame: upper left corner (row, column) in pixels, int64 [B, 2].

    The match minimises the squared difference over the pixels that the sprite covers.
    frames: uint8 [B, 48, 48, 3].
    name: key of `SPRITES`.
    stride: distance in pixels of the positions that are compared.
    """
    error = mismatch(frames, name, stride)
    best = error.flatten(1).argmin(dim=1)
    width = error.shape[2]
    return stride * torch.stack([best // width, best % width], dim=1).numpy()


def mismatch(frames: NDArray[np.uint8], name: str, stride: int = 1) -> Tensor:
    """Return the mean squared difference to a sprite at every `stride`-th pixel: float32 [B, n, n]."""
    colours, covers = SPRITES[name]
    x = torch.from_numpy(frames).movedim(-1, 1).float()
    mask = torch.from_numpy(covers).float().expand(1, 3, -1, -1)
    sprite = torch.from_numpy(colours).movedim(-1, 0).float()[None] * mask
    squares = F.conv2d(x.square(), mask, stride=stride) - 2 * F.conv2d(x, sprite, stride=stride)
    return (squares[:, 0] + sprite.square().sum()) / mask.sum()


def read(frames: NDArray[np.uint8], known: State) -> State:
    """Return the state that frames [B, 48, 48, 3] show. Walls and the gate's position are taken from `known`."""
    rows = np.arange(len(frames))
    corner = known.gate
    opened = mismatch(frames, "open", TILE).numpy()[rows, corner[:, 0], corner[:, 1]]
    closed = mismatch(frames, "closed", TILE).numpy()[rows, corner[:, 0], corner[:, 1]]
    return State(
        walls=known.walls,
        gate=known.gate,
        gate_open=opened < closed,
        coin=find(frames, "coin", TILE) // TILE,
        agent=find(frames, "agent", STEP) // STEP,
        crate=find(frames, "crate", STEP) // STEP,
    )


def artifact_score(frames: NDArray[np.uint8], shown: State) -> NDArray[np.float32]:
    """Return the difference between each frame and a rendering of the state that it shows: float32 [B].

    It is the root mean square difference of the worst tile, in 0..255. A thing that is doubled, missing or half faded
    gives 40 or more.
    """
    difference = frames.astype(np.float32) - render(shown)
    tiles = difference.reshape(len(frames), -1, TILE, frames.shape[2] // TILE, TILE, 3)
    return np.sqrt(np.square(tiles).mean(axis=(2, 4, 5))).max(axis=(1, 2))
