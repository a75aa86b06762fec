"""Stage 2: causal consistency distillation, without stored trajectories (Causal Forcing++, arXiv 2605.15141).

The teacher takes one step of its probability-flow ODE between two adjacent timesteps of a table; the student's clean
estimate at the first is drawn to that of its own moving average at the second. All run under teacher forcing. The
estimate x - sigma * v meets the boundary condition at sigma = 0 by itself.
"""

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from cfpp_rt.core.schedule import TABLE_SIZE, FlowMatchSchedule
from cfpp_rt.distill.ar_diffusion import draw_context, mix, noised_context
from cfpp_rt.distill.batch import Batch
from cfpp_rt.distill.forward import Condition, Denoiser
from cfpp_rt.distill.rng import block_indices, normal_like
from cfpp_rt.distill.stage import clips

STEPS = 48


def timestep_table(steps: int = STEPS, shift: float = 5.0) -> Tensor:
    """Timesteps float32 [steps], descending from 1000, of which 0 would be the next: 1000 s u / (1 + (s - 1) u)."""
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1]
    return (TABLE_SIZE * shift * u / (1 + (shift - 1) * u)).float()


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance of a teacher: v(negative) + weight * (v(text) - v(negative)).

    negative: embeds [1 or B, text_len, text_dim] of the negative prompt. Actions and cameras stay in both.
    """

    weight: float
    negative: Tensor


def guided(velocity: Callable[[Condition], Tensor], condition: Condition, guidance: Guidance | None) -> Tensor:
    """The guided velocity; without guidance the conditional one, at half the cost."""
    if guidance is None:
        return velocity(condition)
    negative = guidance.negative.to(condition.embeds).expand_as(condition.embeds)
    without = velocity(dataclasses.replace(condition, embeds=negative))
    return without + guidance.weight * (velocity(condition) - without)


def clean_estimate(
    network: Denoiser,
    clean: Tensor,
    noisy: Tensor,
    timesteps: Tensor,
    condition: Condition,
    schedule: FlowMatchSchedule,
    clean_timesteps: Tensor | None = None,
) -> Tensor:
    """X(x, t) = x - sigma(t) * v(x, t) under teacher forcing: [B, F, C, h, w].

    timesteps: float32, one for all frames or [B, F], equal within a block. sigma(t) is that of the schedule's nearest
    entry, as when the student runs. clean_timesteps: as `Denoiser.teacher_forced`.
    """
    velocity = network.teacher_forced(clean, noisy, _per_frame(timesteps, clean), condition, clean_timesteps)
    return noisy - _per_frame(schedule.sigma(timesteps), clean)[:, :, None, None, None] * velocity


def ode_step(
    teacher: Denoiser,
    clean: Tensor,
    noisy: Tensor,
    timesteps: Tensor,
    next_timesteps: Tensor,
    condition: Condition,
    guidance: Guidance | None,
    clean_timesteps: Tensor | None = None,
) -> Tensor:
    """One Euler step of the teacher's ODE from `timesteps` to `next_timesteps`, each one for all frames or [B, F]:
    [B, F, C, h, w]. clean_timesteps: as `Denoiser.teacher_forced`.
    """
    here, there = _per_frame(timesteps, clean), _per_frame(next_timesteps, clean)
    velocity = guided(lambda c: teacher.teacher_forced(clean, noisy, here, c, clean_timesteps), condition, guidance)
    return noisy - ((here - there) / TABLE_SIZE)[:, :, None, None, None] * velocity


def _per_frame(values: Tensor, clips: Tensor) -> Tensor:
    """A value for all frames, or [B, F], as [B, F] on the clips' device."""
    return values.to(clips.device).expand(clips.shape[:2])


def consistency_loss(here: Tensor, there: Tensor, cell_weights: Tensor | None = None) -> Tensor:
    """Mean square of the student's estimate minus its target's; here, there [B, F, C, h, w], weights [B, F, h, w]."""
    error = (here - there.detach()).square().mean(dim=2)
    return (error if cell_weights is None else error * cell_weights).mean()


class CausalCD:
    """The stage. teacher: frozen, from stage 1; the moving average of the student, `ema`, is the target.

    schedule: what the student runs on. timesteps: the table, float32, descending; its last interval, to 0, is not
    used, as published. Every block draws an interval of its own; the published code draws one for the whole batch.
    Under teacher forcing a block sees no other noisy one, so the loss is the same in the mean, and less noisy.
    most_context_noise: as `ArDiffusion`, for teacher, student and target alike; the published code has none here.
    """

    def __init__(
        self,
        student: Denoiser,
        ema: Denoiser,
        teacher: Denoiser,
        *,
        schedule: FlowMatchSchedule,
        timesteps: Tensor,
        guidance: Guidance | None = None,
        most_context_noise: float = 0.0,
    ):
        self.student, self.target, self.teacher = student, ema, teacher
        self.schedule, self.timesteps, self.guidance = schedule, timesteps, guidance
        self.most_context_noise = most_context_noise
        self.ema: nn.Module = ema.network
        self.trained: dict[str, nn.Module] = {"student": student.network}

    def updates(
        self, next_batch: Callable[[], Batch], draws: torch.Generator, step: int
    ) -> Iterator[tuple[str, Tensor]]:
        batch = next_batch()
        clean = clips(batch)
        count, frames = clean.shape[:2]
        m = block_indices(len(self.timesteps) - 1, count, frames, self.student.layout.block, draws)
        here, there = self.timesteps[m], self.timesteps[m + 1]
        noisy = mix(clean, normal_like(clean, draws), (here / TABLE_SIZE).to(clean.device))
        seen, seen_timesteps = noised_context(clean, draw_context(clean, self.most_context_noise, draws))
        with torch.no_grad():
            stepped = ode_step(self.teacher, seen, noisy, here, there, batch.condition, self.guidance, seen_timesteps)
            wanted = clean_estimate(self.target, seen, stepped, there, batch.condition, self.schedule, seen_timesteps)
        found = clean_estimate(self.student, seen, noisy, here, batch.condition, self.schedule, seen_timesteps)
        yield "student", consistency_loss(found, wanted, batch.weights)
