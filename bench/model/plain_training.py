"""Stage 1 of the training as a plain PyTorch loop: dense masked attention, textbook layers, no op of this project.

`bench.model.train` compares the trainer with it. It takes the weights of the same network by name and computes the same
loss, but shares no arithmetic with `cfpp_rt`.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from cfpp_rt.config import ModelConfig

Weights = Mapping[str, Tensor]


def teacher_forced(
    w: Weights,
    config: ModelConfig,
    clean: Tensor,
    noisy: Tensor,
    timesteps: Tensor,
    prompt_embeds: Tensor,
    mask: Tensor,
) -> Tensor:
    """Return the velocity [B, F, C, h, w] of the noisy latent frames, which attend to the clean ones (teacher forcing).

    w: parameters by their names in the network.
    clean, noisy: latents [B, F, C, h, w].
    timesteps: [B, F], of the noisy frames.
    prompt_embeds: [B, text_len, text_dim].
    mask: bool [2S, 2S], see `token_mask`.
    """
    both = torch.cat([clean, noisy], dim=1)
    levels = torch.cat([torch.zeros_like(timesteps), timesteps], dim=1)
    frames, (height, width) = clean.shape[1], clean.shape[-2:]
    x = F.conv3d(both.transpose(1, 2), w["patch_embedding.weight"], w["patch_embedding.bias"], stride=config.patch_size)
    rows, columns = x.shape[-2:]
    x = x.flatten(2).transpose(1, 2)
    half = config.freq_dim // 2
    angles = levels.double()[..., None] * 10000.0 ** (-torch.arange(half) / half)
    e = torch.cat([angles.cos(), angles.sin()], dim=-1).float()
    e = _linear(w, F.silu(_linear(w, e, "time_embedding.0")), "time_embedding.2")
    modulation = _linear(w, F.silu(e), "time_projection.1").unflatten(2, (6, -1))
    text = None
    if config.text_len:
        text = F.gelu(_linear(w, prompt_embeds, "text_embedding.0"), approximate="tanh")
        text = _linear(w, text, "text_embedding.2")
    rotations = _rotations(config.head_dim, frames, rows, columns)
    for layer in range(config.num_layers):
        x = _block(w, config, f"blocks.{layer}", x, modulation, text, rotations, mask)
    shift, scale = (w["head.modulation"] + e[:, :, None]).unbind(2)
    x = _modulate(x, shift, scale, config.eps)[:, x.shape[1] // 2 :]
    x = _linear(w, x, "head.head")
    _, p, q = config.patch_size
    x = x.reshape(len(x), frames, height // p, width // q, p, q, config.out_dim)
    return x.permute(0, 1, 6, 2, 4, 3, 5).reshape(clean.shape)


def token_mask(visible: Tensor, tokens: int) -> Tensor:
    """Expand a mask over frames, bool [N, N], to one over tokens, bool [N * tokens, N * tokens]."""
    return visible.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)


def _linear(w: Weights, x: Tensor, name: str) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def _modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    tokens = x.shape[1] // shift.shape[1]
    shift, scale = (row.repeat_interleave(tokens, dim=1) for row in (shift, scale))
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


def _rotations(head_dim: int, frames: int, rows: int, columns: int) -> Tensor:
    """Return rotations, complex64 [2 * frames * rows * columns, head_dim / 2]; both halves have the same positions."""
    pairs = head_dim // 2
    third = pairs // 3
    positions = torch.meshgrid(torch.arange(frames), torch.arange(rows), torch.arange(columns), indexing="ij")
    parts = [
        axis.reshape(-1, 1) * 10000.0 ** (-torch.arange(n, dtype=torch.float64) / n)
        for axis, n in zip(positions, (pairs - 2 * third, third, third), strict=True)
    ]
    angles = torch.cat(parts, dim=1).repeat(2, 1)
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)


def _block(
    w: Weights,
    config: ModelConfig,
    name: str,
    x: Tensor,
    modulation: Tensor,
    text: Tensor | None,
    rotations: Tensor,
    mask: Tensor,
) -> Tensor:
    rows = (w[f"{name}.modulation"] + modulation).unbind(2)
    tokens = x.shape[1] // modulation.shape[1]
    gate1, gate2 = (rows[i].repeat_interleave(tokens, dim=1) for i in (2, 5))

    def heads(t: Tensor) -> Tensor:
        return t.unflatten(2, (config.num_heads, -1)).transpose(1, 2)

    def project(t: Tensor, kind: str, part: str) -> Tensor:
        t = _linear(w, t, f"{name}.{kind}.{part}")
        return t if part == "v" else F.rms_norm(t, t.shape[-1:], w[f"{name}.{kind}.norm_{part}.weight"], config.eps)

    def rotated(t: Tensor) -> Tensor:
        pairs = torch.view_as_complex(heads(t).unflatten(3, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * rotations).flatten(3)

    y = _modulate(x, rows[0], rows[1], config.eps)
    q, k = (rotated(project(y, "self_attn", part)) for part in "qk")
    y = F.scaled_dot_product_attention(q, k, heads(project(y, "self_attn", "v")), attn_mask=mask)
    x = x + gate1 * _linear(w, y.transpose(1, 2).flatten(2), f"{name}.self_attn.o")
    if text is not None:
        y = F.layer_norm(x, x.shape[-1:], w[f"{name}.norm3.weight"], w[f"{name}.norm3.bias"], config.eps)
        k, v = (heads(project(text, "cross_attn", part)) for part in "kv")
        y = F.scaled_dot_product_attention(heads(project(y, "cross_attn", "q")), k, v)
        x = x + _linear(w, y.transpose(1, 2).flatten(2), f"{name}.cross_attn.o")
    y = _modulate(x, rows[3], rows[4], config.eps)
    y = _linear(w, F.gelu(_linear(w, y, f"{name}.ffn.0"), approximate="tanh"), f"{name}.ffn.2")
    return x + gate2 * y
