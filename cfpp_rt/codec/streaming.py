"""Decoding of latents to frames while later latents are still being generated."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from cfpp_rt.codec.base import Codec
from cfpp_rt.core.frame_counts import first_frame
from cfpp_rt.errors import InputError, NonFiniteError
from cfpp_rt.values import Frames, Latents


def to_uint8(pixels: Tensor) -> Tensor:
    """Convert float pixels [B, T, 3, height, width] in [-1, 1] to uint8 [B, T, height, width, 3] on the same device.

    Values are truncated, not rounded, as in the files that the published code writes.
    """
    return (pixels.float() * 0.5 + 0.5).clamp_(0, 1).mul_(255).to(torch.uint8).movedim(2, -1).contiguous()


def finite_frames(pixels: Tensor) -> Tensor:
    """Return a flag per frame that is true if its pixels are finite: bool [T], on the same device.

    pixels: float [B, T, 3, height, width] in [-1, 1], as a codec decodes them, so that a sum of them is finite, too.
    """
    return pixels.sum(dim=(0, 2, 3, 4), dtype=torch.float32).isfinite()


def require_finite_frames(finite: Tensor, start: int, temporal_factor: int) -> None:
    """Raise NonFiniteError, naming the first latent frame, if a frame is not finite.

    finite: what `finite_frames` returned, in host memory. start: index of the first of the frames in the video.
    """
    if not bool(finite.all()):
        frame = start + finite.tolist().index(False)
        latent_frame = -(-frame // temporal_factor)
        raise NonFiniteError(f"the decoder of the codec produced NaN or infinity at latent frame {latent_frame}")


def decode_stream(codec: Codec, latents: Iterable[Latents], prefix: Tensor | None = None) -> Iterator[Frames]:
    """Decode blocks as they arrive and yield one `Frames`, in host memory, per `Latents`.

    codec: the codec of the latents, such as `WanVAE` or `TAEHV`.
    latents: blocks in order and without gaps.
    prefix: normalised latents [B, m, C, h, w] before the first block, if that does not begin at latent frame 0. They
        fill the state of the decoder, and their frames are not yielded.

    Raises InputError at a gap, NonFiniteError if the pixels of a block are not finite.
    """
    decoder = codec.decoder()
    expected = 0
    if prefix is not None:
        decoder.decode(prefix)
        expected = prefix.shape[1]
    for block in latents:
        if block.start != expected:
            raise InputError(f"latents must come in order: wanted latent frame {expected}, got {block.start}")
        expected += block.values.shape[1]
        start = first_frame(block.start, codec.temporal_factor)
        pixels = decoder.decode(block.values)
        finite = finite_frames(pixels).to("cpu", non_blocking=True)
        frames = Frames(to_uint8(pixels).cpu(), start)  # waits for the flags, too
        require_finite_frames(finite, start, codec.temporal_factor)
        yield frames
