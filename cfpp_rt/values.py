"""The values that pass between the parts of the runtime, and the dtypes that they may have."""

import dataclasses

import torch

# Dtypes of weights and KV cache, by the names that commands and files use.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KV_DTYPES = {"float8_e4m3": torch.float8_e4m3fn}  # further dtypes of the KV cache; approximate
LINEAR_DTYPES = ("float8_e4m3", "int8")  # further dtypes of the blocks' linear layers; approximate


def empty_prompt_embeds(batch: int, text_dim: int) -> torch.Tensor:
    """Return the prompt_embeds of a model without text: [B, 0, text_dim]."""
    return torch.zeros(batch, 0, text_dim)


@dataclasses.dataclass(frozen=True)
class Latents:
    """A finished block of normalised latents.

    values: float32 [B, n, C, h, w] with n = frames_per_block.
    start: index of its first latent frame in the video.
    """

    values: torch.Tensor
    start: int


@dataclasses.dataclass(frozen=True)
class Frames:
    """Consecutive decoded frames of a video, in host memory.

    pixels: uint8 [B, T, height, width, 3], RGB, 0..255.
    start: index of the first of them in the video.
    """

    pixels: torch.Tensor
    start: int
