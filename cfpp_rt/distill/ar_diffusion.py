"""Stage 1, autoregressive diffusion with teacher forcing, and the bidirectional diffusion of stage base.

Every block of a clip is noised to a level drawn for that block and predicted from the clean blocks before it (Causal
Forcing++, arXiv 2605.15141; teacher forcing as in Causal Forcing, arXiv 2602.02214).
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from cfpp_rt.core.schedule import TABLE_SIZE, FlowMatchSchedule
from cfpp_rt.distill.batch import Batch
from cfpp_rt.distill.forward import Condition, Denoiser
from cfpp_rt.distill.rng import block_indices, normal_like, rows
from cfpp_rt.distill.stage import clean_latents


def mix(clean: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """Return (1 - sigma) clean + sigma noise: [B, F, C, h, w], like clean and noise. sigmas: [B or 1, F]."""
    return clean + sigmas[:, :, None, None, None] * (noise - clean)


def flow_loss(
    velocity: Tensor, clean: Tensor, noise: Tensor, frame_weights: Tensor, cell_weights: Tensor | None = None
) -> Tensor:
    """Return the flow matching loss, mean(w_frame w_cell (v - (noise - clean))^2), a float32 scalar.

    velocity: [B, F, C, h, w], v, the prediction of the network.
    clean, noise: [B, F, C, h, w].
    frame_weights: [B or 1, F], w_frame.
    cell_weights: [B, F, h, w], w_cell; None = all 1.
    """
    error = (velocity.float() - (noise - clean)).square().mean(dim=2)
    if cell_weights is not None:
        error = error * cell_weights
    return (error.mean(dim=(2, 3)) * frame_weights).mean()


def draw_context(clean: Tensor, max_sigma: float, generator: torch.Generator) -> tuple[Tensor, Tensor] | None:
    """Draw noise [B, F, C, h, w] and sigmas [B, F] for the clean frames that later blocks attend to.

    Each clip has, with probability 1/2, one sigma uniform in 0..max_sigma for all frames, otherwise 0. Return None, and
    draw nothing, if max_sigma is 0.
    """
    if not max_sigma:
        return None
    batch_size, latent_frames = clean.shape[:2]
    magnitude, coin = (rows(lambda n: torch.rand(n, 1, generator=generator), batch_size) for _ in range(2))
    sigmas = (max_sigma * magnitude * (coin < 0.5)).expand(batch_size, latent_frames).to(clean.device)
    return normal_like(clean, generator), sigmas


def noised_context(clean: Tensor, context: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor | None]:
    """Return the frames that later blocks attend to, and their timesteps [B, F]; None = all 0."""
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
    """Return the loss of stage ar for one batch, a float32 scalar (Causal Forcing++, arXiv 2605.15141, stage 1).

    It is `flow_loss` of the velocity that the student predicts for x = (1 - sigma) clean + sigma noise under teacher
    forcing, weighted by the schedule's training weight of each frame's level.
    clean, noise: [B, F, C, h, w].
    levels: int64 [B, F], entries of the schedule's table, equal within a block.
    cell_weights: [B, F, h, w]; None = all 1.
    context: noise [B, F, C, h, w] and sigmas [B, F] to add to the clean frames that later blocks attend to: a student
        trained on imperfect frames tolerates its own errors. None = no noise, as published.
    """
    device = clean.device
    sigmas, timesteps = (table.to(device)[levels] for table in (schedule.sigmas, schedule.timesteps))
    past, past_timesteps = noised_context(clean, context)
    velocity = student.teacher_forced(past, mix(clean, noise, sigmas), timesteps, condition, past_timesteps)
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
    """Return the flow matching loss of plain video diffusion, a float32 scalar: all frames attend to each other.

    clean, noise: [B, F, C, h, w].
    levels: int64 [B], one entry of the schedule's table per clip.
    cell_weights: [B, F, h, w]; None = all 1.
    """
    device = clean.device
    levels = levels[:, None].expand(-1, clean.shape[1])
    sigmas, timesteps = (table.to(device)[levels] for table in (schedule.sigmas, schedule.timesteps))
    velocity = network.bidirectional(mix(clean, noise, sigmas), timesteps, condition)
    return flow_loss(velocity, clean, noise, schedule.training_weights().to(device)[levels], cell_weights)


class ArDiffusion:
    """Stage ar: one `ar_diffusion_loss` of the student per step, with a level per block.

    max_context_noise: largest sigma, 0..1, of the noise on the clean frames; half of the clips have some. 0 = none.
    """

    def __init__(
        self, student: Denoiser, ema: nn.Module, *, schedule: FlowMatchSchedule, max_context_noise: float = 0.0
    ):
        self.student, self.ema, self.schedule = student, ema, schedule
        self.max_context_noise = max_context_noise
        self.trained: dict[str, nn.Module] = {"student": student.network}

    def updates(
        self, next_batch: Callable[[], Batch], generator: torch.Generator, step: int
    ) -> Iterator[tuple[str, Tensor]]:
        batch = next_batch()
        clean = clean_latents(batch)
        (batch_size, latent_frames), frames_per_block = clean.shape[:2], self.student.layout.block
        levels = block_indices(TABLE_SIZE, batch_size, latent_frames, frames_per_block, generator).to(clean.device)
        noise = normal_like(clean, generator)
        context = draw_context(clean, self.max_context_noise, generator)
        loss = ar_diffusion_loss(
            self.student,
            clean,
            noise,
            levels,
            batch.condition,
            self.schedule,
            cell_weights=batch.weights,
            context=context,
        )
        yield "student", loss


class Bidirectional:
    """Stage base: bidirectional diffusion, for models without a published base. Stage dmd takes its scores from it."""

    def __init__(self, student: Denoiser, ema: nn.Module, *, schedule: FlowMatchSchedule):
        self.student, self.ema, self.schedule = student, ema, schedule
        self.trained: dict[str, nn.Module] = {"student": student.network}

    def updates(
        self, next_batch: Callable[[], Batch], generator: torch.Generator, step: int
    ) -> Iterator[tuple[str, Tensor]]:
        batch = next_batch()
        clean = clean_latents(batch)
        levels = rows(lambda n: torch.randint(TABLE_SIZE, (n,), generator=generator), len(clean)).to(clean.device)
        noise = normal_like(clean, generator)
        loss = bidirectional_loss(
            self.student, clean, noise, levels, batch.condition, self.schedule, cell_weights=batch.weights
        )
        yield "student", loss
