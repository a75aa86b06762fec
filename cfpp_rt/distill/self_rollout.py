"""Videos that the student makes in stage dmd, through the cache of the runtime, with a gradient at one step per block.

Every block is denoised as in the runtime, up to a step drawn at random (the exit). That step runs with gradient, and
its clean estimate is the block; then the clean pass writes the block's keys and values. Keys and values of earlier
blocks are detached, so that the gradient of a block does not reach its predecessors, as Self Forcing (arXiv 2506.08009)
describes it. In the published code gradients flow through a cache that is overwritten.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from cfpp_rt.cache import CacheShape, KVCache, LayerCache
from cfpp_rt.config import RolloutConfig
from cfpp_rt.core.frame_ring import FrameRing, slots_for
from cfpp_rt.core.schedule import FlowMatchSchedule, add_noise
from cfpp_rt.distill.forward import Condition
from cfpp_rt.distill.processes import gather, release
from cfpp_rt.distill.rng import index, normal_like
from cfpp_rt.errors import InputError
from cfpp_rt.model.attention import Attend, AttentionMetadata
from cfpp_rt.model.projections import Projections
from cfpp_rt.model.transformer import CausalWanTransformer, LayerText


@dataclasses.dataclass(frozen=True)
class Exits:
    """The denoising steps, counted from 0, at which blocks end.

    first: exit of the first block that is made.
    later: exit of all other blocks.
    """

    first: int
    later: int

    @classmethod
    def draw(cls, config: RolloutConfig, generator: torch.Generator) -> "Exits":
        """Draw both uniformly; they are equal if the first block has no steps of its own, as published."""
        later = index(len(config.steps), generator)
        return cls(later if config.first_steps is None else index(len(config.first_steps), generator), later)


class SelfRollout:
    """Rollouts of a student in training, with the passes of the runtime.

    network: the student.
    config: how the runtime will run it; `refresh` is "separate" here.
    checkpointing: activation checkpointing of the passes with gradient.
    """

    def __init__(self, network: CausalWanTransformer, config: RolloutConfig, *, checkpointing: bool = False):
        self.network, self.checkpointing = network, checkpointing
        self.config = config.replace(refresh="separate")
        self.schedule = FlowMatchSchedule(config.shift)

    def __call__(
        self,
        noise: Tensor,
        condition: Condition,
        exits: Exits,
        generator: torch.Generator,
        *,
        initial_latents: Tensor | None = None,
        gradient: bool = True,
    ) -> Tensor:
        """Return videos, float32 [B, F, C, h, w]: the F0 given latent frames, then the clean estimates of those made.

        noise: [B, F - F0, C, h, w], noise of the blocks to make.
        condition: conditions of all F latent frames.
        generator: source of the noise that is added between steps.
        initial_latents: clean latents [B, F0, C, h, w], complete blocks; None = F0 is 0.
        gradient: compute the exit steps with gradient.
        Raise InputError if noise or initial_latents are not complete blocks.
        """
        given = 0 if initial_latents is None else initial_latents.shape[1]
        n, latent_frames = self.config.frames_per_block, given + noise.shape[1]
        if latent_frames % n or given % n or not noise.shape[1]:
            raise InputError(
                f"noise and initial_latents must be blocks of {n} frames, got {noise.shape[1]} and {given}"
            )
        gather(self.network)  # once for all passes
        run = _Run(self, noise, condition, latent_frames)
        blocks = [] if initial_latents is None else [initial_latents.float()]
        for start in range(0, given, n):
            run.write_cache(blocks[0][:, start : start + n], start, 0.0)
        for start in range(given, latent_frames, n):
            first = start == given
            steps = (self.config.first_steps or self.config.steps) if first else self.config.steps
            x = noise[:, start - given : start - given + n]
            blocks.append(run.block(x, start, steps, exits.first if first else exits.later, generator, gradient))
            if start + n < latent_frames:
                run.write_cache(blocks[-1].detach(), start, float(self.config.context_noise))
        if not gradient:
            release(self.network)
        return torch.cat(blocks, dim=1)


class _Run:
    """The cache of one rollout and the forward passes over it."""

    def __init__(self, rollout: SelfRollout, like: Tensor, condition: Condition, latent_frames: int):
        self.rollout, self.network, self.condition = rollout, rollout.network, condition
        config, (batch, _, _, height, width) = rollout.config, like.shape
        sinks, ring = slots_for(config, latent_frames)
        tokens = self.network.config.tokens_per_frame(height, width)
        self.cameras = condition.projections(like.device)
        camera = self.cameras is not None
        shape = CacheShape.of(self.network.config, batch, sinks + ring, tokens, camera=camera)
        self.cache = KVCache(shape, FrameRing(sinks, ring, config.frames_per_block), self.network.dtype, like.device)
        self.tables = self.network.rotary_tables(height, width, like.device)
        with torch.no_grad():
            self.text: list[LayerText] = self.network.embed_text(condition.prompt_embeds)

    def block(
        self, x: Tensor, start: int, steps: tuple[int, ...], exit_step: int, generator: torch.Generator, gradient: bool
    ) -> Tensor:
        """Denoise a block from x [B, n, C, h, w], which starts at latent frame `start`; return its clean estimate."""
        schedule = self.rollout.schedule
        timesteps = schedule.warp(steps)
        sigmas = schedule.sigma(timesteps).tolist()
        self.cache.ring.write(start)
        for step in range(exit_step):
            velocity = self._cached(x, start, float(timesteps[step]), num_outputs=1)
            x = add_noise(x - sigmas[step] * velocity.float(), normal_like(x, generator), sigmas[step + 1])
        timestep = float(timesteps[exit_step])
        run = self._differentiable if gradient else self._cached
        return x - sigmas[exit_step] * run(x, start, timestep).float()

    def write_cache(self, clean: Tensor, start: int, timestep: float) -> None:
        """Run the clean pass of a finished block, which writes its keys and values."""
        if self.cache.ring.end <= start:
            self.cache.ring.write(start)
        self._cached(clean, start, timestep, num_outputs=0)

    def _actions(self, start: int, latent_frames: int) -> Tensor | None:
        actions = self.condition.actions
        return None if actions is None else actions[:, start : start + latent_frames]

    def _cameras(self, start: int, latent_frames: int) -> Projections | None:
        return None if self.cameras is None else self.cameras.of_frames(start, start + latent_frames)

    @torch.no_grad()
    def _cached(self, x: Tensor, start: int, timestep: float, num_outputs: int = 1) -> Tensor:
        batch, latent_frames = x.shape[:2]
        time = self.network.embed_time(
            torch.full((batch, latent_frames), timestep), self._actions(start, latent_frames)
        )
        block_frames = range(start, start + latent_frames)
        visible = self.cache.ring.visible(block_frames.stop, self.rollout.config.window)
        attn = AttentionMetadata.build(
            self.cache, self.tables, [block_frames], [visible], self._cameras(start, latent_frames)
        )
        return self.network(x, time, self.text, self.cache, attn, num_outputs)

    def _differentiable(self, x: Tensor, start: int, timestep: float) -> Tensor:
        batch, latent_frames = x.shape[:2]
        block_frames = range(start, start + latent_frames)
        visible = self.cache.ring.visible(block_frames.stop, self.rollout.config.window)
        past = [frame for frame in visible if frame not in block_frames]
        return self.network.forward_sequence(
            x,
            torch.full((batch, latent_frames), timestep),
            self.condition.prompt_embeds,
            self._actions(start, latent_frames),
            self.tables.sequence(block_frames),
            lambda layer: self._attend(self.cache.layers[layer], past),
            cameras=self._cameras(start, latent_frames),
            camera_attend=lambda layer: self._attend(self.cache.layers[layer].camera, past),
            checkpointing=self.rollout.checkpointing,
        )

    def _attend(self, layer: LayerCache | None, past: list[int]) -> Attend:
        """Return attention of a block to itself and to the latent frames `past`, copied from the cache now."""
        if not past or layer is None:
            return F.scaled_dot_product_attention
        t = self.cache.tokens_per_frame
        runs = [slice(first * t, last * t) for first, last in self.cache.ring.runs(past)]
        keys, values = (torch.cat([part[:, :, run] for run in runs], dim=2) for part in (layer.keys, layer.values))

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2))

        return attend
