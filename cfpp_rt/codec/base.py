"""What every codec offers, and the checks that all of them make.

The first latent frame stands for one picture, each later one for `temporal_factor` pictures: F latent frames are
1 + temporal_factor * (F - 1) pictures. A codec is causal: a picture depends on its own and on earlier latent frames.
"""

from typing import Protocol

from torch import Tensor

from cfpp_rt.errors import InputError


class StreamingDecoder(Protocol):
    """Decodes one clip part by part; the parts joined are what `Codec.decode` makes of the whole clip."""

    def decode(self, latents: Tensor) -> Tensor:
        """The next latents [B, n, C, h, w] to float32 pixels [B, T, 3, height, width] in [-1, 1]; mutates the state."""
        ...


class StreamingEncoder(Protocol):
    """Encodes one clip part by part; the parts joined are what `Codec.encode` makes of the whole clip."""

    def encode(self, pixels: Tensor) -> Tensor:
        """The next pictures [B, T, 3, height, width] in [-1, 1] to float32 latents [B, n, C, h, w]; mutates the state.

        Raises InputError unless T completes a latent frame: 1 + temporal_factor * k at the start of the clip,
        temporal_factor * k after it.
        """
        ...


class Codec(Protocol):
    """Turns normalised latents, as the transformer knows them, into pixels and back. Batch rows are independent."""

    temporal_factor: int
    spatial_factor: int
    latent_channels: int

    def decode(self, latents: Tensor) -> Tensor:
        """A whole clip: latents [B, F, C, h, w] to float32 pixels [B, 1 + factor * (F - 1), 3, 8h, 8w] in [-1, 1]."""
        ...

    def decoder(self) -> StreamingDecoder:
        """A decoder at the start of a clip. Several can be in use at the same time."""
        ...

    def encode(self, pixels: Tensor) -> Tensor:
        """A whole clip: pixels [B, 1 + factor * k, 3, 8h, 8w] in [-1, 1] to float32 latents [B, 1 + k, C, h, w]."""
        ...

    def encoder(self) -> StreamingEncoder:
        """An encoder at the start of a clip. Several can be in use at the same time."""
        ...


def require_latents(latents: Tensor, channels: int) -> None:
    """Raise InputError unless latents are float [B, n >= 1, channels, h, w]."""
    if latents.ndim != 5 or latents.shape[2] != channels or 0 in latents.shape or not latents.is_floating_point():
        raise InputError(f"latents must be float [B, n, {channels}, h, w], got {latents.dtype} {list(latents.shape)}")


def require_pixels(pixels: Tensor, spatial_factor: int, temporal_factor: int, *, first: bool) -> None:
    """Raise InputError unless pixels are float [B, T, 3, height, width] that make whole latent frames.

    first: the pictures begin a clip, so that the first one is a latent frame by itself.
    """
    if pixels.ndim != 5 or pixels.shape[2] != 3 or 0 in pixels.shape or not pixels.is_floating_point():
        raise InputError(f"pixels must be float [B, T, 3, height, width], got {pixels.dtype} {list(pixels.shape)}")
    frames, _, height, width = pixels.shape[1:]
    if height % spatial_factor or width % spatial_factor:
        raise InputError(f"height and width must be multiples of {spatial_factor}, got {height}x{width}")
    if (frames - first) % temporal_factor:
        wanted = f"1 + {temporal_factor} * k" if first else f"{temporal_factor} * k"
        raise InputError(f"pixels must have {wanted} pictures, got {frames}")
