"""The flow-matching noise schedule: x_sigma = (1 - sigma) * x0 + sigma * noise, velocity v = noise - x0.

A schedule is a table of 1000 timesteps t in (0, 1000] and noise levels sigma = t / 1000, shifted towards high noise by
sigma = s * u / (1 + (s - 1) * u) (Esser et al. 2024, arXiv 2403.03206, eq. 23). The published students take every noise
level from the table entry with the nearest timestep, so t = 0 means the last entry (sigma = 0.00498 for s = 5).
"""

from collections.abc import Sequence

import torch

from cfpp_rt.config import RolloutConfig
from cfpp_rt.device.transfer import to_device

TABLE_SIZE = 1000


class FlowMatchSchedule:
    """The table of a shift.

    shift: s, > 0.
    timesteps: float32 [1000], descending from 1000.
    sigmas: float32 [1000], descending from 1.
    """

    def __init__(self, shift: float = 5.0):
        u = torch.linspace(1.0, 0.0, TABLE_SIZE + 1, dtype=torch.float64)[:-1]
        self.shift = shift
        self.sigmas = (shift * u / (1 + (shift - 1) * u)).float()
        self.timesteps = self.sigmas * TABLE_SIZE

    def sigma(self, timestep: float | torch.Tensor) -> torch.Tensor:
        """Return the noise level of the table entry nearest to each timestep: float32, shape of `timestep`."""
        t = torch.as_tensor(timestep, dtype=torch.float32)
        nearest = (self.timesteps - t.reshape(-1, 1)).abs().argmin(dim=1)
        return self.sigmas[nearest].reshape(t.shape)

    def warp(self, steps: Sequence[int]) -> torch.Tensor:
        """Convert integer steps (1000 = pure noise, 0 = clean) to shifted timesteps, float32 [len(steps)]."""
        extended = torch.cat([self.timesteps, torch.zeros(1)])
        return extended[TABLE_SIZE - torch.tensor(list(steps))]

    def training_weights(self) -> torch.Tensor:
        """Return the loss weight per table entry, float32 [1000].

        The weights are a Gaussian around t = 500, shifted to minimum 0 and scaled to mean 1.
        """
        bell = torch.exp(-2 * ((self.timesteps - TABLE_SIZE / 2) / TABLE_SIZE) ** 2)
        bell = bell - bell.min()
        return bell * (TABLE_SIZE / bell.sum())


def add_noise(clean: torch.Tensor, noise: torch.Tensor, sigma: float) -> torch.Tensor:
    """Return x = (1 - sigma) * x0 + sigma * noise: float32, same shape."""
    return (1 - sigma) * clean.float() + sigma * noise.float()


def noise_levels(
    config: RolloutConfig, steps: tuple[int, ...], device: torch.device
) -> tuple[list[float], list[torch.Tensor]]:
    """Return the timesteps of a step list and, on the device, their sigmas, [1, frames_per_block] each."""
    schedule = FlowMatchSchedule(config.shift)
    timesteps = schedule.warp(steps)
    sigmas = to_device(schedule.sigma(timesteps), device)[:, None, None]
    return timesteps.tolist(), list(sigmas.expand(-1, 1, config.frames_per_block))
