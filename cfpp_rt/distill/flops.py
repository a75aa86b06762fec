"""FLOPs of a training step, by formula."""

import math

from torch import Tensor

from cfpp_rt.config import ModelConfig, RolloutConfig
from cfpp_rt.distill import masks
from cfpp_rt.distill.settings import Settings, StageSettings


def pass_flops(config: ModelConfig, latent_frames: int, tokens: int, pairs: int) -> float:
    """Return the FLOPs of one forward pass of one clip; a multiplication and an addition count as two.

    latent_frames: latent frames of the sequence.
    tokens: tokens per latent frame.
    pairs: number of pairs of a query frame and a visible key frame.
    """
    d, s, text = config.dim, latent_frames * tokens, config.text_len
    patch = math.prod(config.patch_size)
    per_token = 4 * d * d + 2 * d * config.ffn_dim + (2 * d * d if text else 0)
    layer = s * per_token + 2 * text * d * d + 2 * d * pairs * tokens * tokens + 2 * d * s * text
    time_rows = latent_frames * (config.freq_dim * d + 7 * d * d)
    embedded = text * (config.text_dim * d + d * d) + s * d * patch * (config.in_dim + config.out_dim)
    return 2.0 * (config.num_layers * layer + time_rows + embedded)


def step_flops(name: str, settings: Settings, stage_settings: StageSettings, latent_frames: int, tokens: int) -> float:
    """Return the FLOPs of one step of a stage in one process: the mean over random choices and over `ratio` steps.

    A backward pass counts as two forward passes; checkpointing adds one forward pass.
    latent_frames: latent frames of a clip.
    tokens: tokens per latent frame.
    """
    train = 4 if stage_settings.checkpointing else 3
    teacher_passes = 1 if stage_settings.guidance == 1 else 2
    if name == "dmd":
        latent_frames = stage_settings.frames
        bidirectional = pass_flops(settings.model, latent_frames, tokens, latent_frames * latent_frames)
        real = pass_flops(settings.real or settings.model, latent_frames, tokens, latent_frames * latent_frames)
        of_student, of_critic = (
            _rollout_flops(settings.model, settings.rollout, stage_settings, tokens, last=passes)
            for passes in (train, 1)
        )
        student_step = of_student + bidirectional + teacher_passes * real
        step = student_step / stage_settings.ratio + of_critic + train * bidirectional
    elif name == "base":
        step = train * pass_flops(settings.model, latent_frames, tokens, latent_frames * latent_frames)
    else:
        visible = masks.teacher_forcing(latent_frames, settings.layout.block, settings.layout.window)
        step = pass_flops(settings.model, 2 * latent_frames, tokens, _pairs(visible))
        step *= train + (teacher_passes + 1 if name == "cd" else 0)
    return step * stage_settings.batch * stage_settings.accumulate


def _rollout_flops(
    config: ModelConfig, rollout: RolloutConfig, stage_settings: StageSettings, tokens: int, *, last: int
) -> float:
    """Return the FLOPs of a self-rollout whose exit passes count `last` times."""
    n, total = rollout.frames_per_block, 0.0
    for start in range(0, stage_settings.frames, n):
        visible = min(start + n, rollout.window or stage_settings.frames)
        one_pass = pass_flops(config, n, tokens, n * visible)
        steps = (rollout.first_steps or rollout.steps) if start == stage_settings.initial_frames else rollout.steps
        if start >= stage_settings.initial_frames:
            total += one_pass * ((len(steps) - 1) / 2 + last)
        if start + n < stage_settings.frames:
            total += one_pass  # the clean pass
    return total


def _pairs(visible: Tensor) -> int:
    return int(visible.sum())
