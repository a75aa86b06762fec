"""The baseline of `cfpp bench`: the published loop in plain PyTorch, on the weights of a loaded model.

It has the structure of the published code: every denoising step and every clean pass is a forward of its own, time is
embedded in each of them, diffusers decodes, and the cache is shifted when the window moves on. It uses no op of this
project and no CUDA graph; attention is `scaled_dot_product_attention`. As in the published code, cross-attention's keys
and values are computed once. Its float64 arithmetic (rotary angles) and its reads from the device are left out, in its
favour. It generates the same latents as `Rollout`.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from cfpp_rt.codec.base import Codec
from cfpp_rt.codec.streaming import to_uint8
from cfpp_rt.codec.wan import WanVAE
from cfpp_rt.config import ModelConfig, RolloutConfig
from cfpp_rt.core.schedule import FlowMatchSchedule
from cfpp_rt.device.timing import Timings
from cfpp_rt.errors import InputError
from cfpp_rt.model.rope import rotate
from cfpp_rt.model.transformer import CausalWanTransformer
from cfpp_rt.reference.adaln_modulate import adaln_modulate
from cfpp_rt.reference.denoise_update import denoise_update
from cfpp_rt.reference.gated_residual import gated_residual
from cfpp_rt.runtime.noise import NoiseSource
from cfpp_rt.values import Frames, Latents

Weights = dict[str, Tensor]


def layer(
    w: Weights,
    x: Tensor,
    rows: Tensor,
    text: tuple[Tensor, Tensor] | None,
    keys: Tensor,
    values: Tensor,
    start: int,
    rope: Tensor,
    eps: float,
) -> Tensor:
    """Apply one transformer block to tokens and write their keys and values into the cache.

    w: parameters by their names in the block.
    x: tokens [B, S, dim].
    rows: modulation [B or 1, F, 6, dim].
    text: keys and values [B, H, text_len, D] of the prompt; None without text.
    keys, values: cache [B, H, capacity, D]; attention reads it up to the last token written.
    start: cache token that the first token of x is written to.
    rope: rotation [S, D / 2, 2].
    """
    heads, end = keys.shape[1], start + x.shape[1]

    def linear(tokens: Tensor, name: str) -> Tensor:
        return F.linear(tokens, w[f"{name}.weight"], w[f"{name}.bias"])

    def normed(tokens: Tensor, name: str) -> Tensor:
        return F.rms_norm(tokens, tokens.shape[-1:], w[f"{name}.weight"], eps).unflatten(2, (heads, -1))

    shift1, scale1, gate1, shift2, scale2, gate2 = rows.unbind(2)
    y = adaln_modulate(x, shift1, scale1, eps)
    q, k = (normed(linear(y, f"self_attn.{n}"), f"self_attn.norm_{n}") for n in "qk")
    q, k = (rotate(t, rope[:, None]).to(x.dtype).transpose(1, 2) for t in (q, k))
    keys[:, :, start:end] = k
    values[:, :, start:end] = linear(y, "self_attn.v").unflatten(2, (heads, -1)).transpose(1, 2)
    y = F.scaled_dot_product_attention(q, keys[:, :, :end], values[:, :, :end]).transpose(1, 2).flatten(2)
    y = linear(y, "self_attn.o")
    if text is None:
        x, y = gated_residual(x, y, gate1, shift2, scale2, eps)
    else:
        x, y = gated_residual(x, y, gate1, w["norm3.bias"], w["norm3.weight"], eps)
        q = normed(linear(y, "cross_attn.q"), "cross_attn.norm_q").transpose(1, 2)
        y = linear(F.scaled_dot_product_attention(q, *text).transpose(1, 2).flatten(2), "cross_attn.o")
        x, y = gated_residual(x, y, None, shift2, scale2, eps)
    y = linear(F.gelu(linear(y, "ffn.0"), approximate="tanh"), "ffn.2")
    per_frame = (len(x), gate2.shape[1], -1, x.shape[2])
    return (x.view(per_frame) + gate2[:, :, None] * y.view(per_frame)).view_as(x)


def _separate(weights: Weights) -> Weights:
    """Return the weights with the projections that `fuse_qkv` has packed under their own names, as views."""
    packed = {name: weights.pop(f"self_attn.qkv.{name}", None) for name in ("weight", "bias")}
    for name, tensor in packed.items():
        if tensor is not None:
            weights |= {f"self_attn.{n}.{name}": part for n, part in zip("qkv", tensor.chunk(3), strict=True)}
    return weights


Layer = Callable[..., Tensor]


class EagerRollout:
    """An iterator of finished blocks like `Rollout`, with the same noise for the same seed.

    run_layer: `layer`, or a compiled version of it.
    """

    def __init__(
        self,
        model: CausalWanTransformer,
        prompt_embeds: Tensor,
        config: RolloutConfig,
        *,
        latent_size: tuple[int, int],
        latent_frames: int,
        seed: int = 0,
        run_layer: Layer = layer,
    ):
        if config.kv_dtype is not None:
            raise InputError(f"kv_dtype must be None for the eager baseline, got {config.kv_dtype}")
        self.model, self.config = model, config
        self.latent_frames, self.latent_size = latent_frames, latent_size
        self._layer, self._batch = run_layer, prompt_embeds.shape[0]
        sizes: ModelConfig = model.config
        self.noise = NoiseSource(
            (sizes.in_dim, *latent_size), self._batch, model.device, latent_frames=latent_frames, seed=seed
        )
        self._schedule = FlowMatchSchedule(config.shift)
        self._weights = [_separate(dict(block.named_parameters())) for block in model.blocks]
        self._tables = model.rotary_tables(*latent_size)
        self._tokens = sizes.tokens_per_frame(*latent_size)
        self._window = min(latent_frames, config.window or latent_frames)
        shape = (self._batch, sizes.num_heads, self._window * self._tokens, sizes.head_dim)
        self._cache = [
            tuple(torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in range(2)) for _ in model.blocks
        ]
        with torch.inference_mode():
            self._text = model.embed_text(prompt_embeds)
        self.next_latent_frame = 0
        self._local = 0  # frame slot of the cache that the next block is written to
        self._pending: Tensor | None = None  # the newest block, until its clean pass

    def __iter__(self) -> Iterator[Latents]:
        return self

    @torch.inference_mode()
    def refresh(self) -> None:
        """Run the clean pass of the newest block, if it is pending and another block follows."""
        if self._pending is not None and self.next_latent_frame < self.latent_frames:
            n = self.config.frames_per_block
            self._forward(self._pending, float(self.config.context_noise), self.next_latent_frame - n, self._local - n)
        self._pending = None

    @torch.inference_mode()
    def __next__(self) -> Latents:
        if self.next_latent_frame >= self.latent_frames:
            raise StopIteration
        self.refresh()
        config, n, start = self.config, self.config.frames_per_block, self.next_latent_frame
        if self._local + n > self._window:
            self._shift(self._local + n - self._window)
        timesteps = self._schedule.warp(config.first_steps or config.steps if start == 0 else config.steps)
        levels = [*self._schedule.sigma(timesteps).to(self.model.device)[:, None, None].expand(-1, 1, n), None]
        x = self.noise.start(n)
        for step, timestep in enumerate(timesteps.tolist()):
            velocity = self._forward(x, timestep, start, self._local)
            noise = None if levels[step + 1] is None else self.noise.between_steps(n)
            clean, x = denoise_update(x, velocity, levels[step], noise, levels[step + 1])
        self.next_latent_frame, self._local = start + n, self._local + n
        self._pending = None if config.refresh == "skip" else clean
        return Latents(clean, start)

    def _shift(self, frames: int) -> None:
        """Drop the oldest frames after the sinks and move the newer ones to their place."""
        kept, dropped = self.config.sinks * self._tokens, frames * self._tokens
        for pair in self._cache:
            for tensor in pair:
                tensor[:, :, kept : tensor.shape[2] - dropped] = tensor[:, :, kept + dropped :].clone()
        self._local -= frames

    def _forward(self, latents: Tensor, timestep: float, frame: int, slot: int) -> Tensor:
        model, sizes = self.model, self.model.config
        n = latents.shape[1]
        actions = torch.zeros(1, n, dtype=torch.int64) if sizes.num_actions else None
        time = model.embed_time(torch.full((n,), timestep), actions)
        rope = self._tables.sequence(range(frame, frame + n))
        x = model.patchify(latents)
        for index, weights in enumerate(self._weights):
            cache = (*self._cache[index], slot * self._tokens, rope)
            x = self._layer(weights, x, time.blocks[index], self._text[index], *cache, sizes.eps)
        shift, scale = time.head.unbind(2)
        x = model.head.head(adaln_modulate(x, shift, scale, sizes.eps))
        (height, width), (_, p, q) = self.latent_size, sizes.patch_size
        x = x.reshape(self._batch, n, height // p, width // q, p, q, sizes.out_dim)
        return x.permute(0, 1, 6, 2, 4, 3, 5).reshape(self._batch, n, sizes.out_dim, height, width)


class EagerStream:
    """An iterator of `Frames` like `Stream`, over an `EagerRollout`, with the same `Timings`."""

    def __init__(
        self,
        *,
        model: CausalWanTransformer,
        codec: Codec,
        encode_prompt: Callable[[list[str]], Tensor],
        prompt: list[str] | Tensor,
        config: RolloutConfig,
        latent_frames: int,
        size: tuple[int, int],
        seed: int,
        run_layer: Layer,
    ):
        self.timings = Timings(model.device)
        if not isinstance(prompt, Tensor):
            with self.timings.stage("encode_text"):
                prompt = encode_prompt(prompt)
        self._decoder = codec.library_decoder() if isinstance(codec, WanVAE) else codec.decoder()
        latent_size = (size[0] // codec.spatial_factor, size[1] // codec.spatial_factor)
        self.rollout = EagerRollout(
            model, prompt, config, latent_size=latent_size, latent_frames=latent_frames, seed=seed, run_layer=run_layer
        )
        self._delivered = 0

    def __iter__(self) -> Iterator[Frames]:
        return self

    def __next__(self) -> Frames:
        if (
            self._delivered
            and self.rollout.config.refresh != "skip"
            and self.rollout.next_latent_frame < self.rollout.latent_frames
        ):
            with self.timings.stage("refresh"):
                self.rollout.refresh()
        with self.timings.stage("diffuse"):
            latents = next(self.rollout).values
        with self.timings.stage("decode"):
            pixels = to_uint8(self._decoder.decode(latents)).cpu()
        frames = Frames(pixels, self._delivered)
        self._delivered += pixels.shape[1]
        self.timings.deliver(pixels.shape[1])
        return frames
