"""The interface of all codecs, and the checks that they share.

The first latent frame stands for one frame, each later one for `temporal_factor` frames: F latent frames are
1 + temporal_factor * (F - 1) frames. A codec is causal: a frame depends on its own and on earlier latent frames.
"""

from typing import Protocol

from torch import Tensor

from cfpp_rt.errors import InputError


class StreamingDecoder(Protocol):
    """Decodes one clip part by part; the concatenated parts equal `Codec.decode` of the entire clip."""

    def decode(self, latents: Tensor) -> Tensor:
        """Decode the next latents [B, n, C, h, w] to float32 pixels [B, T, 3, height, width] in [-1, 1].

        Pixels that come out as NaN or infinity are NaN, see `clamp_pixels`. Updates the state.
        """
        ...


class StreamingEncoder(Protocol):
    """Encodes one clip part by part; the concatenated parts equal `Codec.encode` of the entire clip."""

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode the next frames [B, T, 3, height, width] in [-1, 1] to float32 latents [B, n, C, h, w].

        Updates the state. Raises InputError unless T completes a latent frame: 1 + temporal_factor * k at the start of
        the clip, temporal_factor * k after it.
        """
        ...


class Codec(Protocol):
    """Converts between pixels and the normalised latents of the transformer. Batch rows are independent."""

    temporal_factor: int
    spatial_factor: int
    latent_channels: int

    def decode(self, latents: Tensor) -> Tensor:
        """Decode an entire clip: latents [B, F, C, h, w] to float32 pixels in [-1, 1].

        Returns [B, 1 + temporal_factor * (F - 1), 3, spatial_factor * h, spatial_factor * w].
        """
        ...

    def decoder(self) -> StreamingDecoder:
        """Return a decoder at the start of a clip. Several can be in use at the same time."""
        ...

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode an entire clip: pixels [B, 1 + temporal_factor * k, 3, height, width] in [-1, 1] to float32 latents.

        Returns [B, 1 + k, C, height / spatial_factor, width / spatial_factor].
        """
        ...

    def encoder(self) -> StreamingEncoder:
        """Return an encoder at the start of a clip. Several can be in use at the same time."""
        ...


def clamp_pixels(pixels: Tensor, lowest: float) -> Tensor:
    """Limit float pixels to lowest..1. Infinity becomes NaN, not a limit, so that a check of the result finds it."""
    return pixels.clamp(lowest, 1).add_(pixels, alpha=0)


def require_latents(latents: Tensor, channels: int) -> None:
    """Raise InputError unless latents are float [B, n >= 1, channels, h, w]."""
    if latents.ndim != 5 or latents.shape[2] != channels or 0 in latents.shape or not latents.is_floating_point():
        raise InputError(f"latents must be float [B, n, {channels}, h, w], got {latents.dtype} {list(latents.shape)}")


def require_pixels(pixels: Tensor, spatial_factor: int, temporal_factor: int, *, first: bool) -> None:
    """Raise InputError unless pixels are float [B, T, 3, height, width] of complete latent frames.

    first: True if the frames begin a clip, so that the first one is a latent frame by itself.
    """
    if pixels.ndim != 5 or pixels.shape[2] != 3 or 0 in pixels.shape or not pixels.is_floating_point():
        raise InputError(f"pixels must be float [B, T, 3, height, width], got {pixels.dtype} {list(pixels.shape)}")
    frames, _, height, width = pixels.shape[1:]
    if height % spatial_factor or width % spatial_factor:
        raise InputError(f"height and width must be multiples of {spatial_factor}, got {height}x{width}")
    if (frames - first) % temporal_factor:
        wanted = f"1 + {temporal_factor} * k" if first else f"{temporal_factor} * k"
        raise InputError(f"pixels must have {wanted} frames, got {frames}")
