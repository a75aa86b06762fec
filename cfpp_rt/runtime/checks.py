"""Checks of the tensors that a rollout is given; they run before anything changes."""

from typing import Any

import torch
from torch import Tensor

from cfpp_rt.core.controls import check_latents_shape
from cfpp_rt.errors import InputError
from cfpp_rt.model.transformer import CausalWanTransformer

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_prompt_embeds(prompt_embeds: Any, model: CausalWanTransformer, batch: int | None = None) -> int:
    """Return the batch of text embeddings [B, text_len, text_dim].

    batch: the batch that is wanted; None = any.
    Raises InputError for another shape or dtype, and for what is not finite in the dtype of the model.
    """
    wanted = f"[{'B' if batch is None else batch}, {model.config.text_len}, {model.config.text_dim}]"
    if not isinstance(prompt_embeds, Tensor):
        raise InputError(f"prompt_embeds must be a tensor {wanted}, got {type(prompt_embeds).__name__}")
    shape = tuple(prompt_embeds.shape)
    if len(shape) == 3 and batch not in (None, shape[0]):
        raise InputError(f"prompt_embeds must have batch {batch}, got {shape[0]}")
    if len(shape) != 3 or shape[1:] != (model.config.text_len, model.config.text_dim) or shape[0] < 1:
        raise InputError(f"prompt_embeds must be {wanted}, got {list(shape)}")
    if prompt_embeds.dtype not in _FLOATS or prompt_embeds.is_meta or prompt_embeds.layout != torch.strided:
        names = ", ".join(str(dtype) for dtype in _FLOATS)
        raise InputError(
            f"prompt_embeds must be a dense tensor of {names},"
            f" got {prompt_embeds.dtype}, {prompt_embeds.layout}, on {prompt_embeds.device}"
        )
    if not bool(prompt_embeds.to(model.dtype).isfinite().all()):
        raise InputError(f"prompt_embeds must be finite in {model.dtype}, got NaN or infinity")
    return shape[0]


def check_initial_latents(initial_latents: Tensor, batch: int, frame_shape: tuple[int, int, int]) -> int:
    """Return the number of given latent frames; raise InputError for another shape and for what is not finite."""
    check_latents_shape("initial_latents", initial_latents.shape, batch, frame_shape)
    if not bool(initial_latents.isfinite().all()):
        raise InputError("initial_latents must be finite, got NaN or infinity")
    return initial_latents.shape[1]
