"""Stage ode: causal ODE distillation from stored trajectories (Causal Forcing, arXiv 2602.02214).

It is the baseline that causal consistency distillation replaces. The ODE of the stage ar model is solved once per clip,
with all frames at the same timestep under teacher forcing; the student learns to predict the end point from states on
the way.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from cfpp_rt.core.schedule import FlowMatchSchedule
from cfpp_rt.distill.batch import Batch
from cfpp_rt.distill.causal_cd import Guidance, clean_estimate, consistency_loss, ode_step
from cfpp_rt.distill.forward import Condition, Denoiser
from cfpp_rt.distill.rng import block_indices
from cfpp_rt.distill.stage import clean_latents
from cfpp_rt.errors import InputError

STORED_ENTRIES = (0, 12, 24, 36)  # entries of the 48-step table whose states are stored


@torch.no_grad()
def solve(
    teacher: Denoiser,
    clean: Tensor,
    noise: Tensor,
    condition: Condition,
    timesteps: Tensor,
    guidance: Guidance | None = None,
    stored: Sequence[int] = STORED_ENTRIES,
) -> Tensor:
    """Solve the teacher's ODE with Euler steps; return states and end point, float32 [B, len(stored) + 1, F, C, h, w].

    clean: [B, F, C, h, w], the clip that later blocks attend to.
    noise: [B, F, C, h, w], the state at the first timestep.
    timesteps: float32, descending; after the last one follows 0.
    stored: entries of timesteps whose states are returned, before the end point.
    """
    states, x = [], noise
    for entry, timestep in enumerate(timesteps):
        if entry in stored:
            states.append(x)
        following = timesteps[entry + 1] if entry + 1 < len(timesteps) else torch.zeros(())
        x = ode_step(teacher, clean, x, timestep, following, condition, guidance)
    return torch.stack([*states, x], dim=1)


class CausalODE:
    """Stage ode: the mean square of the student's clean estimate at a stored state minus the trajectory's end point.

    Every block draws one of the stored states. The loss is `consistency_loss` with the end point as target.
    schedule: the schedule that the student runs on.
    timesteps: float32, those of the stored states, descending.
    """

    def __init__(self, student: Denoiser, ema: nn.Module, *, schedule: FlowMatchSchedule, timesteps: Tensor):
        self.student, self.ema, self.schedule, self.timesteps = student, ema, schedule, timesteps
        self.trained: dict[str, nn.Module] = {"student": student.network}

    def updates(
        self, next_batch: Callable[[], Batch], generator: torch.Generator, step: int
    ) -> Iterator[tuple[str, Tensor]]:
        batch = next_batch()
        clean, states = clean_latents(batch), batch.trajectory
        if states is None or states.shape[1] != len(self.timesteps) + 1 or states.shape[2:] != clean.shape[1:]:
            got = None if states is None else list(states.shape)
            raise InputError(f"trajectory must be [B, {len(self.timesteps)} + 1, {list(clean.shape[1:])}], got {got}")
        batch_size, latent_frames = clean.shape[:2]
        entry = block_indices(len(self.timesteps), batch_size, latent_frames, self.student.layout.block, generator)
        noisy = states[torch.arange(batch_size)[:, None], entry, torch.arange(latent_frames)]
        estimate = clean_estimate(self.student, clean, noisy, self.timesteps[entry], batch.condition, self.schedule)
        yield "student", consistency_loss(estimate, states[:, -1], batch.weights)
