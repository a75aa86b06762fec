"""`cfpp generate --engine`: a video from an ONNX bundle, whose network and codec run in onnxruntime."""

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from cfpp_rt.core.camera import parse_cameras
from cfpp_rt.core.exclusive import Exclusive
from cfpp_rt.core.frame_counts import count_frames, count_latent_frames
from cfpp_rt.device.timing import Timings
from cfpp_rt.errors import InputError
from cfpp_rt.export.bundle_rollout import BundleRollout
from cfpp_rt.export.bundle_stream import BundleStream, encode_first
from cfpp_rt.export.onnx_runner import OnnxRunner
from cfpp_rt.export.runner import Floats, Runner
from cfpp_rt.io.video import DEFAULT_FPS
from cfpp_rt.options import refuse_unused
from cfpp_rt.runtime.clip import Clip
from cfpp_rt.values import Frames
from cfpp_rt.world import scripted
from cfpp_rt.world.actions import parse_actions_option
from cfpp_rt.world.student import first_frames

DEFAULT_NUM_FRAMES = 81  # as `cfpp generate` without --frames
# Options of `cfpp generate` that a bundle leaves open; the exporter has settled the others.
_TAKES = {"engine", "base", "prompt", "embeds", "actions", "trajectory", "intrinsics", "frames", "refresh"}


class TimedBundleStream:
    """A `BundleStream` with the timings of `Stream`: an iterator of `Frames` as video writers take them."""

    def __init__(self, stream: BundleStream):
        self.rollout: BundleRollout = stream.rollout
        self.timings = Timings(torch.device("cpu"))
        self._stream, self._in_use = stream, Exclusive("a stream")

    def __iter__(self) -> Iterator[Frames]:
        return self

    def __next__(self) -> Frames:
        with self._in_use:
            with self.timings.stage("diffuse"):
                latents = self._stream.next_latents()
            with self.timings.stage("decode"):
                frames = self._stream.decode(latents)
            self.timings.deliver(frames.pixels.shape[1])
        return Frames(torch.from_numpy(frames.pixels), frames.start)

    def set_actions(self, actions: Any) -> None:
        """Take these actions from the next block on, until others are set."""
        self._stream.set_actions(actions)


def open_clip(arguments: argparse.Namespace) -> Clip:
    """Open the clip that a bundle generates.

    arguments: those of `cfpp generate`.

    Raises InputError for options that the bundle has settled, and for options that its student does not take.
    """
    try:
        refuse_unused(arguments, _TAKES, "--engine")
    except InputError as error:
        raise InputError(f"{error}: the bundle has settled it") from None
    runner = OnnxRunner(arguments.engine)
    card, sizes = runner.card, runner.card.sizes
    if sizes.batch != 1:
        raise InputError(f"{arguments.engine}: the batch of the bundle must be 1 for a video, got {sizes.batch}")
    n, temporal_factor, has_actions = sizes.frames_per_block, card.temporal_factor, bool(sizes.model.num_actions)
    if arguments.actions is not None and not has_actions:
        raise InputError(f"{arguments.engine}: --actions is for a student with actions")
    actions = parse_actions_option(arguments.actions) if has_actions else []
    cameras = parse_cameras(arguments.trajectory, arguments.intrinsics)
    if (cameras is not None) != sizes.model.camera:
        verb = "needs" if sizes.model.camera else "takes no"
        raise InputError(
            f"{arguments.engine}: a student {'with' if cameras is None else 'without'} cameras {verb} --trajectory"
        )
    num_frames = scripted.frames_for(arguments.frames, actions, n) if has_actions else arguments.frames
    if num_frames is None:
        num_frames = DEFAULT_NUM_FRAMES
        if cameras is not None:
            num_frames = count_frames(len(cameras), temporal_factor)
        if card.latent_frames is not None:
            num_frames = min(num_frames, count_frames(card.latent_frames, temporal_factor))
    initial_latents = None
    if has_actions:  # a video of the world begins with a given block
        first_block = [encode_first(runner, first_frames([arguments.seed]).numpy())] * n
        initial_latents = np.concatenate(first_block, axis=1)
    stream = TimedBundleStream(
        BundleStream(
            runner,
            _prompt_embeds(arguments, runner),
            latent_frames=count_latent_frames(num_frames, temporal_factor, n),
            seed=arguments.seed,
            initial_latents=initial_latents,
            cameras=cameras,
            refresh=arguments.refresh,
        )
    )
    if has_actions:
        return Clip(stream, scripted.follow(stream, actions, n), num_frames, scripted.FPS)
    return Clip(stream, stream, num_frames, DEFAULT_FPS)


def _prompt_embeds(arguments: argparse.Namespace, runner: Runner) -> Floats | None:
    """Return the embeddings of --embeds, or of --prompt, which the text encoder of --base makes in PyTorch."""
    model = runner.card.sizes.model
    if not model.text_len:
        for name in ("prompt", "embeds", "base"):
            if getattr(arguments, name) is not None:
                raise InputError(f"{arguments.engine}: a student without text takes no --{name}")
        return None
    if arguments.embeds is not None:
        from cfpp_rt.io.checkpoint import read_tensors

        prompt_embeds = read_tensors(arguments.embeds).get("embeds")
        wanted = (1, model.text_len, model.text_dim)
        if not torch.is_tensor(prompt_embeds) or tuple(prompt_embeds.shape) != wanted:
            raise InputError(f"--embeds {arguments.embeds}: wanted a tensor 'embeds' {list(wanted)}")
        return prompt_embeds.float().numpy()
    if arguments.prompt is None or arguments.base is None:
        raise InputError("--engine needs --embeds, or --prompt and --base with the text encoder")
    from cfpp_rt.text import TextEncoder

    encoder = TextEncoder.from_pretrained(arguments.base, dtype=torch.bfloat16, device="cpu", text_len=model.text_len)
    return encoder([arguments.prompt]).float().numpy()
