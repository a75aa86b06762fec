"""Stage 3: asymmetric distribution matching distillation with self-rollout.

A few-step causal student is drawn towards the distribution of a bidirectional teacher: the gradient at a noised video
of the student's own is the difference of two scores, of the frozen teacher (real) and of a critic that learns the
student's distribution as it moves (fake) (Yin et al. 2024, arXiv 2311.18828; Self Forcing, arXiv 2506.08009).
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
from cfpp_rt.distill.stage import clips

_LEAST, _MOST = 20.0, 980.0  # timesteps between which scores are compared, as published


def score_timesteps(batch: int, shift: float, draws: torch.Generator) -> Tensor:
    """One timestep per video, evenly drawn from 0..999, shifted, then clamped to 20..980: float32 [B]."""
    u = rows(lambda n: torch.randint(TABLE_SIZE, (n,), generator=draws), batch) / TABLE_SIZE
    return (TABLE_SIZE * shift * u / (1 + (shift - 1) * u)).clamp(_LEAST, _MOST)


def clean_score(
    network: Denoiser, noisy: Tensor, timesteps: Tensor, condition: Condition, guidance: Guidance | None = None
) -> Tensor:
    """The clean video that a bidirectional network sees in a noisy one: x - sigma * v, [B, F, C, h, w] float32.

    timesteps: float32 [B]. guidance: its weight is the usual one; the published code's 3 on top of the conditional
    score is 4 here.
    """
    levels = timesteps[:, None].expand(noisy.shape[:2])
    velocity = guided(lambda c: network.bidirectional(noisy, levels, c), condition, guidance)
    return noisy - (timesteps / TABLE_SIZE)[:, None, None, None, None] * velocity


def matching_loss(video: Tensor, real: Tensor, fake: Tensor, made: slice = slice(None)) -> Tensor:
    """A loss whose gradient at `video` is (fake - real) / mean |video - real|, per video; a float64 scalar.

    video: the student's, with gradient; real, fake: the scores' clean videos; all [B, F, C, h, w]. made: the frames
    that the student made, whose difference counts. A gradient that is not a number counts as 0, as published.
    """
    x, real, fake = (part[:, made].double() for part in (video, real, fake))
    size = (x - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    gradient = ((fake - real) / size).detach().nan_to_num(0.0, 0.0, 0.0)
    return 0.5 * (x - (x - gradient).detach()).square().mean()


class DMD:
    """The stage: every `ratio`-th step one loss of the student, then, every step, one of the critic.

    student: what `rollout` runs. real: frozen. critic: trained along. initial_frames: of the batch's clips that are
    given to the student; 0 = it makes all, and prompts alone are enough. frames: length of its videos. latent_size:
    (C, h, w).
    """

    def __init__(
        self,
        rollout: SelfRollout,
        ema: nn.Module,
        real: Denoiser,
        critic: Denoiser,
        *,
        frames: int,
        latent_size: tuple[int, int, int],
        initial_frames: int = 0,
        guidance: Guidance | None = None,
        ratio: int = 5,
    ):
        self.rollout, self.ema, self.real, self.critic = rollout, ema, real, critic
        self.frames, self.latent_size, self.initial_frames = frames, latent_size, initial_frames
        self.guidance, self.ratio = guidance, ratio
        self.trained: dict[str, nn.Module] = {"student": rollout.network, "critic": critic.network}

    def updates(
        self, next_batch: Callable[[], Batch], draws: torch.Generator, step: int
    ) -> Iterator[tuple[str, Tensor]]:
        if step % self.ratio == 0:
            yield "student", self._student_loss(next_batch(), draws)
        yield "critic", self._critic_loss(next_batch(), draws)

    def _student_loss(self, batch: Batch, draws: torch.Generator) -> Tensor:
        video = self._videos(batch, draws, gradient=True)
        with torch.no_grad():
            timesteps = score_timesteps(len(video), self.rollout.schedule.shift, draws).to(video.device)
            noisy = mix(video, normal_like(video, draws), (timesteps / TABLE_SIZE)[:, None])
            fake = clean_score(self.critic, noisy, timesteps, batch.condition)
            real = clean_score(self.real, noisy, timesteps, batch.condition, self.guidance)
        return matching_loss(video, real, fake, slice(self.initial_frames, None))

    def _critic_loss(self, batch: Batch, draws: torch.Generator) -> Tensor:
        video = self._videos(batch, draws, gradient=False)
        timesteps = score_timesteps(len(video), self.rollout.schedule.shift, draws).to(video.device)
        noise = normal_like(video, draws)
        noisy = mix(video, noise, (timesteps / TABLE_SIZE)[:, None])
        velocity = self.critic.bidirectional(noisy, timesteps[:, None].expand(video.shape[:2]), batch.condition)
        return flow_loss(velocity, video, noise, torch.ones(1, self.frames, device=video.device))

    def _videos(self, batch: Batch, draws: torch.Generator, *, gradient: bool) -> Tensor:
        embeds = batch.condition.embeds
        initial = None
        if self.initial_frames:
            initial = clips(batch)[:, : self.initial_frames]
        made = self.frames - self.initial_frames
        noise = normal_like(torch.empty(len(embeds), made, *self.latent_size, device=embeds.device), draws)
        exits = Exits.draw(self.rollout.config, draws)
        return self.rollout(noise, batch.condition, exits, draws, initial=initial, gradient=gradient)
