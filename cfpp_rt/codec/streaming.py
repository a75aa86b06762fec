"""Decoding of latents to frames while later latents are still being generated."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from cfpp_rt.codec.base import Codec
from cfpp_rt.core.frame_counts import first_frame
from cfpp_rt.errors import InputError
from cfpp_rt.values import Frames, Latents


def to_uint8(pixels: Tensor) -> Tensor:
    """Convert float pixels [B, T, 3, height, width] in [-1, 1] to uint8 [B, T, height, width, 3] on the same device.

    Values are truncated, not rounded, as in the files that the published code writes.
    """
    return (pixels.float() * 0.5 + 0.5).clamp_(0, 1).mul_(255).to(torch.uint8).movedim(2, -1).contiguous()


def decode_stream(codec: Codec, latents: Iterable[Latents], prefix: Tensor | None = None) -> Iterator[Frames]:
    """Decode blocks as they arrive and yield one `Frames`, in host memory, per `Latents`.

    codec: the codec of the latents, such as `WanVAE` or `TAEHV`.
    latents: blocks in order and without gaps.
    prefix: normalised latents [B, m, C, h, w] before the first block, if that does not begin at latent frame 0. They
        fill the state of the decoder, and their frames are not yielded.

    Raises InputError at a gap.
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
        pixels = to_uint8(decoder.decode(block.values)).cpu()
        yield Frames(pixels, first_frame(block.start, codec.temporal_factor))
