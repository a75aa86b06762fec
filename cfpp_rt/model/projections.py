"""The projection matrices of cameras as the camera branch takes them: tensors on the model's device."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from cfpp_rt.core.camera import Cameras
from cfpp_rt.device.transfer import to_device


@dataclasses.dataclass(frozen=True)
class Projections:
    """P = K V of every latent frame and its inverse (`cfpp_rt.core.camera`), float32 [B, F, 4, 4] each."""

    matrices: Tensor
    inverses: Tensor

    @classmethod
    def of(cls, cameras: Cameras, device: torch.device | str = "cpu") -> "Projections":
        """Return the projections of cameras, computed in float64 on the CPU and uploaded in float32."""
        return cls(*(to_device(torch.from_numpy(part), device) for part in cameras.matrices()))

    @classmethod
    def cat(cls, parts: "Sequence[Projections]") -> "Projections":
        """Join projections along the frames."""
        if len(parts) == 1:
            return parts[0]
        return cls(torch.cat([p.matrices for p in parts], dim=1), torch.cat([p.inverses for p in parts], dim=1))

    def of_frames(self, first: int, end: int) -> "Projections":
        """Return the projections of latent frames `first` to `end`, `end` excluded."""
        return Projections(self.matrices[:, first:end], self.inverses[:, first:end])
