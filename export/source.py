"""The options by which a sub-command of `cfpp export` names a student, and the student that they load."""

import argparse
import dataclasses
from pathlib import Path

from cfpp_rt.codec.base import Codec
from cfpp_rt.config import ModelConfig, RolloutConfig
from cfpp_rt.core.frame_counts import count_latent_frames
from cfpp_rt.errors import InputError
from cfpp_rt.export.bundle import BUNDLE_LINEAR_DTYPES
from cfpp_rt.model.transformer import CausalWanTransformer, random_model
from cfpp_rt.model.weights import load_model
from cfpp_rt.options import (
    DEFAULT_PRESET,
    WORLD,
    add_option,
    add_options,
    parse_preset,
    parse_size,
    rollout_overrides,
)
from cfpp_rt.pipeline import load_codec
from cfpp_rt.random_weights import SMALL
from cfpp_rt.values import DTYPES
from cfpp_rt.world.sprites import SIZE
from cfpp_rt.world.student import SHIPPED, load_world_pipeline

_SPATIAL_FACTOR = 8  # of every codec


@dataclasses.dataclass(frozen=True)
class Source:
    """A loaded student, and the sizes to export it for.

    codec: None unless an option names one.
    latent_size: (h, w).
    latent_frames: latent frames that fit without a window.
    name: for the card.
    """

    model: CausalWanTransformer
    config: RolloutConfig
    codec: Codec | None
    latent_size: tuple[int, int]
    latent_frames: int
    name: str


def add_source(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a student and its rollout settings."""
    source = parser.add_argument_group("student")
    source.add_argument("checkpoint", nargs="?", help="student: .pt, .safetensors, or a directory")
    add_options(source, "--student", "--key", "--config", "--random-weights")
    add_option(source, "--base", help="Wan2.1 directory: also export its VAE's decoder")
    add_option(source, "--tiny-vae", help="also export the tiny autoencoder's decoder (taew2_1.pth)")
    add_option(source, "--dtype", default="float32", help="of weights and caches (default: %(default)s)")
    run = parser.add_argument_group("rollout")
    add_option(run, "--size", help=f"of the frames (default: 480x832; {WORLD}: {SIZE}x{SIZE})")
    add_option(run, "--frames", help="frames that fit without a window (default: 81, or as many as make whole blocks)")
    add_options(run, "--steps", "--window", "--sinks")


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add the options of the sub-commands that write a bundle."""
    parser.add_argument("--batch", type=int, default=1, help="videos made together (default: %(default)s)")
    parser.add_argument(
        "--linear-dtype",
        choices=BUNDLE_LINEAR_DTYPES,
        help="linear layers of the blocks in 8 bits: approximate (default: --dtype)",
    )
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="folder to create")


def load_source(arguments: argparse.Namespace) -> Source:
    """Load the student that the options name. Raises InputError or CheckpointError as the loaders do."""
    dtype, student = DTYPES[arguments.dtype], arguments.student or DEFAULT_PRESET
    world = student == WORLD
    codec: Codec | None = None
    temporal_factor = 4
    if world:
        pipeline = load_world_pipeline(arguments.checkpoint or SHIPPED, dtype=dtype, fuse=False)
        model, config, codec = pipeline.model, pipeline.config, pipeline.codec
        temporal_factor = codec.temporal_factor
    else:
        config = parse_preset(student)
        if arguments.random_weights:
            camera = student.startswith("camera-")
            model = random_model(dataclasses.replace(SMALL, camera=camera), seed=0, dtype=dtype)
        elif arguments.checkpoint is None:
            raise InputError("a checkpoint is needed (or --random-weights)")
        else:
            model_config = None if arguments.config is None else ModelConfig.from_json(arguments.config)
            model = load_model(arguments.checkpoint, config=model_config, key=arguments.key, dtype=dtype)
        if arguments.base is not None or arguments.tiny_vae is not None:
            codec = load_codec(arguments.base or "", tiny_vae=arguments.tiny_vae, dtype=dtype, device="cpu")
    config = config.replace(**rollout_overrides(arguments))
    size = latent_size(arguments.size or (f"{SIZE}x{SIZE}" if world else "480x832"), "--size")
    n = config.frames_per_block
    latent_frames = max(21 // n, 1) * n  # the default of `cfpp generate`
    if arguments.frames is not None:
        latent_frames = count_latent_frames(arguments.frames, temporal_factor, n)
    name = student
    if arguments.checkpoint is not None:
        name = f"{name}: {Path(arguments.checkpoint).name}"
    return Source(model, config, codec, size, latent_frames, name)


def latent_size(text: str, option: str) -> tuple[int, int]:
    """Return (h, w) of the latents of frames whose size is given as "480x832"."""
    height, width = parse_size(text, _SPATIAL_FACTOR, option)
    return height // _SPATIAL_FACTOR, width // _SPATIAL_FACTOR
