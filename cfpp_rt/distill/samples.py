"""Sample videos during training: the same clips every time, made by the student's moving average."""

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfpp_rt.codec.base import Codec
from cfpp_rt.codec.streaming import to_uint8
from cfpp_rt.config import RolloutConfig
from cfpp_rt.distill.batch import Batch, DataSource
from cfpp_rt.distill.rng import normal_like
from cfpp_rt.distill.self_rollout import Exits, SelfRollout
from cfpp_rt.distill.settings import SampleSettings
from cfpp_rt.distill.stage import clean_latents
from cfpp_rt.errors import InputError, MissingExtraError
from cfpp_rt.io.atomic import write_atomically
from cfpp_rt.model.transformer import CausalWanTransformer
from cfpp_rt.values import Frames

_SEED = 2**31  # seed of the noise, the same at every step, so that samples differ only by the student


class Samples:
    """Sample videos of a network for the conditions of one batch, rolled out as the runtime does.

    They are written to folder/step-0001000.mp4, the clips of the batch side by side, or without a codec to
    folder/step-0001000.safetensors as `latents` [B, F, C, h, w].
    latent_frames: latent frames of a video.
    latent_size: (C, h, w).
    initial_latent_frames: number of clean latent frames that are given.
    fps: frames per second of the video file.
    """

    def __init__(
        self,
        network: CausalWanTransformer,
        config: RolloutConfig,
        batch: Batch,
        folder: Path,
        *,
        latent_frames: int,
        latent_size: tuple[int, int, int],
        initial_latent_frames: int = 0,
        codec: Codec | None = None,
        fps: float = 16.0,
    ):
        if codec is not None:
            _require_av()
        self.rollout, self.batch, self.folder = SelfRollout(network, config), batch, folder
        self.latent_frames, self.initial_latent_frames = latent_frames, initial_latent_frames
        self.latent_size, self.codec, self.fps = latent_size, codec, fps

    @torch.no_grad()
    def __call__(self, step: int, *, write: bool = True) -> Path:
        """Make the samples of a step and return their path. All processes must call this; one passes write=True."""
        config = self.rollout.config
        last_steps = Exits(len(config.first_steps or config.steps) - 1, len(config.steps) - 1)
        generator = torch.Generator().manual_seed(_SEED)
        prompt_embeds = self.batch.condition.prompt_embeds
        shape = (len(prompt_embeds), self.latent_frames - self.initial_latent_frames, *self.latent_size)
        noise = normal_like(torch.empty(shape, device=prompt_embeds.device), generator)
        initial_latents = None
        if self.initial_latent_frames:
            initial_latents = clean_latents(self.batch)[:, : self.initial_latent_frames]
        latents = self.rollout(
            noise, self.batch.condition, last_steps, generator, initial_latents=initial_latents, gradient=False
        )
        path = self.folder / f"step-{step:07d}.{'safetensors' if self.codec is None else 'mp4'}"
        if write:
            self._write(path, latents)
        return path

    def _write(self, path: Path, latents: Tensor) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.codec is None:
            from safetensors.torch import save_file

            with write_atomically(path) as temporary:
                save_file({"latents": latents.cpu().contiguous()}, temporary)
            return
        from cfpp_rt.io.video import Mp4Writer

        frames = [
            to_uint8(self.codec.decode(clip[None])).cpu() for clip in latents
        ]  # clip by clip, because pixels are large
        with Mp4Writer(path, self.fps) as writer:
            writer.write(Frames(torch.cat(frames, dim=3), 0))


def open_codec(settings: SampleSettings, data_source: DataSource, device: torch.device) -> Codec | None:
    """Return the codec of the settings, else the data source's attribute `codec`, else None.

    settings.codec: the Wan2.1 directory, the file of the tiny autoencoder, or module:function, which is called without
        arguments. Raise InputError if it is neither.
    """
    if settings.codec is None:
        return getattr(data_source, "codec", None)
    module, colon, function = settings.codec.partition(":")
    if colon and not Path(settings.codec).exists():
        try:
            codec: Any = getattr(importlib.import_module(module), function)()
        except (ImportError, AttributeError, ValueError) as error:
            raise InputError(f"samples.codec must be a path or module:function, got {settings.codec!r}") from error
        return codec
    from cfpp_rt.pipeline import load_codec

    path = Path(settings.codec)
    return load_codec(path, tiny_vae=path if path.is_file() else None, dtype=torch.bfloat16, device=device)


def _require_av() -> None:
    try:
        import av  # noqa: F401  fail before the training, not at its first sample
    except ImportError as error:
        raise MissingExtraError("av", "video", "writing samples as videos") from error
