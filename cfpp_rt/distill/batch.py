"""Training batches and the type of what makes them."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from cfpp_rt.device.transfer import to_device
from cfpp_rt.distill.forward import Condition


@dataclasses.dataclass(frozen=True)
class Batch:
    """Clips and their conditions. A batch without latents has prompts alone.

    condition: prompt embeddings, actions and cameras of B clips.
    latents: float32 [B, F, C, h, w], clean clips, or None.
    trajectory: float32 [B, K, F, C, h, w], states of an ODE solution from noisy to its end point, for stage ode.
    weights: float32 [B, F, h, w], loss weight of every latent cell, mean 1; None = all 1.
    """

    condition: Condition
    latents: Tensor | None = None
    trajectory: Tensor | None = None
    weights: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """Return this batch on another device."""
        tensors = (self.latents, self.trajectory, self.weights)
        moved = [None if tensor is None else to_device(tensor, device) for tensor in tensors]
        return Batch(self.condition.to(device), *moved)


DataSource = Callable[[int], Batch]  # returns batch number n of a run; the same n must give the same batch
