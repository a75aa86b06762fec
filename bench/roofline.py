"""The arithmetic of a pass and of a block, by formula: with a time it gives the share of the device's peak rate."""

from cfpp_rt.config import ModelConfig, RolloutConfig


def cached_pass_flops(config: ModelConfig, tokens: int, visible_tokens: int) -> tuple[float, float]:
    """Return the FLOPs of one pass over the KV cache: those of the linear layers, and those of both attentions.

    Text and time embeddings, text keys and values, patch embedding and head are not counted: they are computed once
    per prompt or are small. (`cfpp_rt.distill.flops.pass_flops` counts a training pass, which computes them each time.)

    tokens: queries of the pass.
    visible_tokens: keys that each of them attends to.
    """
    d, cross = config.dim, 2 if config.text_len else 0  # cross-attention's query and output projection
    per_token = (4 + cross) * d * d + 2 * d * config.ffn_dim
    linear = 2.0 * tokens * per_token * config.num_layers
    attention = 4.0 * tokens * d * (visible_tokens + config.text_len) * config.num_layers
    return linear, attention


def block_flops(config: ModelConfig, rollout_config: RolloutConfig, tokens: int, visible: int, *, steps: int) -> float:
    """Return the FLOPs that generating one block needs, the same for every implementation.

    Counted are `steps` denoising passes and the clean pass of the block before, unless there is none or refresh is
    "skip". The last layer of a clean pass needs its keys and values only.

    tokens: per latent frame.
    visible: latent frames that the block attends to, its own included.
    """
    n = rollout_config.frames_per_block
    own = n * tokens
    flops = steps * sum(cached_pass_flops(config, own, visible * tokens))
    if visible > n and rollout_config.refresh != "skip":
        before = visible if visible == rollout_config.window else visible - n  # a full window has moved on by one block
        layers = sum(cached_pass_flops(config, own, before * tokens)) * (config.num_layers - 1) / config.num_layers
        flops += layers + 4.0 * own * config.dim**2
    return flops
