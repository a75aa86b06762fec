"""Frames from an ONNX bundle that contains its codec's decoder: the counterpart of `Stream` that needs no torch."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cfpp_rt.core.camera import Cameras
from cfpp_rt.core.exclusive import Exclusive
from cfpp_rt.errors import InputError, NonFiniteError
from cfpp_rt.export.bundle_rollout import BundleRollout
from cfpp_rt.export.contract import DECODERS, ENCODER, updated
from cfpp_rt.export.runner import Array, Floats, Runner


class Frames(NamedTuple):
    """Consecutive decoded frames of a video.

    pixels: uint8 [B, T, height, width, 3], RGB.
    start: index of the first of them in the video.
    """

    pixels: NDArray[np.uint8]
    start: int


class BundleDecoder:
    """The streaming decoder of one video. A second call while one computes is refused with InputError."""

    def __init__(self, runner: Runner):
        if runner.card.codec is None:
            raise InputError(f"{runner.folder}: has no decoder: export it with a codec, or take the latents")
        self._runner = runner
        self._state: dict[str, Array] | None = None
        self._decoded = 0  # latent frames
        self._failed = False
        self._in_use = Exclusive("a decoder")

    def decode(self, latents: Floats) -> Floats:
        """Decode the next latents, float32 [B, n, C, h, w], to pixels float32 [B, T, 3, height, width] in [-1, 1].

        Raises NonFiniteError if the pixels of a latent frame are not finite, and InputError ever after.
        """
        with self._in_use:
            return self._decode(latents)

    def _decode(self, latents: Floats) -> Floats:
        if self._failed:
            raise InputError(f"the decoder broke off at latent frame {self._decoded}: start another")
        made = []
        for latent_frame in np.split(latents, latents.shape[1], axis=1):
            session = self._runner.session(DECODERS[0] if self._state is None else DECODERS[1])
            with self._runner.lock:
                outputs = session.run_once(latents=latent_frame, **(self._state or {}))
            pixels = outputs.pop("pixels")
            if not np.isfinite(pixels).all():
                self._failed = True
                where = f"latent frame {self._decoded}"
                raise NonFiniteError(f"the decoder of the codec produced NaN or infinity at {where}")
            self._decoded += 1
            made.append(pixels)
            self._state = {name.removesuffix(updated("")): value for name, value in outputs.items()}
        return np.concatenate(made, axis=1)


class BundleStream:
    """An iterator over the frames of a batch of videos, block by block: `Frames`.

    runner, prompt_embeds, options: see `BundleRollout`. The frames of initial_latents are delivered first.

    One thread iterates; others may set prompt, actions and cameras meanwhile. A second call of `next` or `refresh`
    while one computes is refused with InputError.

    Raises InputError for a bundle without a decoder. Iteration raises NonFiniteError at latents or pixels that are not
    finite.
    """

    def __init__(self, runner: Runner, prompt_embeds: Floats | None = None, **options: Any):
        self._decoder = BundleDecoder(runner)
        self._initial_latents: Floats | None = options.get("initial_latents")
        self.rollout = BundleRollout(runner, prompt_embeds, **options)
        self._delivered = 0
        self._in_use = Exclusive("a stream")

    def __iter__(self) -> Iterator[Frames]:
        return self

    def __next__(self) -> Frames:
        with self._in_use:
            return self.decode(self.next_latents())

    def next_latents(self) -> Floats:
        """Return the given latents, then block after block of the rollout: the first half of `next`."""
        if self._initial_latents is not None:
            latents, self._initial_latents = np.asarray(self._initial_latents, np.float32), None
            return latents
        return next(self.rollout).values

    def decode(self, latents: Floats) -> Frames:
        """Decode the latents that `next_latents` returned: the second half of `next`."""
        pixels = to_uint8(self._decoder.decode(latents))
        frames = Frames(pixels, self._delivered)
        self._delivered += pixels.shape[1]
        return frames

    def refresh(self) -> None:
        """Run the newest block's clean pass now, if it still waits: for idle time before the next input arrives."""
        with self._in_use:
            self.rollout.refresh()

    def set_actions(self, actions: int | Sequence[int] | Sequence[Sequence[int]] | Array) -> None:
        """Take these actions from the next block on, until others are set."""
        self.rollout.set_actions(actions)

    def set_cameras(self, cameras: Cameras) -> None:
        """Take these cameras from the next block on, one per latent frame."""
        self.rollout.set_cameras(cameras)

    def set_prompt(self, prompt_embeds: Floats) -> None:
        """Follow another prompt from the next block on."""
        self.rollout.set_prompt(prompt_embeds)


def encode_first(runner: Runner, pixels: Floats) -> Floats:
    """Encode the first frame, float32 [B, 1, 3, height, width] in [-1, 1], to latents float32 [B, 1, C, h, w]."""
    if ENCODER not in (runner.card.codec or {}):
        raise InputError(f"{runner.folder}: has no encoder: it cannot begin with a frame")
    with runner.lock:
        return runner.session(ENCODER).run_once(pixels=pixels)["latents"]


def to_uint8(pixels: Floats) -> NDArray[np.uint8]:
    """Return float pixels [B, T, 3, height, width] in [-1, 1] as uint8 [B, T, height, width, 3], truncated."""
    scaled = np.clip(pixels * np.float32(0.5) + np.float32(0.5), 0, 1) * np.float32(255)
    return np.ascontiguousarray(np.moveaxis(scaled.astype(np.uint8), 2, -1))
