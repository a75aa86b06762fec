"""A film of the built-in world from a list of actions: `cfpp generate --student world`."""

import argparse
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, Protocol

from cfpp_rt.errors import InputError
from cfpp_rt.runtime.stream import Stream
from cfpp_rt.values import DTYPES, Frames
from cfpp_rt.world.actions import parse_actions
from cfpp_rt.world.simulator import NONE
from cfpp_rt.world.student import SHIPPED, load_world_pipeline, start

NAME = "world"  # what --student calls it
FPS = 10.0  # pictures per second at which the world is meant to be played
SCALE = 8  # pixels of a film per pixel of the world, whose pictures are 48 x 48
# Options of `cfpp generate` that say nothing to this student.
_UNUSED = (
    *("base", "key", "config", "offload_text", "tiny_vae", "prompt", "prompts", "embeds"),
    *("image", "video", "size", "trajectory", "intrinsics", "linear_dtype"),
)


def open_scripted_stream(
    arguments: argparse.Namespace, changes: dict[str, Any]
) -> tuple[Stream, Iterator[Frames], int]:
    """The stream, its enlarged pictures as they are made, and how many there will be.

    arguments: of `cfpp generate`; actions decide the number of pictures unless --frames says more. changes: fields of
    the student's `RolloutConfig` that are to be others. Raises InputError for options that this student cannot use.
    """
    for name in _UNUSED:
        if getattr(arguments, name) is not None:
            raise InputError(f"--student {NAME} takes no --{name.replace('_', '-')}")
    actions = parse_actions(arguments.actions or "")
    pipeline = load_world_pipeline(
        arguments.checkpoint or SHIPPED, dtype=DTYPES[arguments.dtype or "float32"], device=arguments.device
    )
    config = dataclasses.replace(pipeline.config, **changes)
    frames_per_block = config.frames_per_block
    num_frames = (
        arguments.num_frames if arguments.num_frames is not None else whole_blocks(1 + len(actions), frames_per_block)
    )
    stream = start(pipeline, arguments.seed, num_frames=num_frames, config=config)
    return stream, follow(stream, actions, frames_per_block), num_frames


def whole_blocks(num_frames: int, frames_per_block: int) -> int:
    """The first block is given, the others are made: at least one."""
    return max(2 * frames_per_block, -(-num_frames // frames_per_block) * frames_per_block)


class Actor(Protocol):
    """A stream of pictures that takes actions: `Stream`, or one of another runtime."""

    def __next__(self) -> Frames: ...

    def set_actions(self, actions: Any) -> None: ...


def follow(stream: Actor, actions: list[int], frames_per_block: int) -> Iterator[Frames]:
    """The given picture, then blocks that follow the actions, enlarged: the world's pictures are small."""
    yield _enlarged(next(stream))
    for begin in itertools.count(0, frames_per_block):
        now = actions[begin : begin + frames_per_block]
        stream.set_actions([now + [NONE] * (frames_per_block - len(now))])
        num_frames = next(stream, None)
        if num_frames is None:
            return
        yield _enlarged(num_frames)


def _enlarged(num_frames: Frames) -> Frames:
    return dataclasses.replace(
        num_frames, pixels=num_frames.pixels.repeat_interleave(SCALE, dim=2).repeat_interleave(SCALE, dim=3)
    )
