"""Which latent frame lies in which slot of a cache: host arithmetic that every runtime of a student shares, torch-free.

`slot(frame) = frame` for the sinks, `sinks + (frame - sinks) % ring` for all others.
"""

from cfpp_rt.config import RolloutConfig
from cfpp_rt.errors import InputError

Range = tuple[int, int]


class FrameRing:
    """Which latent frame lies in which slot. Pure host arithmetic: it is what makes every write and read safe.

    sinks, ring: number of slots that are never reused, and that are reused in turn. block: frames written together;
    sinks and ring must be multiples of it, so that a write never wraps.
    """

    def __init__(self, sinks: int, ring: int, block: int):
        if sinks % block or ring % block or ring < block:
            raise InputError(f"sinks and ring must be multiples of the block of {block} frames, got {sinks} and {ring}")
        self.sinks, self.ring, self.block = sinks, ring, block
        self.end = 0  # frames written so far
        self.holds: list[int | None] = [None] * (sinks + ring)

    @property
    def capacity(self) -> int:
        return self.sinks + self.ring

    def slot(self, frame: int) -> int:
        return frame if frame < self.sinks else self.sinks + (frame - self.sinks) % self.ring

    def write(self, start: int) -> int:
        """Note that the block starting at frame `start` is written; return its first slot.

        Raises InputError unless it is the next block or one that is still held.
        """
        first = self.slot(start) if start >= 0 else 0
        if start % self.block or not (start == self.end or (0 <= start < self.end and self.holds[first] == start)):
            raise InputError(f"frame must be the next one ({self.end}) or the start of a held block, got {start}")
        for offset in range(self.block):
            self.holds[first + offset] = start + offset
        self.end = max(self.end, start + self.block)
        return first

    def visible(self, end: int, window: int | None) -> list[int]:
        """Frames that queries of the block ending before frame `end` see: the sinks and the newest of the window.

        Raises InputError if one of them is no longer (or not yet) held.
        """
        newest = end if window is None else window - self.sinks
        frames = [*range(min(self.sinks, end)), *range(max(self.sinks, end - newest), end)]
        lost = [frame for frame in frames if self.holds[self.slot(frame)] != frame]
        if lost:
            raise InputError(f"frames seen by the block ending at {end} must be in the cache, missing {lost}")
        return frames

    def runs(self, frames: list[int]) -> list[Range]:
        """The slots of `frames` as maximal runs [first, last), ascending."""
        runs: list[Range] = []
        for slot in sorted(self.slot(frame) for frame in frames):
            if runs and runs[-1][1] == slot:
                runs[-1] = (runs[-1][0], slot + 1)
            else:
                runs.append((slot, slot + 1))
        return runs


def slots_for(config: RolloutConfig, latent_frames: int | None) -> tuple[int, int]:
    """Return sinks and ring of the smallest cache that a rollout of `latent_frames` (None = without end) needs.

    Fused refresh keeps one spare block: while the next block's keys are written, the clean queries of the block
    before still see the oldest frame of their own window.
    """
    block = config.frames_per_block
    if config.window is None:
        if latent_frames is None:
            raise InputError("window must be given for a rollout without end, got None")
        needed = latent_frames
    else:
        ring = -(-(config.window - config.sinks) // block) * block
        needed = config.sinks + ring + (block if config.refresh == "fused" else 0)
        if latent_frames is not None:
            needed = min(needed, latent_frames)
    needed = -(-needed // block) * block
    sinks = min(config.sinks, needed - block)
    return sinks, needed - sinks
