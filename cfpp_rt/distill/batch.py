"""What a training step is fed with."""

import dataclasses

import torch
from torch import Tensor

from cfpp_rt.distill.forward import Condition
from cfpp_rt.distill.rng import sent


@dataclasses.dataclass(frozen=True)
class Batch:
    """Clips and what they are conditioned on.

    latents: float32 [B, F, C, h, w], clean clips; None for prompts alone. trajectory: float32 [B, K, F, C, h, w],
    states of an ODE solution from noisy to its end point, for causal ODE distillation. weights: float32 [B, F, h, w],
    loss weight of every latent cell, of mean 1; None = all 1.
    """

    condition: Condition
    latents: Tensor | None = None
    trajectory: Tensor | None = None
    weights: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The same on another device."""
        return Batch(self.condition.to(device), *_moved(device, self.latents, self.trajectory, self.weights))


def _moved(device: torch.device, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else sent(tensor, device) for tensor in tensors]
