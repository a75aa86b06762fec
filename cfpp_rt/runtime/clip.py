"""A video of known length that a command writes to a file."""

import dataclasses
from collections.abc import Iterator
from typing import Any, Protocol

from cfpp_rt.device.timing import Timings
from cfpp_rt.values import Frames


class TimedStream(Protocol):
    """A stream that times its stages: `Stream`, or one of another runtime."""

    timings: Timings
    rollout: Any


@dataclasses.dataclass(frozen=True)
class Clip:
    """A stream with its length.

    stream: its timings are printed when the clip is written.
    frames: the frames to write, as they are generated.
    num_frames: how many there will be.
    fps: frames per second of the file.
    """

    stream: TimedStream
    frames: Iterator[Frames]
    num_frames: int
    fps: float
