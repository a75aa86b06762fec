"""Arithmetic between frames of a video and latent frames, for every runtime of a student; needs no torch.

The first latent frame is one frame of the video. Every later latent frame is `temporal_factor` frames.
"""

from cfpp_rt.errors import InputError


def count_frames(latent_frames: int, temporal_factor: int) -> int:
    """Return the number of frames that `latent_frames` latent frames decode to."""
    return 1 + temporal_factor * (latent_frames - 1)


def count_latent_frames(num_frames: int, temporal_factor: int, frames_per_block: int, name: str = "num_frames") -> int:
    """Return the number of latent frames of a video of `num_frames` frames.

    Raises InputError, naming `name`, where the frames do not make whole blocks.
    """
    latent_frames = 1 + (num_frames - 1) // temporal_factor
    if num_frames < 1 or (num_frames - 1) % temporal_factor or latent_frames % frames_per_block:
        below = max(latent_frames // frames_per_block * frames_per_block, frames_per_block)
        fitting = [count_frames(n, temporal_factor) for n in (below, below + frames_per_block)]
        raise InputError(
            f"{name} must be 1 + {temporal_factor} * n frames and make whole blocks of {frames_per_block} latent frames"
            f" (such as {fitting[0]} or {fitting[1]}), got {num_frames}"
        )
    return latent_frames


def first_frame(latent_frame: int, temporal_factor: int) -> int:
    """Return the index of the first frame of a latent frame: 0, 1, 1 + factor, 1 + 2 * factor, ..."""
    return 0 if latent_frame == 0 else 1 + temporal_factor * (latent_frame - 1)
