"""Attention masks between latent frames for training, and attention under them."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cfpp_rt.errors import InputError


def causal(latent_frames: int, frames_per_block: int, window: int | None = None) -> Tensor:
    """Return the mask of causal attention, bool [F, F] (query, key): a frame attends up to the end of its own block.

    window: number of newest latent frames to attend to, including the own block; None = all.
    """
    _require_blocks(latent_frames, frames_per_block)
    end = (torch.arange(latent_frames) // frames_per_block + 1)[:, None] * frames_per_block
    key = torch.arange(latent_frames)[None]
    visible = key < end
    return visible if window is None else visible & (key >= end - window)


def teacher_forcing(latent_frames: int, frames_per_block: int, window: int | None = None) -> Tensor:
    """Return the mask of teacher forcing, bool [2F, 2F] (query, key): clean frames, then the same frames noised.

    A clean frame attends to the clean frames up to the end of its own block. A noisy frame attends to the noisy frames
    of its own block and to the clean frames of the blocks before it (arXiv 2605.15141, stage 1).
    window: number of newest latent frames to attend to, including the own block; None = all.
    """
    clean = causal(latent_frames, frames_per_block, window)
    block = torch.arange(latent_frames) // frames_per_block
    same = block[:, None] == block[None]
    return torch.cat([torch.cat([clean, torch.zeros_like(clean)], 1), torch.cat([clean & ~same, same], 1)])


def bidirectional(latent_frames: int) -> Tensor:
    """Return the mask of bidirectional attention, bool [F, F]: all True."""
    return torch.ones(latent_frames, latent_frames, dtype=torch.bool)


def attention(
    visible: Tensor, tokens: int, device: torch.device, *, dense: bool = False
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return differentiable attention for q, k, v [B, H, S, D] with S = N * tokens under a mask of frames.

    On CUDA this is FlexAttention, which skips masked blocks; elsewhere the visible keys of each frame are gathered, so
    that masked products are not computed either.
    visible: bool [N, N], query frame by key frame.
    tokens: tokens per latent frame.
    dense: use a mask of all S x S pairs of tokens instead. It compiles nothing, for sequences of some hundred tokens.
    """
    if dense and not bool(visible.all()):
        mask = visible.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1).to(device)
        return functools.partial(F.scaled_dot_product_attention, attn_mask=mask)
    if device.type == "cuda" and not dense:
        return _flex(visible, tokens, device)
    if bool(visible.all()):
        return F.scaled_dot_product_attention
    return functools.partial(_gathered, visible, tokens)


def _gathered(visible: Tensor, tokens: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute attention frame by frame; frames with equally many visible frames share one call."""
    q, k, v = (t.unflatten(2, (-1, tokens)).transpose(1, 2) for t in (q, k, v))  # [B, N, H, tokens, D]
    counts = visible.sum(1)
    out = torch.empty_like(q)
    for count in counts.unique().tolist():
        queries = (counts == count).nonzero().flatten()
        visible_keys = visible[queries].nonzero()[:, 1].reshape(-1, count)
        keys, values = (
            t[:, visible_keys].transpose(2, 3).flatten(3, 4) for t in (k, v)
        )  # [B, n, H, count * tokens, D]
        part = F.scaled_dot_product_attention(q[:, queries].flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1))
        out = out.index_copy(1, queries, part.unflatten(0, (-1, len(queries))))
    return out.transpose(1, 2).flatten(2, 3)


def _flex(visible: Tensor, tokens: int, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask

    visible_keys = visible.to(device)

    def is_visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visible_keys[query // tokens, key // tokens]

    length = len(visible) * tokens
    mask = create_block_mask(is_visible, None, None, length, length, device=device, _compile=True)
    return functools.partial(_compiled_flex(), block_mask=mask)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _require_blocks(latent_frames: int, frames_per_block: int) -> None:
    if latent_frames < 1 or frames_per_block < 1 or latent_frames % frames_per_block:
        raise InputError(
            f"frames must be a multiple >= 1 of the block of {frames_per_block} frames, got {latent_frames}"
        )
