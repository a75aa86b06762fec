"""`cfpp generate --engine`: a film from an ONNX bundle. Network and codec run in onnxruntime, torch carries pixels."""

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from cfpp_rt.core.camera import parse_cameras
from cfpp_rt.core.frame_counts import count_latent_frames
from cfpp_rt.device.timing import Timings
from cfpp_rt.errors import InputError
from cfpp_rt.export.bundle_rollout import BundleRollout, Floats, OnnxRunner
from cfpp_rt.export.bundle_stream import BundleStream, encode_first
from cfpp_rt.export.cameras import EngineCameras
from cfpp_rt.io.video import DEFAULT_FPS
from cfpp_rt.values import Frames
from cfpp_rt.world import scripted
from cfpp_rt.world.actions import parse_actions
from cfpp_rt.world.student import first_frames

# Options of `cfpp generate` that a bundle has settled.
_SETTLED = (
    *(
        "checkpoint",
        "key",
        "config",
        "offload_text",
        "tiny_vae",
        "size",
        "image",
        "video",
        "steps",
        "window",
        "sinks",
        "dtype",
    ),
    *("student", "kv_dtype", "linear_dtype", "prompts"),
)


class TimedBundleStream:
    """An `BundleStream` with the times of `Stream`: an iterator of `Frames` as the writers take them."""

    def __init__(self, stream: BundleStream):
        self.rollout: BundleRollout = stream.rollout
        self.timings = Timings(torch.device("cpu"))
        self._stream = stream

    def __iter__(self) -> Iterator[Frames]:
        return self

    def __next__(self) -> Frames:
        with self.timings.stage("diffuse"):
            latents = self._stream.next_latents()
        with self.timings.stage("decode"):
            made = self._stream.decode(latents)
        self.timings.deliver(made.pixels.shape[1])
        return Frames(torch.from_numpy(made.pixels), made.start)

    def set_actions(self, actions: Any) -> None:
        self._stream.set_actions(actions)


def open_film(arguments: argparse.Namespace) -> tuple[TimedBundleStream, Iterator[Frames], int, float]:
    """The stream, its pictures as they are made, how many there will be, and at how many a second to play them.

    arguments: of `cfpp generate`. Raises InputError for options that are settled in the bundle.
    """
    for name in _SETTLED:
        if getattr(arguments, name) is not None:
            raise InputError(f"--engine takes no --{name.replace('_', '-')}: the bundle has settled it")
    if arguments.random_weights:
        raise InputError("--engine takes no --random-weights: the bundle has weights")
    engine = OnnxRunner(arguments.engine)
    card = engine.card
    if card.sizes.batch != 1:
        raise InputError(f"{arguments.engine}: a film is one video, the bundle makes {card.sizes.batch} at a time")
    block, factor, acts = card.sizes.block, card.temporal_factor, bool(card.sizes.model.num_actions)
    if arguments.actions is not None and not acts:
        raise InputError(f"{arguments.engine}: --actions is for a student that knows actions")
    actions = parse_actions(arguments.actions or "") if acts else []
    cameras = parse_cameras(arguments.trajectory, arguments.intrinsics)
    if (cameras is not None) != card.sizes.model.camera:
        verb = "needs" if card.sizes.model.camera else "takes no"
        raise InputError(
            f"{arguments.engine}: a student {'with' if cameras is None else 'without'} cameras {verb} --trajectory"
        )
    default = scripted.whole_blocks(1 + len(actions), block) if acts else 81
    if cameras is not None:
        default = 1 + factor * (len(cameras) - 1)
    if not acts and card.frames is not None:
        default = min(default, 1 + factor * (card.frames - 1))
    frames = default if arguments.frames is None else arguments.frames
    total = count_latent_frames(frames, factor, block)
    initial = None
    if acts:
        initial = np.concatenate([encode_first(engine, first_frames([arguments.seed]).numpy())] * block, axis=1)
    stream = TimedBundleStream(
        BundleStream(
            engine,
            _embeds(arguments, engine),
            latent_frames=total,
            seed=arguments.seed,
            initial_latents=initial,
            cameras=None if cameras is None else EngineCameras.of(cameras.views, cameras.focal),
            refresh=arguments.refresh,
        )
    )
    if acts:
        return stream, scripted.follow(stream, actions, block), frames, scripted.FPS
    return stream, stream, frames, DEFAULT_FPS


def _embeds(arguments: argparse.Namespace, engine: OnnxRunner) -> Floats | None:
    """Of --embeds, or of --prompt through the text encoder of --base."""
    model = engine.card.sizes.model
    if not model.text_len:
        for name in ("prompt", "embeds", "base"):
            if getattr(arguments, name) is not None:
                raise InputError(f"{arguments.engine}: a student without text takes no --{name}")
        return None
    if arguments.embeds is not None:
        from cfpp_rt.io.checkpoint import read_tensors

        embeds = read_tensors(arguments.embeds).get("embeds")
        wanted = (1, model.text_len, model.text_dim)
        if not torch.is_tensor(embeds) or tuple(embeds.shape) != wanted:
            raise InputError(f"--embeds {arguments.embeds}: wanted a tensor 'embeds' {list(wanted)}")
        return embeds.float().numpy()
    if arguments.prompt is None or arguments.base is None:
        raise InputError("--engine needs --embeds, or --prompt and --base with the text encoder")
    from cfpp_rt.text import TextEncoder

    encoder = TextEncoder.from_pretrained(arguments.base, dtype=torch.bfloat16, device="cpu", text_len=model.text_len)
    return encoder([arguments.prompt]).float().numpy()
