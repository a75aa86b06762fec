"""The random numbers of a rollout: drawn from seeds on the CPU, the same on every device, or given by the caller."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from cfpp_rt.core.rng import NoiseGenerator
from cfpp_rt.device.transfer import to_device
from cfpp_rt.errors import InputError


class NoiseSource:
    """Start noise per block and fresh noise between steps, float32 [B, n, C, h, w] on `device`.

    latent_frames: generated latent frames in all; None = without end.
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
        latent_frames: int | None = None,
        seed: int | Sequence[int] = 0,
        noise: Tensor | None = None,
        renoise: Iterable[Tensor] | None = None,
    ):
        self._draws = NoiseGenerator(frame_shape, batch, seed)
        if noise is not None and (noise.ndim != 5 or noise.shape[0] != batch or noise.shape[2:] != frame_shape):
            raise InputError(
                f"noise must be [B={batch}, F, {', '.join(map(str, frame_shape))}], got {list(noise.shape)}"
            )
        if noise is not None and latent_frames is not None and noise.shape[1] != latent_frames:
            raise InputError(f"noise must cover the {latent_frames} generated frames, got {noise.shape[1]}")
        self.frame_shape, self.batch, self.device = frame_shape, batch, device
        self._noise = noise
        self._renoise = None if renoise is None else iter(renoise)
        self._taken = 0
        self._prepared: Tensor | None = None

    def start(self, frames: int) -> Tensor:
        """Noise that the next block of `frames` frames starts from."""
        if self._prepared is not None:
            prepared, self._prepared = self._prepared, None
            return prepared
        if self._noise is None:
            return to_device(torch.from_numpy(self._draws.start(frames)), self.device)
        first, self._taken = self._taken, self._taken + frames
        if self._taken > self._noise.shape[1]:
            raise InputError(f"noise must cover {self._taken} generated frames, got {self._noise.shape[1]}")
        return self._noise[:, first : self._taken].to(self.device, torch.float32)

    def prepare(self, frames: int) -> None:
        """Draw what `start` will return next: while a GPU is busy with the block before, it does not wait for it."""
        if self._noise is None:
            self._prepared = self.start(frames)

    def between_steps(self, frames: int) -> Tensor:
        """Fresh noise for the next step of a block of `frames` frames."""
        if self._renoise is None:
            return to_device(torch.from_numpy(self._draws.between_steps(frames)), self.device)
        given = next(self._renoise, None)
        if given is None:
            raise InputError("renoise must hold one tensor per step that follows another, got fewer")
        wanted = (self.batch, frames, *self.frame_shape)
        if given.numel() != torch.Size(wanted).numel() or given.shape[-3:] != self.frame_shape:
            raise InputError(f"renoise must be {list(wanted)} or its first two merged, got {list(given.shape)}")
        return given.reshape(wanted).to(self.device, torch.float32)
