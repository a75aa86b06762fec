"""How much arithmetic a pass and a block of frames take, against which a time is a share of the machine's rate."""

import time

import torch
import torch.nn.functional as F

from cfpp_rt.bench import harness
from cfpp_rt.config import ModelConfig, RolloutConfig


def pass_flops(config: ModelConfig, tokens: int, visible_tokens: int) -> tuple[float, float]:
    """FLOPs of the linear layers, and of both attentions, of one pass of `tokens` queries over `visible_tokens`."""
    d, cross = config.dim, 2 if config.text_len else 0  # cross-attention's query and output projection
    per_token = (4 + cross) * d * d + 2 * d * config.ffn_dim
    linear = 2.0 * tokens * per_token * config.num_layers
    attention = 4.0 * tokens * d * (visible_tokens + config.text_len) * config.num_layers
    return linear, attention


def block_flops(config: ModelConfig, rollout: RolloutConfig, tokens: int, visible: int, *, steps: int) -> float:
    """FLOPs that one more block of frames of `tokens` tokens needs, with `visible` frames seen, itself included.

    `steps` denoising passes and, unless it is the first block or refresh is "skip", the clean pass of the block before,
    of whose last layer only keys and values are needed. The same for every implementation, whatever it does besides.
    """
    n = rollout.frames_per_block
    own = n * tokens
    flops = steps * sum(pass_flops(config, own, visible * tokens))
    if visible > n and rollout.refresh != "skip":
        before = visible if visible == rollout.window else visible - n  # a full window has moved on by one block
        whole = sum(pass_flops(config, own, before * tokens)) * (config.num_layers - 1) / config.num_layers
        flops += whole + 4.0 * own * config.dim**2
    return flops


def matrix_rate(config: ModelConfig, tokens: int, dtype: torch.dtype, device: torch.device) -> float:
    """GFLOP/s of the feed-forward's first matrix product, the largest of a pass; best of five."""
    x = torch.randn(tokens, config.dim, device=device).to(dtype)
    w = torch.randn(config.ffn_dim, config.dim, device=device).to(dtype)
    best = float("inf")
    for _ in range(5):
        harness.synchronize(device)
        begin = time.perf_counter()
        F.linear(x, w)
        harness.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return 2.0 * tokens * config.dim * config.ffn_dim / best / 1e9
