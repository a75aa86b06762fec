"""Videos of the built-in world from a list of actions: `cfpp generate --student world`."""

import argparse
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, Protocol

from cfpp_rt.errors import InputError
from cfpp_rt.options import WORLD, refuse_unused, rollout_overrides
from cfpp_rt.pipeline import choose_threads
from cfpp_rt.runtime.clip import Clip
from cfpp_rt.values import DTYPES, Frames
from cfpp_rt.world.actions import parse_actions_option
from cfpp_rt.world.simulator import NONE
from cfpp_rt.world.sprites import SIZE
from cfpp_rt.world.student import SHIPPED, load_world_pipeline, start

FPS = 10.0  # frames per second at which the world is meant to be played
SCALE = 8  # pixels of a video per pixel of the world, whose frames are 48 x 48
# Options of `cfpp generate` that this student takes.
_TAKES = {"checkpoint", "student", "actions", "frames", "steps", "window", "sinks", "refresh", "dtype", "kv_dtype"}


def open_clip(arguments: argparse.Namespace) -> Clip:
    """Open the clip of a list of actions, enlarged for the file.

    arguments: of `cfpp generate`. Without --frames the actions determine the number of frames.
    Raises InputError for options that this student cannot use.
    """
    refuse_unused(arguments, _TAKES, f"--student {WORLD}")
    actions = parse_actions_option(arguments.actions)
    pipeline = load_world_pipeline(
        arguments.checkpoint or SHIPPED, dtype=DTYPES[arguments.dtype or "float32"], device=arguments.device
    )
    config = pipeline.config.replace(**rollout_overrides(arguments))
    choose_threads(pipeline, config, (SIZE, SIZE))
    n = config.frames_per_block
    num_frames = frames_for(arguments.frames, actions, n)
    stream = start(pipeline, arguments.seed, num_frames=num_frames, config=config)
    return Clip(stream, follow(stream, actions, n), num_frames, FPS)


def frames_for(requested: int | None, actions: list[int], frames_per_block: int) -> int:
    """Return the number of frames: those requested, or the given first block and whole blocks for all actions.

    requested: --frames. Raises InputError where they are too few for the actions.
    """
    n = frames_per_block
    needed = n + max(-(-len(actions) // n) * n, n)
    if requested is not None and requested < n + len(actions):
        raise InputError(
            f"--frames must be at least {needed}, the first block and one frame for each of {len(actions)} actions,"
            f" got {requested}"
        )
    return needed if requested is None else requested


class ActionStream(Protocol):
    """A stream of frames that takes actions: `Stream`, or the stream of another runtime."""

    def __next__(self) -> Frames: ...

    def set_actions(self, actions: Any) -> None: ...


def follow(stream: ActionStream, actions: list[int], frames_per_block: int) -> Iterator[Frames]:
    """Yield the given first block, then blocks that follow the actions; all are enlarged by SCALE."""
    yield _enlarged(next(stream))
    for begin in itertools.count(0, frames_per_block):
        block = actions[begin : begin + frames_per_block]
        stream.set_actions([block + [NONE] * (frames_per_block - len(block))])
        frames = next(stream, None)
        if frames is None:
            return
        yield _enlarged(frames)


def _enlarged(frames: Frames) -> Frames:
    pixels = frames.pixels.repeat_interleave(SCALE, dim=2).repeat_interleave(SCALE, dim=3)
    return dataclasses.replace(frames, pixels=pixels)
