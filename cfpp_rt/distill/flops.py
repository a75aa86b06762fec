"""How much arithmetic a training step is, by formula: what its time is compared with."""

import math
import time

import torch
from torch import Tensor

from cfpp_rt.config import ModelConfig, RolloutConfig
from cfpp_rt.distill import masks
from cfpp_rt.distill.settings import Settings, StageSettings


def pass_flops(config: ModelConfig, frames: int, tokens: int, pairs: int) -> float:
    """FLOPs of one forward of one clip, a multiplication and an addition counted as two.

    frames: in the sequence. tokens: per frame. pairs: of a query frame and a key frame that it sees.
    """
    d, s, text = config.dim, frames * tokens, config.text_len
    patch = math.prod(config.patch_size)
    per_token = 4 * d * d + 2 * d * config.ffn_dim + (2 * d * d if text else 0)
    layer = s * per_token + 2 * text * d * d + 2 * d * pairs * tokens * tokens + 2 * d * s * text
    time_rows = frames * (config.freq_dim * d + 7 * d * d)
    embedded = text * (config.text_dim * d + d * d) + s * d * patch * (config.in_dim + config.out_dim)
    return 2.0 * (config.num_layers * layer + time_rows + embedded)


def step_flops(name: str, settings: Settings, stage_settings: StageSettings, frames: int, tokens: int) -> float:
    """FLOPs of one step of a stage in one process, the mean over its random choices and over `ratio` steps.

    frames, tokens: of a clip, and per frame. A backward pass is twice its forward; checkpointing adds one forward.
    """
    learn = 4 if stage_settings.checkpointing else 3
    guided = 1 if stage_settings.guidance == 1 else 2
    if name == "dmd":
        frames = stage_settings.frames
        bidirectional = pass_flops(settings.model, frames, tokens, frames * frames)
        real = pass_flops(settings.real or settings.model, frames, tokens, frames * frames)
        made = {k: _rollout_flops(settings.model, settings.rollout, stage_settings, tokens, last=k) for k in (learn, 1)}
        step = (made[learn] + bidirectional + guided * real) / stage_settings.ratio + made[1] + learn * bidirectional
    elif name == "base":
        step = learn * pass_flops(settings.model, frames, tokens, frames * frames)
    else:
        visible = masks.teacher_forcing(frames, settings.layout.block, settings.layout.window)
        step = pass_flops(settings.model, 2 * frames, tokens, _pairs(visible))
        step *= learn + (guided + 1 if name == "cd" else 0)
    return step * stage_settings.batch * stage_settings.accumulate


def _rollout_flops(
    config: ModelConfig, rollout: RolloutConfig, stage_settings: StageSettings, tokens: int, *, last: int
) -> float:
    """A self-rollout whose exit passes count `last` times."""
    block, total = rollout.frames_per_block, 0.0
    for start in range(0, stage_settings.frames, block):
        visible = min(start + block, rollout.window or stage_settings.frames)
        one = pass_flops(config, block, tokens, block * visible)
        steps = (rollout.first_steps or rollout.steps) if start == stage_settings.initial_frames else rollout.steps
        if start >= stage_settings.initial_frames:
            total += one * ((len(steps) - 1) / 2 + last)
        if start + block < stage_settings.frames:
            total += one  # the clean pass
    return total


def _pairs(visible: Tensor) -> int:
    return int(visible.sum())


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one large matrix product on a GPU, median of ten: what a step could reach at most."""
    size = 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(12):
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        torch.mm(a, b)
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return 2 * size**3 / sorted(times[2:])[5]
