"""denoise_update in plain PyTorch. Arithmetic is float32, for float64 tensors float64."""

from torch import Tensor


def denoise_update(
    x: Tensor, velocity: Tensor, sigma: Tensor, noise: Tensor | None, next_sigma: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute the op of `cfpp_rt.ops.denoise_update.denoise_update`; without noise, its second tensor is empty."""
    per_frame = (..., *(None,) * (x.ndim - 2))
    clean = x - sigma[per_frame] * velocity.to(x.dtype)
    if noise is None or next_sigma is None:
        return clean, x.new_empty(0)
    level = next_sigma[per_frame]
    return clean, (1 - level) * clean + level * noise
