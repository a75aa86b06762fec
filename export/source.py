"""The options by which a sub-command of `cfpp export` names a student, and the student that they load."""

import argparse
import dataclasses
import re
from pathlib import Path

from cfpp_rt.codec.base import Codec
from cfpp_rt.config import PRESETS, ModelConfig, RolloutConfig, rollout_preset
from cfpp_rt.core.frame_counts import count_latent_frames
from cfpp_rt.errors import InputError
from cfpp_rt.export.bundle import BUNDLE_LINEAR_DTYPES
from cfpp_rt.model.transformer import CausalWanTransformer, random_model
from cfpp_rt.model.weights import load_model
from cfpp_rt.pipeline import load_codec
from cfpp_rt.random_weights import SMALL
from cfpp_rt.values import DTYPES
from cfpp_rt.world.sprites import SIZE
from cfpp_rt.world.student import SHIPPED, load_world_pipeline

WORLD = "world"
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
    names = f"{', '.join(PRESETS)}, {WORLD} (default: %(default)s)"
    source.add_argument("--student", default="framewise-2step", help=names)
    source.add_argument("--key", help="entry of a .pt container (default: generator_ema, else generator)")
    source.add_argument("--config", metavar="JSON", help="model sizes, if the checkpoint does not contain them")
    source.add_argument("--random-weights", action="store_true", help="a small student with random weights")
    source.add_argument("--base", metavar="DIR", help="Wan2.1 directory: also export its VAE's decoder")
    source.add_argument("--tiny-vae", metavar="FILE", help="also export the tiny autoencoder's decoder (taew2_1.pth)")
    source.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of weights and caches (default: %(default)s)"
    )
    run = parser.add_argument_group("rollout")
    run.add_argument("--size", metavar="HxW", help=f"of the frames (default: 480x832; {WORLD}: {SIZE}x{SIZE})")
    run.add_argument(
        "--frames", type=int, help="frames that fit without a window (default: 81, or as many as make whole blocks)"
    )
    run.add_argument("--steps", metavar="LIST", help="as 1000,500; the first block keeps the student's own")
    run.add_argument("--window", type=int, metavar="N", help="latent frames that attention sees (default: all)")
    run.add_argument("--sinks", type=int, metavar="N", help="first latent frames that stay visible (default: 0)")


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
    dtype, world = DTYPES[arguments.dtype], arguments.student == WORLD
    codec: Codec | None = None
    temporal_factor = 4
    if world:
        pipeline = load_world_pipeline(arguments.checkpoint or SHIPPED, dtype=dtype, fuse=False)
        model, config, codec = pipeline.model, pipeline.config, pipeline.codec
        temporal_factor = codec.temporal_factor
    else:
        config = rollout_preset(arguments.student)
        if arguments.random_weights:
            camera = arguments.student.startswith("camera-")
            model = random_model(dataclasses.replace(SMALL, camera=camera), seed=0, dtype=dtype)
        elif arguments.checkpoint is None:
            raise InputError("a checkpoint is needed (or --random-weights)")
        else:
            model_config = None if arguments.config is None else ModelConfig.from_json(arguments.config)
            model = load_model(arguments.checkpoint, config=model_config, key=arguments.key, dtype=dtype)
        if arguments.base is not None or arguments.tiny_vae is not None:
            codec = load_codec(arguments.base or "", tiny_vae=arguments.tiny_vae, dtype=dtype, device="cpu")
    changes = {name: getattr(arguments, name) for name in ("window", "sinks") if getattr(arguments, name) is not None}
    if arguments.steps is not None:
        if not re.fullmatch(r"[0-9]{1,6}(,[0-9]{1,6})*", arguments.steps):
            raise InputError(f"--steps must be integers as 1000,500, got {arguments.steps}")
        changes["steps"] = tuple(int(step) for step in arguments.steps.split(","))
    config = config.replace(**changes)
    size = latent_size(arguments.size or (f"{SIZE}x{SIZE}" if world else "480x832"), "--size")
    n = config.frames_per_block
    latent_frames = max(21 // n, 1) * n  # the default of `cfpp generate`
    if arguments.frames is not None:
        latent_frames = count_latent_frames(arguments.frames, temporal_factor, n)
    name = arguments.student
    if arguments.checkpoint is not None:
        name = f"{name}: {Path(arguments.checkpoint).name}"
    return Source(model, config, codec, size, latent_frames, name)


def latent_size(text: str, option: str) -> tuple[int, int]:
    """Return (h, w) of the latents of frames whose size is given as "480x832"."""
    match = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", text)
    if match is None or int(match[1]) % _SPATIAL_FACTOR or int(match[2]) % _SPATIAL_FACTOR:
        raise InputError(f"{option} must be HEIGHTxWIDTH in multiples of {_SPATIAL_FACTOR}, got {text}")
    return int(match[1]) // _SPATIAL_FACTOR, int(match[2]) // _SPATIAL_FACTOR
