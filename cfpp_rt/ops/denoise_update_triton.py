"""Triton kernel of denoise_update: one program per span of a frame."""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

SPAN = 1024


@triton.jit
def _denoise_update(
    x0_ptr,
    x_next_ptr,
    x_ptr,
    velocity_ptr,
    noise_ptr,
    sigma_ptr,
    next_sigma_ptr,
    frames,
    frame_size,
    sigma_batch,
    sigma_frame,
    next_batch,
    next_latent_frame,
    HAS_NOISE: tl.constexpr,
    SPAN: tl.constexpr,
):
    flat = tl.program_id(1).to(tl.int64)
    batch, frame = flat // frames, flat % frames
    i = tl.program_id(0) * SPAN + tl.arange(0, SPAN)
    inside = i < frame_size
    offset = flat * frame_size + i
    x = tl.load(x_ptr + offset, mask=inside)
    velocity = tl.load(velocity_ptr + offset, mask=inside)
    sigma = tl.load(sigma_ptr + batch * sigma_batch + frame * sigma_frame)
    clean = x - sigma * velocity.to(tl.float32)
    tl.store(x0_ptr + offset, clean, mask=inside)
    if HAS_NOISE:
        noise = tl.load(noise_ptr + offset, mask=inside)
        next_sigma = tl.load(next_sigma_ptr + batch * next_batch + frame * next_latent_frame)
        tl.store(x_next_ptr + offset, (1 - next_sigma) * clean + next_sigma * noise, mask=inside)


def _strides(levels: Tensor | None) -> tuple[int, int]:
    """Return batch and frame stride of levels [B or 1, F]; 0 where one row serves all rows of the batch."""
    if levels is None:
        return 0, 0
    return (0 if levels.shape[0] == 1 else levels.stride(0)), levels.stride(1)


def denoise_update(
    x: Tensor, velocity: Tensor, sigma: Tensor, noise: Tensor | None, next_sigma: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Launch the kernel of `cfpp_rt.ops.denoise_update.denoise_update`; arguments have been checked."""
    batch, frames = x.shape[:2]
    frame_size = x[0, 0].numel()
    clean = torch.empty_like(x)
    next_input = torch.empty_like(x) if noise is not None else x.new_empty(0)
    _denoise_update[(triton.cdiv(frame_size, SPAN), batch * frames)](
        clean,
        next_input,
        x,
        velocity,
        noise,
        sigma,
        next_sigma,
        frames,
        frame_size,
        *_strides(sigma),
        *_strides(next_sigma),
        HAS_NOISE=noise is not None,
        SPAN=SPAN,
    )
    return clean, next_input
