"""Forward passes for training: the module that the runtime runs, without a cache and differentiable.

Timesteps are float32 throughout. The published code rounds them to bfloat16, which makes single steps of the
consistency stage up to 1.6 times too long.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from cfpp_rt.core.camera import Cameras
from cfpp_rt.distill import masks
from cfpp_rt.errors import InputError
from cfpp_rt.model.projections import Projections
from cfpp_rt.model.transformer import CausalWanTransformer


@dataclasses.dataclass(frozen=True)
class Condition:
    """Conditions of B clips of F latent frames.

    prompt_embeds: [B, text_len, text_dim].
    actions: int64 [B, F], or None.
    cameras: cameras of 1 or B clips and F latent frames, or None.
    """

    prompt_embeds: Tensor
    actions: Tensor | None = None
    cameras: Cameras | None = None

    def to(self, device: torch.device) -> "Condition":
        """Return these conditions on another device. Cameras are moved when they are projected."""
        actions = None if self.actions is None else self.actions.to(device)
        return dataclasses.replace(self, prompt_embeds=self.prompt_embeds.to(device), actions=actions)

    def twice(self) -> "Condition":
        """Return the conditions of a sequence that contains the same latent frames twice."""
        actions = None if self.actions is None else torch.cat([self.actions, self.actions], dim=1)
        cameras = None if self.cameras is None else self.cameras.at([*range(len(self.cameras))] * 2)
        return dataclasses.replace(self, actions=actions, cameras=cameras)

    def projections(self, device: torch.device) -> Projections | None:
        """Return the projections for the camera branch, relative to the first camera; None without cameras."""
        if self.cameras is None:
            return None
        return Projections.of(self.cameras.rows(len(self.prompt_embeds)).from_first(), device)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Dependencies between the latent frames of a training clip.

    block: latent frames per block.
    window: as in `RolloutConfig`.
    dense: use a mask of all pairs of tokens (see `masks.attention`).
    """

    block: int = 1
    window: int | None = None
    dense: bool = False


class Denoiser:
    """A transformer that predicts velocities of complete clips under an attention mask.

    network: called through its method `forward_sequence`, so that sharding and hooks apply.
    checkpointing: activation checkpointing, when gradients are enabled.
    """

    def __init__(self, network: CausalWanTransformer, layout: Layout | None = None, *, checkpointing: bool = False):
        self.network, self.layout, self.checkpointing = network, layout or Layout(), checkpointing
        self._prepared: dict[tuple[object, ...], tuple[Tensor, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {}

    def teacher_forced(
        self,
        clean: Tensor,
        noisy: Tensor,
        timesteps: Tensor,
        condition: Condition,
        clean_timesteps: Tensor | None = None,
    ) -> Tensor:
        """Return the velocity of noisy frames, each block conditioned on the clean blocks before it.

        The result is float32 [B, F, C, h, w].
        clean, noisy: [B, F, C, h, w].
        timesteps: float [B, F] of the noisy frames.
        clean_timesteps: float [B, F] of the clean frames, if noise was added to them; None = 0.
        """
        latent_frames = _require_same_shape(clean, noisy)
        if clean_timesteps is None:
            clean_timesteps = torch.zeros_like(timesteps)
        both = torch.cat([clean, noisy], dim=1)
        levels = torch.cat([clean_timesteps, timesteps], dim=1)
        visible = ("teacher_forcing", latent_frames, [*range(latent_frames)] * 2)
        return self._run(both, levels, condition.twice(), *visible)[:, latent_frames:]

    def diffusion_forced(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """Return the velocity of noisy frames conditioned on the noisy frames before them: float32 [B, F, C, h, w].

        For tests: no stage trains in this way.
        """
        return self._run(noisy, timesteps, condition, "causal", noisy.shape[1], [*range(noisy.shape[1])])

    def bidirectional(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """Return the velocity of noisy frames that all attend to each other: float32 [B, F, C, h, w]."""
        return self._run(noisy, timesteps, condition, "bidirectional", noisy.shape[1], [*range(noisy.shape[1])])

    def _run(
        self,
        latents: Tensor,
        timesteps: Tensor,
        condition: Condition,
        kind: str,
        latent_frames: int,
        positions: list[int],
    ) -> Tensor:
        height, width = latents.shape[-2:]
        key = (kind, latent_frames, height, width, latents.device)
        if key not in self._prepared:
            self._prepared[key] = self._prepare(kind, latent_frames, positions, height, width, latents.device)
        rope, attend = self._prepared[key]
        return self.network.forward_sequence(
            latents,
            timesteps,
            condition.prompt_embeds,
            condition.actions,
            rope,
            lambda layer: attend,
            cameras=condition.projections(latents.device),
            checkpointing=self.checkpointing and torch.is_grad_enabled(),
        ).float()

    def _prepare(
        self, kind: str, latent_frames: int, positions: list[int], height: int, width: int, device: torch.device
    ) -> tuple[Tensor, Callable[[Tensor, Tensor, Tensor], Tensor]]:
        tokens = self.network.config.tokens_per_frame(height, width)
        if kind == "bidirectional":
            visible = masks.bidirectional(latent_frames)
        else:
            visible = getattr(masks, kind)(latent_frames, self.layout.block, self.layout.window)
        rope = self.network.rotary_tables(height, width, device).sequence(positions)
        return rope, masks.attention(visible, tokens, device, dense=self.layout.dense)


def _require_same_shape(clean: Tensor, noisy: Tensor) -> int:
    if clean.ndim != 5 or clean.shape != noisy.shape:
        raise InputError(f"noisy must be [B, F, C, h, w] like clean {list(clean.shape)}, got {list(noisy.shape)}")
    return clean.shape[1]
