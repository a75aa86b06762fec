"""Stage 1: autoregressive diffusion with teacher forcing; and the bidirectional diffusion that precedes it.

Every block of a clip is noised to a level of its own and predicted from the clean blocks before it (Causal Forcing++,
arXiv 2605.15141; teacher forcing as in Causal Forcing, arXiv 2602.02214).
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from cfpp_rt.core.schedule import TABLE_SIZE, FlowMatchSchedule
from cfpp_rt.distill.batch import Batch
from cfpp_rt.distill.forward import Condition, Denoiser
from cfpp_rt.distill.rng import block_indices, normal_like, rows
from cfpp_rt.distill.stage import clips


def mix(clean: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """(1 - sigma) * clean + sigma * noise with a sigma per frame: clean, noise [B, F, C, h, w], sigmas [B or 1, F]."""
    return clean + sigmas[:, :, None, None, None] * (noise - clean)


def flow_loss(
    velocity: Tensor, clean: Tensor, noise: Tensor, frame_weights: Tensor, cell_weights: Tensor | None = None
) -> Tensor:
    """Weighted mean square of velocity - (noise - clean), a float32 scalar.

    velocity, clean, noise: [B, F, C, h, w]. frame_weights: [B or 1, F]. cell_weights: [B, F, h, w], None = all 1.
    """
    error = (velocity.float() - (noise - clean)).square().mean(dim=2)
    if cell_weights is not None:
        error = error * cell_weights
    return (error.mean(dim=(2, 3)) * frame_weights).mean()


def draw_context(clean: Tensor, most: float, draws: torch.Generator) -> tuple[Tensor, Tensor] | None:
    """Noise [B, F, C, h, w] and sigmas [B, F] for the frames that are seen as the past: one sigma of 0..most for every
    second clip or so, 0 for the others. None, and nothing drawn, where most is 0.
    """
    if not most:
        return None
    count, frames = clean.shape[:2]
    size, some = (rows(lambda n: torch.rand(n, 1, generator=draws), count) for _ in range(2))
    sigmas = (most * size * (some < 0.5)).expand(count, frames).to(clean.device)
    return normal_like(clean, draws), sigmas


def noised_context(clean: Tensor, context: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor | None]:
    """The frames that are seen as the past, and their timesteps; None = all 0."""
    return (clean, None) if context is None else (mix(clean, *context), context[1] * TABLE_SIZE)


def ar_diffusion_loss(
    student: Denoiser,
    clean: Tensor,
    noise: Tensor,
    levels: Tensor,
    condition: Condition,
    schedule: FlowMatchSchedule,
    *,
    cell_weights: Tensor | None = None,
    context: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The loss of one batch. clean, noise: [B, F, C, h, w]. levels: int64 [B, F], entries of the schedule's table.

    context: noise [B, F, C, h, w] and sigmas [B, F] of the clean frames, where they are to carry some: a student that
    has seen imperfect frames forgives its own. Default: none, as published.
    """
    device = clean.device
    sigmas, timesteps = (table.to(device)[levels] for table in (schedule.sigmas, schedule.timesteps))
    seen, seen_timesteps = noised_context(clean, context)
    velocity = student.teacher_forced(seen, mix(clean, noise, sigmas), timesteps, condition, seen_timesteps)
    return flow_loss(velocity, clean, noise, schedule.training_weights().to(device)[levels], cell_weights)


def bidirectional_loss(
    network: Denoiser,
    clean: Tensor,
    noise: Tensor,
    levels: Tensor,
    condition: Condition,
    schedule: FlowMatchSchedule,
    *,
    cell_weights: Tensor | None = None,
) -> Tensor:
    """Plain video diffusion: one level per clip, int64 [B], and every frame sees every other."""
    device = clean.device
    levels = levels[:, None].expand(-1, clean.shape[1])
    sigmas, timesteps = (table.to(device)[levels] for table in (schedule.sigmas, schedule.timesteps))
    velocity = network.bidirectional(mix(clean, noise, sigmas), timesteps, condition)
    return flow_loss(velocity, clean, noise, schedule.training_weights().to(device)[levels], cell_weights)


class ArDiffusion:
    """The stage: one loss of the student per step.

    most_context_noise: largest sigma, 0..1, of the noise on the clean frames; half of the clips carry some. 0 = none.
    """

    def __init__(
        self, student: Denoiser, ema: nn.Module, *, schedule: FlowMatchSchedule, most_context_noise: float = 0.0
    ):
        self.student, self.ema, self.schedule = student, ema, schedule
        self.most_context_noise = most_context_noise
        self.trained: dict[str, nn.Module] = {"student": student.network}

    def updates(
        self, next_batch: Callable[[], Batch], draws: torch.Generator, step: int
    ) -> Iterator[tuple[str, Tensor]]:
        batch = next_batch()
        clean = clips(batch)
        count, frames = clean.shape[:2]
        levels = block_indices(TABLE_SIZE, count, frames, self.student.layout.block, draws).to(clean.device)
        noise = normal_like(clean, draws)
        context = draw_context(clean, self.most_context_noise, draws)
        yield (
            "student",
            ar_diffusion_loss(
                self.student,
                clean,
                noise,
                levels,
                batch.condition,
                self.schedule,
                cell_weights=batch.weights,
                context=context,
            ),
        )


class Bidirectional:
    """Diffusion pre-training of a model that has no published base: what the score networks of stage 3 start from."""

    def __init__(self, student: Denoiser, ema: nn.Module, *, schedule: FlowMatchSchedule):
        self.student, self.ema, self.schedule = student, ema, schedule
        self.trained: dict[str, nn.Module] = {"student": student.network}

    def updates(
        self, next_batch: Callable[[], Batch], draws: torch.Generator, step: int
    ) -> Iterator[tuple[str, Tensor]]:
        batch = next_batch()
        clean = clips(batch)
        levels = rows(lambda n: torch.randint(TABLE_SIZE, (n,), generator=draws), len(clean)).to(clean.device)
        noise = normal_like(clean, draws)
        loss = bidirectional_loss(
            self.student, clean, noise, levels, batch.condition, self.schedule, cell_weights=batch.weights
        )
        yield "student", loss
