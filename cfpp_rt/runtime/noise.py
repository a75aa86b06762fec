"""The noise of a rollout as tensors on the model's device."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from cfpp_rt.core.rng import Floats, NoiseGenerator
from cfpp_rt.device.transfer import to_device


class NoiseSource:
    """Uploads the noise of a `NoiseGenerator`: float32 [B, n, C, h, w] on `device`.

    The numbers are drawn on the CPU, so they are the same on every device. Arguments and errors: see `NoiseGenerator`.
    `noise` and `renoise` are tensors of any float dtype, on any device.
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
        self._generator = NoiseGenerator(
            frame_shape,
            batch,
            seed,
            latent_frames=latent_frames,
            noise=None if noise is None else _to_array(noise),
            renoise=None if renoise is None else map(_to_array, renoise),
        )
        self._device = device
        self._prepared: Tensor | None = None

    def start(self, frames: int) -> Tensor:
        """Return the noise that the next block of `frames` latent frames starts from."""
        if self._prepared is not None:
            prepared, self._prepared = self._prepared, None
            return prepared
        return self._upload(self._generator.start(frames))

    def prepare(self, frames: int) -> None:
        """Draw now what `start` returns next: while the GPU computes one block, the CPU draws the noise of the next."""
        if not self._generator.start_is_given:
            self._prepared = self.start(frames)

    def between_steps(self, frames: int) -> Tensor:
        """Return fresh noise for the next step of a block of `frames` latent frames."""
        return self._upload(self._generator.between_steps(frames))

    def _upload(self, noise: Floats) -> Tensor:
        return to_device(torch.from_numpy(noise), self._device)


def _to_array(tensor: Tensor) -> Floats:
    return tensor.detach().to("cpu", torch.float32).numpy()
