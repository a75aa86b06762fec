"""The random numbers of a rollout drawn from seeds: numpy alone, so that every runtime of a student draws the same."""

import operator
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cfpp_rt.errors import InputError

_START, _BETWEEN_STEPS = 0, 1  # streams of one seed: the start noise does not depend on the number of steps


def _generators(seeds: Sequence[int], stream: int) -> list[np.random.Generator]:
    # Counter-based, keyed by all 64 bits of the seed; torch's CPU generator would look at 32 of them.
    return [np.random.Generator(np.random.Philox(key=[seed, stream])) for seed in seeds]


def _as_seeds(seed: int | Sequence[int], batch: int) -> list[int]:
    try:
        if isinstance(seed, Sequence) and not isinstance(seed, str):
            seeds = [operator.index(s) for s in seed]
        else:
            first = operator.index(seed)
            seeds = [first + row for row in range(batch)]
    except TypeError:
        raise InputError(f"seed must be an integer or a list of {batch}, got {seed!r}") from None
    if len(seeds) != batch:
        raise InputError(f"seed must be one integer or {batch} of them, got {len(seeds)}")
    if any(not 0 <= s < 2**63 for s in seeds):
        raise InputError(f"seed must be in 0..2**63 - 1, got {seeds}")
    return seeds


class NoiseGenerator:
    """Start noise per block and fresh noise between steps, float32 [B, n, C, h, w].

    frame_shape: (C, h, w). seed: one integer, or one per batch row; see `NoiseSource`.
    """

    def __init__(self, frame_shape: tuple[int, int, int], batch: int, seed: int | Sequence[int]):
        seeds = _as_seeds(seed, batch)
        self._frame_shape = frame_shape
        self._start = _generators(seeds, _START)
        self._between_steps = _generators(seeds, _BETWEEN_STEPS)

    def start(self, frames: int) -> NDArray[np.float32]:
        return self._draw(self._start, frames)

    def between_steps(self, frames: int) -> NDArray[np.float32]:
        return self._draw(self._between_steps, frames)

    def _draw(self, generators: list[np.random.Generator], frames: int) -> NDArray[np.float32]:
        return np.stack([g.standard_normal((frames, *self._frame_shape), dtype=np.float32) for g in generators])
