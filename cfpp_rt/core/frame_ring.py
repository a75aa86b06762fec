"""The assignment of latent frames to the slots of a KV cache: host arithmetic without torch, shared by all runtimes.

Sink frames stay in slot `frame`; every other frame is in slot `sinks + (frame - sinks) % ring`. In this module "frame"
means latent frame.
"""

from cfpp_rt.config import MAX_SLOTS, RolloutConfig
from cfpp_rt.errors import InputError

Range = tuple[int, int]


class FrameRing:
    """The frame that each slot stores; refuses every write and read that the cache cannot serve.

    sinks: number of slots that are never reused.
    ring: number of slots that are reused, the oldest frame first.
    frames_per_block: number of frames that are written together. sinks and ring must be multiples of it, so that a
        write never wraps around.

    end: number of frames written so far. stored_frames: the frame in each slot, None = empty.
    Raises InputError if sinks or ring is not a multiple, or ring is smaller than a block.
    """

    def __init__(self, sinks: int, ring: int, frames_per_block: int):
        if sinks % frames_per_block or ring % frames_per_block or ring < frames_per_block:
            raise InputError(
                f"sinks and ring must be multiples of the block of {frames_per_block} frames, got {sinks} and {ring}"
            )
        if sinks + ring > MAX_SLOTS:
            raise InputError(
                f"sinks and ring must be at most {MAX_SLOTS} latent frames together, got {sinks + ring}: a window keeps"
                " the cache of a long video small"
            )
        self.sinks, self.ring_slots, self.frames_per_block = sinks, ring, frames_per_block
        self.end = 0
        self.stored_frames: list[int | None] = [None] * (sinks + ring)

    @property
    def capacity(self) -> int:
        """Number of slots."""
        return self.sinks + self.ring_slots

    def slot(self, frame: int) -> int:
        """Return the slot of a frame."""
        return frame if frame < self.sinks else self.sinks + (frame - self.sinks) % self.ring_slots

    def write(self, start: int) -> int:
        """Record that the block starting at frame `start` is written and return its first slot.

        Raises InputError unless it is the next block or one that is still stored.
        """
        first = self.slot(start) if start >= 0 else 0
        is_next, is_stored = start == self.end, 0 <= start < self.end and self.stored_frames[first] == start
        if start % self.frames_per_block or not (is_next or is_stored):
            raise InputError(f"frame must be the next one ({self.end}) or the start of a stored block, got {start}")
        for offset in range(self.frames_per_block):
            self.stored_frames[first + offset] = start + offset
        self.end = max(self.end, start + self.frames_per_block)
        return first

    def visible(self, end: int, window: int | None) -> list[int]:
        """Return the frames that queries of the block ending before frame `end` see: sinks and newest frames.

        window: number of visible frames, the sinks included; None = all frames before `end`.
        Raises InputError if one of them is no longer, or not yet, stored.
        """
        newest = end if window is None else window - self.sinks
        frames = [*range(min(self.sinks, end)), *range(max(self.sinks, end - newest), end)]
        missing = [frame for frame in frames if self.stored_frames[self.slot(frame)] != frame]
        if missing:
            raise InputError(f"frames seen by the block ending at {end} must be in the cache, missing {missing}")
        return frames

    def runs(self, frames: list[int]) -> list[Range]:
        """Return the slots of `frames` as maximal runs [first, last), in ascending order."""
        runs: list[Range] = []
        for slot in sorted(self.slot(frame) for frame in frames):
            if runs and runs[-1][1] == slot:
                runs[-1] = (runs[-1][0], slot + 1)
            else:
                runs.append((slot, slot + 1))
        return runs


def slots_for(config: RolloutConfig, latent_frames: int | None) -> tuple[int, int]:
    """Return sinks and ring of the smallest cache that a rollout of `latent_frames` (None = without end) needs.

    Fused refresh needs one spare block: while the keys of the next block are written, the clean queries of the previous
    block still see the oldest frame of their own window. Raises InputError for a rollout without end or window.
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
