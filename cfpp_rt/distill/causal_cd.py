"""Stage 2: causal consistency distillation, without stored trajectories (Causal Forcing++, arXiv 2605.15141).

The teacher takes one step of its probability-flow ODE between two adjacent timesteps of a table. The student's clean
estimate at the first timestep is trained towards that of its moving average at the second. All networks run under
teacher forcing. The estimate x - sigma v is x at sigma = 0, so the boundary condition holds without further terms.
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
from cfpp_rt.distill.stage import clean_latents

STEPS = 48


def timestep_table(steps: int = STEPS, shift: float = 5.0) -> Tensor:
    """Return timesteps t = 1000 s u / (1 + (s - 1) u), float32 [steps], with s = shift and u = 1, 1 - 1 / steps, ...

    They descend from 1000; the next one would be 0.
    """
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1]
    return (TABLE_SIZE * shift * u / (1 + (shift - 1) * u)).float()


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance of a teacher: v(negative) + weight (v(text) - v(negative)).

    negative: [1 or B, text_len, text_dim], embeddings of the negative prompt. Both passes have the actions and cameras.
    """

    weight: float
    negative: Tensor


def guided(velocity: Callable[[Condition], Tensor], condition: Condition, guidance: Guidance | None) -> Tensor:
    """Return the guided velocity (see `Guidance`); without guidance the conditional one, in a single pass."""
    if guidance is None:
        return velocity(condition)
    negative = guidance.negative.to(condition.prompt_embeds).expand_as(condition.prompt_embeds)
    without = velocity(dataclasses.replace(condition, prompt_embeds=negative))
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
    """Return the clean estimate X(x, t) = x - sigma(t) v(x, t) under teacher forcing: [B, F, C, h, w].

    clean, noisy: [B, F, C, h, w]; noisy is x.
    timesteps: float32, t, a scalar or [B, F], equal within a block. sigma(t) is that of the schedule's nearest entry,
        as in the runtime.
    clean_timesteps: see `Denoiser.teacher_forced`.
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
    """Return x after one Euler step of the teacher's ODE, x - (t - t') / 1000 v(x, t): [B, F, C, h, w].

    clean, noisy: [B, F, C, h, w]; noisy is x.
    timesteps, next_timesteps: float32, t and t', each a scalar or [B, F].
    clean_timesteps: see `Denoiser.teacher_forced`.
    """
    here, there = _per_frame(timesteps, clean), _per_frame(next_timesteps, clean)
    velocity = guided(lambda c: teacher.teacher_forced(clean, noisy, here, c, clean_timesteps), condition, guidance)
    return noisy - ((here - there) / TABLE_SIZE)[:, :, None, None, None] * velocity


def _per_frame(values: Tensor, clips: Tensor) -> Tensor:
    """Expand a scalar or [B, F] to [B, F] on the clips' device."""
    return values.to(clips.device).expand(clips.shape[:2])


def consistency_loss(estimate: Tensor, target: Tensor, cell_weights: Tensor | None = None) -> Tensor:
    """Return the consistency loss mean(w (X - stopgrad(X'))^2), a scalar (Causal Forcing++, arXiv 2605.15141, stage 2).

    estimate, target: [B, F, C, h, w], X and X', the clean estimates of the student and of its target.
    cell_weights: [B, F, h, w], w; None = all 1.
    """
    error = (estimate - target.detach()).square().mean(dim=2)
    return (error if cell_weights is None else error * cell_weights).mean()


class CausalCD:
    """Stage cd: one `consistency_loss` of the student per step.

    Every block draws an interval of the table; the published code draws one for the whole batch. Under teacher forcing
    a block attends to no other noisy block, so the mean of the loss is the same and its variance smaller.
    ema: the moving average of the student, which is the target.
    teacher: the frozen model of stage ar.
    schedule: the schedule that the student runs on.
    timesteps: float32, the table, descending. Its last interval, to 0, is not used, as published.
    max_context_noise: see `ArDiffusion`; applies to teacher, student and target. The published code has none here.
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
        max_context_noise: float = 0.0,
    ):
        self.student, self.target, self.teacher = student, ema, teacher
        self.schedule, self.timesteps, self.guidance = schedule, timesteps, guidance
        self.max_context_noise = max_context_noise
        self.ema: nn.Module = ema.network
        self.trained: dict[str, nn.Module] = {"student": student.network}

    def updates(
        self, next_batch: Callable[[], Batch], generator: torch.Generator, step: int
    ) -> Iterator[tuple[str, Tensor]]:
        batch = next_batch()
        clean = clean_latents(batch)
        batch_size, latent_frames = clean.shape[:2]
        entry = block_indices(len(self.timesteps) - 1, batch_size, latent_frames, self.student.layout.block, generator)
        here, there = self.timesteps[entry], self.timesteps[entry + 1]
        noisy = mix(clean, normal_like(clean, generator), (here / TABLE_SIZE).to(clean.device))
        past, past_timesteps = noised_context(clean, draw_context(clean, self.max_context_noise, generator))
        with torch.no_grad():
            stepped = ode_step(self.teacher, past, noisy, here, there, batch.condition, self.guidance, past_timesteps)
            target = clean_estimate(self.target, past, stepped, there, batch.condition, self.schedule, past_timesteps)
        estimate = clean_estimate(self.student, past, noisy, here, batch.condition, self.schedule, past_timesteps)
        yield "student", consistency_loss(estimate, target, batch.weights)
