"""The student that a sub-command of `cfpp export` is about: its options, and what they load."""

import argparse
import dataclasses
import re
from pathlib import Path

from cfpp_rt.codec.base import Codec
from cfpp_rt.config import PRESETS, ModelConfig, RolloutConfig, rollout_preset
from cfpp_rt.core.frame_counts import count_latent_frames
from cfpp_rt.errors import InputError
from cfpp_rt.export.bundle import LINEAR_DTYPES
from cfpp_rt.model.transformer import CausalWanTransformer, random_model
from cfpp_rt.model.weights import load_model
from cfpp_rt.pipeline import load_codec
from cfpp_rt.random_weights import SMALL
from cfpp_rt.values import DTYPES
from cfpp_rt.world.sprites import SIZE
from cfpp_rt.world.student import SHIPPED, load_world_pipeline

WORLD = "world"
_SPATIAL_FACTOR = 8  # of every codec there is


@dataclasses.dataclass(frozen=True)
class Source:
    """A loaded student: model, settings, codec if asked for, size (h, w) of its latents, and latent frames."""

    model: CausalWanTransformer
    rollout: RolloutConfig
    codec: Codec | None
    latent_size: tuple[int, int]
    frames: int
    name: str


def add_source(parser: argparse.ArgumentParser) -> None:
    source = parser.add_argument_group("the student")
    source.add_argument("checkpoint", nargs="?", help="student: .pt, .safetensors, or a directory")
    names = f"{', '.join(PRESETS)}, {WORLD} (default: %(default)s)"
    source.add_argument("--student", default="framewise-2step", help=names)
    source.add_argument("--key", help="entry of a .pt container (default: generator_ema, else generator)")
    source.add_argument("--config", metavar="JSON", help="model sizes, where the checkpoint does not tell them")
    source.add_argument("--random-weights", action="store_true", help="a small student of random weights")
    source.add_argument("--base", metavar="DIR", help="Wan2.1 directory: also its VAE's decoder")
    source.add_argument("--tiny-vae", metavar="FILE", help="also the decoder of the tiny autoencoder (taew2_1.pth)")
    source.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of weights and caches (default: %(default)s)"
    )
    run = parser.add_argument_group("how it is run")
    run.add_argument("--size", metavar="HxW", help=f"of the pictures (default: 480x832; {WORLD}: {SIZE}x{SIZE})")
    run.add_argument(
        "--frames", type=int, help="pictures that fit without a window (default: 81, or the whole blocks of them)"
    )
    run.add_argument("--steps", metavar="LIST", help="as 1000,500; the first block keeps the student's own")
    run.add_argument("--window", type=int, metavar="N", help="latent frames that attention sees (default: all)")
    run.add_argument("--sinks", type=int, metavar="N", help="first latent frames that stay visible (default: 0)")


def add_output(parser: argparse.ArgumentParser) -> None:
    """Options of the commands that export: what is made of the student, and where."""
    parser.add_argument("--batch", type=int, default=1, help="rows made together (default: %(default)s)")
    parser.add_argument(
        "--linear-dtype",
        choices=LINEAR_DTYPES,
        help="linear layers of the blocks in 8 bits: approximate (default: --dtype)",
    )
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="folder to be made")


def load_source(arguments: argparse.Namespace) -> Source:
    """Raises InputError or CheckpointError as the loaders do."""
    dtype, world = DTYPES[arguments.dtype], arguments.student == WORLD
    codec: Codec | None = None
    factor = 4
    if world:
        pipeline = load_world_pipeline(arguments.checkpoint or SHIPPED, dtype=dtype, fuse=False)
        model, rollout, codec = pipeline.model, pipeline.config, pipeline.codec
        factor = codec.temporal_factor
    else:
        rollout = rollout_preset(arguments.student)
        if arguments.random_weights:
            camera = arguments.student.startswith("camera-")
            model = random_model(dataclasses.replace(SMALL, camera=camera), seed=0, dtype=dtype)
        elif arguments.checkpoint is None:
            raise InputError("a checkpoint is needed (or --random-weights)")
        else:
            config = None if arguments.config is None else ModelConfig.from_json(arguments.config)
            model = load_model(arguments.checkpoint, config=config, key=arguments.key, dtype=dtype)
        if arguments.base is not None or arguments.tiny_vae is not None:
            codec = load_codec(arguments.base or "", tiny_vae=arguments.tiny_vae, dtype=dtype, device="cpu")
    changes = {name: getattr(arguments, name) for name in ("window", "sinks") if getattr(arguments, name) is not None}
    if arguments.steps is not None:
        if not re.fullmatch(r"[0-9]{1,6}(,[0-9]{1,6})*", arguments.steps):
            raise InputError(f"--steps must be integers as 1000,500, got {arguments.steps}")
        changes["steps"] = tuple(int(step) for step in arguments.steps.split(","))
    rollout = rollout.replace(**changes)
    size = latent_size(arguments.size or (f"{SIZE}x{SIZE}" if world else "480x832"), "--size")
    block = rollout.frames_per_block
    frames = max(21 // block, 1) * block  # as `cfpp generate` makes by default
    if arguments.frames is not None:
        frames = count_latent_frames(arguments.frames, factor, block)
    name = (
        arguments.student if arguments.checkpoint is None else f"{arguments.student}: {Path(arguments.checkpoint).name}"
    )
    return Source(model, rollout, codec, size, frames, name)


def latent_size(text: str, option: str) -> tuple[int, int]:
    """Height and width of the latents of pictures given as "480x832"."""
    match = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", text)
    if match is None or int(match[1]) % _SPATIAL_FACTOR or int(match[2]) % _SPATIAL_FACTOR:
        raise InputError(f"{option} must be HEIGHTxWIDTH in multiples of {_SPATIAL_FACTOR}, got {text}")
    return int(match[1]) // _SPATIAL_FACTOR, int(match[2]) // _SPATIAL_FACTOR
