"""The noise of a rollout, drawn from seeds or given by the caller.

Needs numpy alone, so every runtime of a student draws the same numbers.
"""

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cfpp_rt.core.controls import check_latents_shape
from cfpp_rt.errors import InputError

Floats = NDArray[np.float32]

_START, _BETWEEN_STEPS = 0, 1  # streams of one seed: the start noise does not depend on the number of steps


class NoiseGenerator:
    """The start noise of each block and the noise between its steps, float32 [B, n, C, h, w].

    frame_shape: (C, h, w) of one latent frame.
    batch: B.
    seed: one integer in 0..2**63 - 1, or one per batch row. A single seed s stands for s, s + 1, ... of the rows. A row
        with a given seed gets the same noise whatever the batch.
    latent_frames: number of generated latent frames; None = without end.
    noise: explicit start noise [B, F, C, h, w] of all generated latent frames, in order.
    renoise: explicit noise between steps, block by block and step by step, each [B * n, C, h, w] or [B, n, C, h, w].

    Raises InputError for another number of seeds, a seed out of range, and noise of another shape or length.
    """

    def __init__(
        self,
        frame_shape: tuple[int, ...],
        batch: int,
        seed: int | Sequence[int] = 0,
        *,
        latent_frames: int | None = None,
        noise: ArrayLike | None = None,
        renoise: Iterable[ArrayLike] | None = None,
    ):
        seeds = _seeds(seed, batch)
        self._frame_shape, self._batch = frame_shape, batch
        self._start = _generators(seeds, _START)
        self._between_steps = _generators(seeds, _BETWEEN_STEPS)
        self._noise = None if noise is None else np.asarray(noise, np.float32)
        self._renoise = None if renoise is None else iter(renoise)
        self._taken = 0  # latent frames of `noise` that blocks have started from
        if self._noise is None:
            return
        check_latents_shape("noise", self._noise.shape, batch, frame_shape)
        if latent_frames is not None and self._noise.shape[1] != latent_frames:
            raise InputError(f"noise must cover the {latent_frames} generated frames, got {self._noise.shape[1]}")

    @property
    def start_is_given(self) -> bool:
        """True if blocks start from explicit noise."""
        return self._noise is not None

    def start(self, frames: int) -> Floats:
        """Return the noise that the next block of `frames` latent frames starts from."""
        if self._noise is None:
            return self._draw(self._start, frames)
        first, self._taken = self._taken, self._taken + frames
        if self._taken > self._noise.shape[1]:
            raise InputError(f"noise must cover {self._taken} generated frames, got {self._noise.shape[1]}")
        return self._noise[:, first : self._taken]

    def between_steps(self, frames: int) -> Floats:
        """Return fresh noise for the next step of a block of `frames` latent frames."""
        if self._renoise is None:
            return self._draw(self._between_steps, frames)
        given = next(self._renoise, None)
        if given is None:
            raise InputError("renoise must hold one array per step that follows another, got fewer")
        array, shape = np.asarray(given, np.float32), (self._batch, frames, *self._frame_shape)
        if array.size != np.prod(shape) or array.shape[-3:] != self._frame_shape:
            raise InputError(f"renoise must be {list(shape)} or its first two merged, got {list(array.shape)}")
        return array.reshape(shape)

    def _draw(self, generators: list[np.random.Generator], frames: int) -> Floats:
        return np.stack([g.standard_normal((frames, *self._frame_shape), dtype=np.float32) for g in generators])


def _generators(seeds: Sequence[int], stream: int) -> list[np.random.Generator]:
    # Counter-based, keyed by all 64 bits of the seed; torch's CPU generator uses only 32 of them.
    return [np.random.Generator(np.random.Philox(key=[seed, stream])) for seed in seeds]


def _seeds(seed: Any, batch: int) -> list[int]:
    """Return one seed per batch row."""
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
