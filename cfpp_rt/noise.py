"""The random numbers of a rollout: drawn from seeds on the CPU, the same on every device, or given by the caller."""

import operator
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

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


class NoiseSource:
    """Start noise per block and fresh noise between steps, float32 [B, n, C, h, w] on `device`.

    frames: generated frames in all; None = without end.
    seed: one integer, or one per batch row; row b with seed s is the same video whatever the batch.
    noise: explicit start noise [B, F, C, h, w] of all generated frames, in order.
    renoise: explicit noise between steps, block by block and step by step, each [B * n, C, h, w] or [B, n, C, h, w].
    """

    def __init__(
        self,
        frame_shape: tuple[int, int, int],
        batch: int,
        device: torch.device,
        *,
        frames: int | None = None,
        seed: int | Sequence[int] = 0,
        noise: Tensor | None = None,
        renoise: Iterable[Tensor] | None = None,
    ):
        seeds = _as_seeds(seed, batch)
        if noise is not None and (noise.ndim != 5 or noise.shape[0] != batch or noise.shape[2:] != frame_shape):
            raise InputError(
                f"noise must be [B={batch}, F, {', '.join(map(str, frame_shape))}], got {list(noise.shape)}"
            )
        if noise is not None and frames is not None and noise.shape[1] != frames:
            raise InputError(f"noise must cover the {frames} generated frames, got {noise.shape[1]}")
        self.frame_shape, self.batch, self.device = frame_shape, batch, device
        self._noise = noise
        self._renoise = None if renoise is None else iter(renoise)
        self._start_draws = _generators(seeds, _START)
        self._step_draws = _generators(seeds, _BETWEEN_STEPS)
        self._taken = 0

    def _draw(self, generators: list[np.random.Generator], frames: int) -> Tensor:
        rows = [g.standard_normal((frames, *self.frame_shape), dtype=np.float32) for g in generators]
        return torch.from_numpy(np.stack(rows)).to(self.device)

    def start(self, frames: int) -> Tensor:
        """Noise that the next block of `frames` frames starts from."""
        if self._noise is None:
            return self._draw(self._start_draws, frames)
        first, self._taken = self._taken, self._taken + frames
        if self._taken > self._noise.shape[1]:
            raise InputError(f"noise must cover {self._taken} generated frames, got {self._noise.shape[1]}")
        return self._noise[:, first : self._taken].to(self.device, torch.float32)

    def between_steps(self, frames: int) -> Tensor:
        """Fresh noise for the next step of a block of `frames` frames."""
        if self._renoise is None:
            return self._draw(self._step_draws, frames)
        given = next(self._renoise, None)
        if given is None:
            raise InputError("renoise must hold one tensor per step that follows another, got fewer")
        wanted = (self.batch, frames, *self.frame_shape)
        if given.numel() != torch.Size(wanted).numel() or given.shape[-3:] != self.frame_shape:
            raise InputError(f"renoise must be {list(wanted)} or its first two merged, got {list(given.shape)}")
        return given.reshape(wanted).to(self.device, torch.float32)
