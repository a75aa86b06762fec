"""Stage 2 as it was before: causal ODE distillation from stored trajectories (Causal Forcing, arXiv 2602.02214).

The baseline that causal consistency distillation replaces: the stage-1 model's ODE is solved once per clip, all frames
at the same timestep under teacher forcing, and the student learns to jump from states on the way to the end point.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from cfpp_rt.core.schedule import FlowMatchSchedule
from cfpp_rt.distill.batch import Batch
from cfpp_rt.distill.causal_cd import Guidance, clean_estimate, consistency_loss, ode_step
from cfpp_rt.distill.forward import Condition, Denoiser
from cfpp_rt.distill.rng import block_indices
from cfpp_rt.distill.stage import clips
from cfpp_rt.errors import InputError

KEPT = (0, 12, 24, 36)  # entries of the 48-step table whose states are stored


@torch.no_grad()
def solve(
    teacher: Denoiser,
    clean: Tensor,
    noise: Tensor,
    condition: Condition,
    timesteps: Tensor,
    guidance: Guidance | None = None,
    kept: Sequence[int] = KEPT,
) -> Tensor:
    """States of the teacher's ODE at timesteps[kept], then its end point: [B, len(kept) + 1, F, C, h, w] float32.

    clean: the clip that is seen as the past. noise: where the solution starts, like clean [B, F, C, h, w].
    """
    states, x = [], noise
    for m, timestep in enumerate(timesteps):
        if m in kept:
            states.append(x)
        following = timesteps[m + 1] if m + 1 < len(timesteps) else torch.zeros(())
        x = ode_step(teacher, clean, x, timestep, following, condition, guidance)
    return torch.stack([*states, x], dim=1)


class CausalODE:
    """The stage: the student's clean estimate at a stored state, each block's its own, is drawn to the end point.

    schedule: what the student runs on. timesteps: float32, those of the stored states, descending.
    """

    def __init__(self, student: Denoiser, ema: nn.Module, *, schedule: FlowMatchSchedule, timesteps: Tensor):
        self.student, self.ema, self.schedule, self.timesteps = student, ema, schedule, timesteps
        self.trained: dict[str, nn.Module] = {"student": student.network}

    def updates(
        self, next_batch: Callable[[], Batch], draws: torch.Generator, step: int
    ) -> Iterator[tuple[str, Tensor]]:
        batch = next_batch()
        clean, states = clips(batch), batch.trajectory
        if states is None or states.shape[1] != len(self.timesteps) + 1 or states.shape[2:] != clean.shape[1:]:
            got = None if states is None else list(states.shape)
            raise InputError(f"trajectory must be [B, {len(self.timesteps)} + 1, {list(clean.shape[1:])}], got {got}")
        count, frames = clean.shape[:2]
        entry = block_indices(len(self.timesteps), count, frames, self.student.layout.block, draws)
        noisy = states[torch.arange(count)[:, None], entry, torch.arange(frames)]
        found = clean_estimate(self.student, clean, noisy, self.timesteps[entry], batch.condition, self.schedule)
        yield "student", consistency_loss(found, states[:, -1], batch.weights)
