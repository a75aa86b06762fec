"""Stage 3: asymmetric distribution matching distillation with self-rollout.

A few-step causal student is trained towards the distribution of a bidirectional teacher. The gradient at a video of the
student is the difference of two scores of the noised video: that of the frozen teacher (real) and that of a critic,
which is trained on the student's videos (fake). Sources: DMD (Yin et al. 2024, arXiv 2311.18828), Self Forcing (arXiv
2506.08009).
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from cfpp_rt.core.schedule import TABLE_SIZE
from cfpp_rt.distill.ar_diffusion import flow_loss, mix
from cfpp_rt.distill.batch import Batch
from cfpp_rt.distill.causal_cd import Guidance, guided
from cfpp_rt.distill.forward import Condition, Denoiser
from cfpp_rt.distill.rng import normal_like, rows
from cfpp_rt.distill.self_rollout import Exits, SelfRollout
from cfpp_rt.distill.stage import clean_latents

_MIN_TIMESTEP, _MAX_TIMESTEP = 20.0, 980.0  # range of the timesteps at which scores are compared, as published


def score_timesteps(batch: int, shift: float, generator: torch.Generator) -> Tensor:
    """Draw one timestep per video: float32 [B].

    With u uniform on {0, 1, ..., 999} / 1000 and s = shift, t = 1000 s u / (1 + (s - 1) u), clamped to 20..980
    (published code of Causal Forcing).
    """
    u = rows(lambda n: torch.randint(TABLE_SIZE, (n,), generator=generator), batch) / TABLE_SIZE
    return (TABLE_SIZE * shift * u / (1 + (shift - 1) * u)).clamp(_MIN_TIMESTEP, _MAX_TIMESTEP)


def clean_score(
    network: Denoiser, noisy: Tensor, timesteps: Tensor, condition: Condition, guidance: Guidance | None = None
) -> Tensor:
    """Return a bidirectional network's estimate of the clean video, x - sigma v: [B, F, C, h, w] float32.

    noisy: [B, F, C, h, w], x.
    timesteps: float32 [B]; sigma = t / 1000.
    guidance: its weight follows the usual convention; the published code's 3, which counts from the conditional score,
        is 4 here.
    """
    levels = timesteps[:, None].expand(noisy.shape[:2])
    velocity = guided(lambda c: network.bidirectional(noisy, levels, c), condition, guidance)
    return noisy - (timesteps / TABLE_SIZE)[:, None, None, None, None] * velocity


def matching_loss(video: Tensor, real: Tensor, fake: Tensor, made: slice = slice(None)) -> Tensor:
    """Return the loss of the student, a float64 scalar: the mean square of x - stopgrad(x - g), halved.

    g = (fake - real) / mean |x - real|, with the mean over each video, so that the gradient at x is g over the number
    of elements (DMD, arXiv 2311.18828). Elements of g that are not finite count as 0, as published.
    video: [B, F, C, h, w], x, with gradient.
    real, fake: [B, F, C, h, w], clean estimates of the two score networks.
    made: latent frames that the student made; only these count.
    """
    x, real, fake = (part[:, made].double() for part in (video, real, fake))
    size = (x - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    gradient = ((fake - real) / size).detach().nan_to_num(0.0, 0.0, 0.0)
    return 0.5 * (x - (x - gradient).detach()).square().mean()


class DMD:
    """Stage dmd: a loss of the student at every `ratio`-th step, then, at every step, a loss of the critic.

    rollout: makes videos with the student, its `network`.
    real: the frozen bidirectional network of the real score.
    critic: the network of the fake score, which is trained.
    latent_frames: latent frames of the videos.
    latent_size: (C, h, w).
    initial_latent_frames: number of latent frames taken from the batch's clips; 0 = the student makes all, and batches
        may have prompts alone.
    guidance: guidance of `real`.
    """

    def __init__(
        self,
        rollout: SelfRollout,
        ema: nn.Module,
        real: Denoiser,
        critic: Denoiser,
        *,
        latent_frames: int,
        latent_size: tuple[int, int, int],
        initial_latent_frames: int = 0,
        guidance: Guidance | None = None,
        ratio: int = 5,
    ):
        self.rollout, self.ema, self.real, self.critic = rollout, ema, real, critic
        self.latent_frames, self.initial_latent_frames = latent_frames, initial_latent_frames
        self.latent_size, self.guidance, self.ratio = latent_size, guidance, ratio
        self.trained: dict[str, nn.Module] = {"student": rollout.network, "critic": critic.network}

    def updates(
        self, next_batch: Callable[[], Batch], generator: torch.Generator, step: int
    ) -> Iterator[tuple[str, Tensor]]:
        if step % self.ratio == 0:
            yield "student", self._student_loss(next_batch(), generator)
        yield "critic", self._critic_loss(next_batch(), generator)

    def _student_loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        video = self._videos(batch, generator, gradient=True)
        with torch.no_grad():
            timesteps = score_timesteps(len(video), self.rollout.schedule.shift, generator).to(video.device)
            noisy = mix(video, normal_like(video, generator), (timesteps / TABLE_SIZE)[:, None])
            fake = clean_score(self.critic, noisy, timesteps, batch.condition)
            real = clean_score(self.real, noisy, timesteps, batch.condition, self.guidance)
        return matching_loss(video, real, fake, slice(self.initial_latent_frames, None))

    def _critic_loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        video = self._videos(batch, generator, gradient=False)
        timesteps = score_timesteps(len(video), self.rollout.schedule.shift, generator).to(video.device)
        noise = normal_like(video, generator)
        noisy = mix(video, noise, (timesteps / TABLE_SIZE)[:, None])
        velocity = self.critic.bidirectional(noisy, timesteps[:, None].expand(video.shape[:2]), batch.condition)
        return flow_loss(velocity, video, noise, torch.ones(1, self.latent_frames, device=video.device))

    def _videos(self, batch: Batch, generator: torch.Generator, *, gradient: bool) -> Tensor:
        prompt_embeds = batch.condition.prompt_embeds
        initial_latents = None
        if self.initial_latent_frames:
            initial_latents = clean_latents(batch)[:, : self.initial_latent_frames]
        shape = (len(prompt_embeds), self.latent_frames - self.initial_latent_frames, *self.latent_size)
        noise = normal_like(torch.empty(shape, device=prompt_embeds.device), generator)
        exits = Exits.draw(self.rollout.config, generator)
        return self.rollout(
            noise, batch.condition, exits, generator, initial_latents=initial_latents, gradient=gradient
        )
