"""What the student makes while it learns: the same clips every time, as its moving average makes them."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfpp_rt.codec.base import Codec
from cfpp_rt.codec.streaming import to_uint8
from cfpp_rt.config import RolloutConfig
from cfpp_rt.distill.batch import Batch
from cfpp_rt.distill.rng import normal_like
from cfpp_rt.distill.self_rollout import Exits, SelfRollout
from cfpp_rt.distill.settings import SampleSettings
from cfpp_rt.distill.stage import clips
from cfpp_rt.errors import InputError, MissingExtraError
from cfpp_rt.io.atomic import write_atomically
from cfpp_rt.model.transformer import CausalWanTransformer
from cfpp_rt.values import Frames

_SEED = 2**31  # of the noise; the same at every step, so that what changes is the student


class Samples:
    """Videos of the network, from a batch's conditions, rolled out as the runtime does.

    frames: of a video. initial: clean frames that are given. latent_size: (C, h, w). codec: None = latents are kept as
    they are. Files: folder/step-0001000.mp4, the clips of the batch side by side, or .safetensors with `latents`.
    """

    def __init__(
        self,
        network: CausalWanTransformer,
        rollout: RolloutConfig,
        batch: Batch,
        folder: Path,
        *,
        frames: int,
        latent_size: tuple[int, int, int],
        initial: int = 0,
        codec: Codec | None = None,
        fps: float = 16.0,
    ):
        if codec is not None:
            _require_av()
        self.rollout, self.batch, self.folder = SelfRollout(network, rollout), batch, folder
        self.frames, self.latent_size, self.initial = frames, latent_size, initial
        self.codec, self.fps = codec, fps

    @torch.no_grad()
    def __call__(self, step: int, *, write: bool = True) -> Path:
        """Make and write those of a step; a call of all processes, of which one writes."""
        config = self.rollout.config
        exits = Exits(len(config.first_steps or config.steps) - 1, len(config.steps) - 1)
        draws = torch.Generator().manual_seed(_SEED)
        embeds = self.batch.condition.embeds
        noise = torch.empty(len(embeds), self.frames - self.initial, *self.latent_size, device=embeds.device)
        initial = clips(self.batch)[:, : self.initial] if self.initial else None
        latents = self.rollout(
            normal_like(noise, draws), self.batch.condition, exits, draws, initial=initial, gradient=False
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

        pictures = [to_uint8(self.codec.decode(clip[None])).cpu() for clip in latents]  # one by one: pixels are large
        with Mp4Writer(path, self.fps) as writer:
            writer.write(Frames(torch.cat(pictures, dim=3), 0))


def open_codec(settings: SampleSettings, feed: Callable[[int], Batch], device: torch.device) -> Codec | None:
    """The codec of the settings, else the data source's own (its attribute `codec`), else None.

    A path is the Wan2.1 directory or the tiny autoencoder's file; module:function is called without arguments.
    """
    if settings.codec is None:
        return getattr(feed, "codec", None)
    module, colon, function = settings.codec.partition(":")
    if colon and not Path(settings.codec).exists():
        try:
            made: Any = getattr(importlib.import_module(module), function)()
        except (ImportError, AttributeError, ValueError) as error:
            raise InputError(f"samples.codec must be a path or module:function, got {settings.codec!r}") from error
        return made
    from cfpp_rt.pipeline import load_codec

    path = Path(settings.codec)
    return load_codec(path, tiny_vae=path if path.is_file() else None, dtype=torch.bfloat16, device=device)


def _require_av() -> None:
    try:
        import av  # noqa: F401  said before the training, not at its first sample
    except ImportError as error:
        raise MissingExtraError("av", "video", "writing samples as videos") from error
