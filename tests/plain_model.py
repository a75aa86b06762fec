"""The network once more, the plain way: the whole sequence in one forward, a dense mask, no cache, no ops of ours.

In float64 it is the oracle; in bfloat16 it is the plain PyTorch whose error ours may at most double. Written from the
formulas, sharing no code with cfpp_rt.
"""

import torch
import torch.nn.functional as F


def _rms(x, weight, eps):
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def _rope(x, angles):
    """x [B, S, H, D]; angles float64 [S, D/2]."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    turned = pairs * torch.polar(torch.ones_like(angles), angles)[None, :, None]
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def _angles(head_dim, frames, rows, columns):
    pairs = head_dim // 2
    third = pairs // 3
    grid = torch.meshgrid(
        torch.tensor(frames).double(), torch.arange(rows).double(), torch.arange(columns).double(), indexing="ij"
    )
    parts = [
        positions.reshape(-1, 1) * 10000.0 ** (-torch.arange(n).double() / n)
        for positions, n in zip(grid, (pairs - 2 * third, third, third), strict=True)
    ]
    return torch.cat(parts, dim=1)


def velocity(weights, config, latents, timesteps, frames, visible, embeds, dtype=torch.float64, cameras=None):
    """Velocity of every frame, [B, F, C, h, w] in `dtype`.

    latents [B, F, C, h, w]; timesteps [F]; frames: absolute index of each; visible: bool [F, F], query frame by key
    frame; embeds [B, text_len, text_dim]; cameras: P = K V of each frame, float64 [B, F, 4, 4].
    """
    w = {name: tensor.to(dtype) for name, tensor in weights.items()}
    batch, count, _, height, width = latents.shape
    _, p, q = config.patch_size
    rows, columns = height // p, width // q
    tokens, heads, eps = rows * columns, config.num_heads, config.eps

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def split(x):
        return x.unflatten(-1, (heads, -1))

    def attention(q_, k_, v_, mask=None):
        q_, k_, v_ = (t.transpose(1, 2) for t in (q_, k_, v_))
        return F.scaled_dot_product_attention(q_, k_, v_, attn_mask=mask).transpose(1, 2).flatten(2)

    x = latents.to(dtype).reshape(batch, count, -1, rows, p, columns, q).permute(0, 1, 3, 5, 2, 4, 6)
    x = x.reshape(batch, count * tokens, -1) @ w["patch_embedding.weight"].flatten(1).T + w["patch_embedding.bias"]

    half = config.freq_dim // 2
    angles = timesteps.double()[:, None] * 10000.0 ** (-torch.arange(half).double() / half)
    e = torch.cat([angles.cos(), angles.sin()], 1).to(dtype)
    e = linear(F.silu(linear(e, "time_embedding.0")), "time_embedding.2")
    e0 = linear(F.silu(e), "time_projection.1").unflatten(1, (6, -1))
    text = linear(F.gelu(linear(embeds.to(dtype), "text_embedding.0"), approximate="tanh"), "text_embedding.2")

    def per_token(row):  # [F, dim] -> [1, S, dim]
        return row.repeat_interleave(tokens, 0)[None]

    rope = _angles(config.head_dim, frames, rows, columns)
    mask = visible.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
    for layer in range(config.num_layers):
        b = f"blocks.{layer}"
        s1, c1, g1, s2, c2, g2 = (per_token(r) for r in (w[f"{b}.modulation"] + e0).unbind(1))
        y = F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + c1) + s1
        a = f"{b}.self_attn"
        qk = [_rope(split(_rms(linear(y, f"{a}.{n}"), w[f"{a}.norm_{n}.weight"], eps)), rope) for n in "qk"]
        z = linear(attention(*qk, split(linear(y, f"{a}.v")), mask), f"{a}.o")
        if cameras is not None:
            z = z + linear(
                _seen_by_cameras(w, a, y, cameras, tokens, split, linear, attention, mask, eps), f"{a}.prope_o"
            )
        x = x + g1 * z
        y = F.layer_norm(x, x.shape[-1:], w[f"{b}.norm3.weight"], w[f"{b}.norm3.bias"], eps)
        a = f"{b}.cross_attn"
        query = split(_rms(linear(y, f"{a}.q"), w[f"{a}.norm_q.weight"], eps))
        key = split(_rms(linear(text, f"{a}.k"), w[f"{a}.norm_k.weight"], eps))
        x = x + linear(attention(query, key, split(linear(text, f"{a}.v"))), f"{a}.o")
        y = F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + c2) + s2
        x = x + g2 * linear(F.gelu(linear(y, f"{b}.ffn.0"), approximate="tanh"), f"{b}.ffn.2")
    shift, scale = (per_token(r) for r in (w["head.modulation"] + e[:, None]).unbind(1))
    x = linear(F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift, "head.head")
    x = x.reshape(batch, count, rows, columns, p, q, -1).permute(0, 1, 6, 2, 4, 3, 5)
    return x.reshape(batch, count, -1, height, width)


def _seen_by_cameras(w, a, y, cameras, tokens, split, linear, attention, mask, eps):
    """The camera branch, with a matrix per token."""
    p = cameras.to(y.dtype).repeat_interleave(tokens, 1)
    inverse = torch.linalg.inv(cameras).to(y.dtype).repeat_interleave(tokens, 1)

    def each_group(matrices, x):  # column vectors of 4
        return torch.einsum("bsij,bsgj->bsgi", matrices, x.unflatten(2, (-1, 4))).flatten(2)

    q, k = (_rms(linear(y, f"{a}.{n}"), w[f"{a}.norm_{n}.weight"], eps) for n in "qk")
    turned = (each_group(p.mT, q), each_group(inverse, k), each_group(inverse, linear(y, f"{a}.v")))
    return each_group(p, attention(*(split(x) for x in turned), mask))


def block_causal(count, block, window, sinks):
    """bool [count, count]: frame i sees its own block and those before, within the window, and the sinks."""
    visible = torch.zeros(count, count, dtype=torch.bool)
    for i in range(count):
        end = (i // block + 1) * block
        for j in range(min(end, count)):
            visible[i, j] = j < sinks or window is None or j >= end - (window - sinks)
    return visible


def rollout(
    weights, config, rollout_config, noise, renoise, embeds, timesteps, first_timesteps, sigma, dtype, cameras=None
):
    """Latents [B, F, C, h, w] of a rollout, every pass recomputed from scratch. sigma: timestep to noise level."""
    n = rollout_config.frames_per_block
    renoise = iter(renoise)
    out = torch.zeros(noise.shape, dtype=dtype)
    for start in range(0, noise.shape[1], n):
        end = start + n
        x = clean = noise[:, start:end].to(dtype)
        for step, t in enumerate(first_timesteps if start == 0 else timesteps):
            s = sigma(t)
            if step:
                x = (1 - s) * clean + s * next(renoise).reshape(clean.shape).to(dtype)
            clock = torch.full((end,), float(rollout_config.context_noise))
            clock[start:] = t
            visible = block_causal(end, n, rollout_config.window, rollout_config.sinks)
            latents = torch.cat([out[:, :start], x], dim=1)
            seen = None if cameras is None else cameras[:, :end]
            v = velocity(weights, config, latents, clock, list(range(end)), visible, embeds, dtype, seen)[:, start:]
            clean = x - s * v
        out[:, start:end] = clean
    return out
