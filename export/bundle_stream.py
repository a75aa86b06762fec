"""Pictures from an ONNX bundle that has its codec's decoder: the counterpart of `Stream`, free of torch."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cfpp_rt.errors import InputError
from cfpp_rt.export.bundle_rollout import BundleRollout, Floats, OnnxRunner
from cfpp_rt.export.cameras import EngineCameras
from cfpp_rt.export.contract import DECODERS, ENCODER, updated
from cfpp_rt.export.onnx_runner import Array


class Frames(NamedTuple):
    """Decoded pictures: uint8 [B, T, height, width, 3], RGB, and the index of the first in the video."""

    pixels: NDArray[np.uint8]
    start: int


class BundleDecoder:
    """The decoder of one clip. Its state is handed from call to call as it is."""

    def __init__(self, engine: OnnxRunner):
        if engine.card.codec is None:
            raise InputError(f"{engine.bundle.folder}: has no decoder: export it with a codec, or take the latents")
        self._engine = engine
        self._state: dict[str, Array] | None = None

    def decode(self, latents: Floats) -> Floats:
        """The next latents float32 [B, n, C, h, w] to float32 pixels [B, T, 3, height, width] in [-1, 1]."""
        pictures = []
        for frame in np.split(latents, latents.shape[1], axis=1):
            session = self._engine.session(DECODERS[0] if self._state is None else DECODERS[1])
            made = session.run_once(latents=frame, **(self._state or {}))
            pictures.append(made.pop("pixels"))
            self._state = {name.removesuffix(updated("")): value for name, value in made.items()}
        return np.concatenate(pictures, axis=1)


def encode_first(engine: OnnxRunner, pixels: Floats) -> Floats:
    """The first picture, float32 [B, 1, 3, height, width] in [-1, 1], to latents [B, 1, C, h, w]."""
    if ENCODER not in (engine.card.codec or {}):
        raise InputError(f"{engine.bundle.folder}: has no encoder: it cannot begin with a picture")
    return engine.session(ENCODER).run_once(pixels=pixels)["latents"]


def to_uint8(pixels: Floats) -> NDArray[np.uint8]:
    """Float [B, T, 3, height, width] in [-1, 1] to uint8 [B, T, height, width, 3], truncated."""
    scaled = np.clip(pixels * np.float32(0.5) + np.float32(0.5), 0, 1) * np.float32(255)
    return np.ascontiguousarray(np.moveaxis(scaled.astype(np.uint8), 2, -1))


class BundleStream:
    """An iterator of `Frames`, block by block; arguments as for `BundleRollout`.

    initial_latents: latents that the video continues; their frames are delivered first.
    """

    def __init__(self, engine: OnnxRunner, prompt_embeds: Floats | None = None, **options: Any):
        self._decoder = BundleDecoder(engine)
        self._given: Floats | None = options.get("initial_latents")
        self.rollout = BundleRollout(engine, prompt_embeds, **options)
        self._delivered = 0

    def __iter__(self) -> Iterator[Frames]:
        return self

    def __next__(self) -> Frames:
        return self.decode(self.next_latents())

    def next_latents(self) -> Floats:
        """The first half of `next`: the given latents, or the next block of the rollout."""
        if self._given is not None:
            latents, self._given = np.asarray(self._given, np.float32), None
            return latents
        return next(self.rollout).values

    def decode(self, latents: Floats) -> Frames:
        """The second half of `next`."""
        pixels = to_uint8(self._decoder.decode(latents))
        frames = Frames(pixels, self._delivered)
        self._delivered += pixels.shape[1]
        return frames

    def refresh(self) -> None:
        """Run the newest block's clean pass now if it still waits: for idle time before the next input arrives."""
        self.rollout.refresh()

    def set_actions(self, actions: int | Sequence[int] | Array) -> None:
        """Take these actions from the next block on, until others are given."""
        self.rollout.set_actions(actions)

    def set_cameras(self, cameras: EngineCameras) -> None:
        """Take these cameras from the next block on, one per latent frame."""
        self.rollout.set_cameras(cameras)

    def set_prompt(self, prompt_embeds: Floats) -> None:
        """Follow another prompt from the next block on."""
        self.rollout.set_prompt(prompt_embeds)
