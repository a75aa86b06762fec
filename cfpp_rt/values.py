"""What flows through the runtime: text becomes Conditioning, Conditioning becomes Latents, Latents become Frames."""

import dataclasses

import torch

# What weights and cache may be held in, by the name that commands and files use.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KV_DTYPES = {"float8_e4m3": torch.float8_e4m3fn}  # what the cache alone may be held in: approximate

LINEAR_DTYPES = ("float8_e4m3", "int8")  # what the blocks' products alone may be computed in: approximate


@dataclasses.dataclass(frozen=True)
class Conditioning:
    """Text embeddings, float [B, text_len, text_dim]. Rows past the prompt's end are zero, and are attended to.

    A model without text takes [B, 0, text_dim]: it is `Conditioning.none(B, text_dim)`.
    """

    embeds: torch.Tensor

    @classmethod
    def none(cls, batch: int, text_dim: int) -> "Conditioning":
        return cls(torch.zeros(batch, 0, text_dim))


@dataclasses.dataclass(frozen=True)
class Latents:
    """One finished block of normalised latents.

    values: float [B, n, C, h, w] with n = frames_per_block (or the given frames of a prefill).
    start: index of its first latent frame in the video.
    """

    values: torch.Tensor
    start: int


@dataclasses.dataclass(frozen=True)
class Frames:
    """Decoded pictures in host memory.

    pixels: uint8 [B, T, height, width, 3], RGB, 0..255. start: index of its first picture in the video.
    """

    pixels: torch.Tensor
    start: int
