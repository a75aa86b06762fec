"""The causal Wan transformer: noisy latent frames, their timesteps and a KV cache in, velocity out.

Module and parameter names are those of the public checkpoints, so loading is a matter of stripping prefixes.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cfpp_rt.cache import KVCache
from cfpp_rt.config import ModelConfig
from cfpp_rt.device.transfer import to_device
from cfpp_rt.errors import InputError
from cfpp_rt.model.attention import Attend, AttentionMetadata, SequenceCamera
from cfpp_rt.model.block import TransformerBlock
from cfpp_rt.model.projections import Projections
from cfpp_rt.model.rope import RotaryTables
from cfpp_rt.ops.adaln_modulate import adaln_modulate

# Cross-attention keys and values of one layer, [B, H, text_len, D] each; None for a model without text.
LayerText = tuple[Tensor, Tensor] | None


@dataclasses.dataclass(frozen=True)
class TimeEmbedding:
    """Modulation rows of the timesteps and actions of N latent frames, for every layer at once.

    blocks: [L, B or 1, N, 6, dim]. head: [B or 1, N, 2, dim].
    """

    blocks: Tensor
    head: Tensor


def sinusoid(timesteps: Tensor, length: int) -> Tensor:
    """Return cos, then sin of t * 10000^(-i / half) for i in 0..half - 1: float64 [N] to float64 [N, length]."""
    half = length // 2
    exponents = torch.arange(half, dtype=torch.float64, device=timesteps.device) / half
    angles = timesteps.to(torch.float64)[:, None] * torch.exp(-math.log(10000.0) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class Head(nn.Module):
    """The output layer: modulation and projection of tokens to patches of the velocity."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head = nn.Linear(config.dim, math.prod(config.patch_size) * config.out_dim)
        self.modulation = nn.Parameter(torch.empty(1, 2, config.dim))


class CausalWanTransformer(nn.Module):
    """The causal Wan2.1 network: patch embedding, time and text embedding, `num_layers` blocks, head.

    Latents are [B, F, C, h, w]; h and w must be multiples of the patch. Tokens are frame-major, then row, then column.
    Text and time are embedded once per prompt and per step list with `embed_text` and `embed_time`; `forward` takes the
    results. The constructor leaves the weights unset: `load_model` and `random_model` fill them.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        dim = config.dim
        self.config = config
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, kernel_size=config.patch_size, stride=config.patch_size)
        if config.text_len:
            self.text_embedding = nn.Sequential(
                nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
            )
        if config.num_actions:
            self.action_embedding = nn.Embedding(config.num_actions, dim)
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks: Sequence[TransformerBlock] = nn.ModuleList(  # type: ignore[assignment]
            TransformerBlock(config) for _ in range(config.num_layers)
        )
        self.head = Head(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.patch_embedding.weight.device

    def embed_text(self, prompt_embeds: Tensor) -> list[LayerText]:
        """Return the cross-attention keys and values of prompt_embeds [B, text_len, text_dim], layer by layer.

        A model without text takes [B, 0, text_dim] and returns None per layer.
        """
        wanted = (self.config.text_len, self.config.text_dim)
        if prompt_embeds.ndim != 3 or tuple(prompt_embeds.shape[1:]) != wanted:
            raise InputError(f"prompt_embeds must be [B, {wanted[0]}, {wanted[1]}], got {list(prompt_embeds.shape)}")
        text = self._text_tokens(prompt_embeds)
        return [block.cross_attn.project_text(text) if block.cross_attn else None for block in self.blocks]

    def _text_tokens(self, prompt_embeds: Tensor) -> Tensor:
        return self.text_embedding(prompt_embeds.to(self.device, self.dtype)) if self.config.text_len else prompt_embeds

    def embed_time(self, timesteps: Tensor, actions: Tensor | None = None) -> TimeEmbedding:
        """Return the modulation rows of every layer.

        timesteps: float [N] or [B, N] in 0..1000; not integers, 937.5 is common.
        actions: int64 [B, N] in 0..num_actions - 1, for a model with actions; added to the embedding of the timestep.
        """
        rows, head = self._time_rows(torch.atleast_2d(timesteps), actions)
        return TimeEmbedding(torch.stack([block.modulation + rows for block in self.blocks]), head)

    def _time_rows(self, timesteps: Tensor, actions: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return rows [B or 1, N, 6, dim], to which a block adds its own, and rows of the head [B or 1, N, 2, dim]."""
        wave = sinusoid(to_device(timesteps, self.device).flatten(), self.config.freq_dim).to(self.dtype)
        e = self.time_embedding(wave).unflatten(0, timesteps.shape)
        if self.config.num_actions:
            if actions is None:
                raise InputError(f"actions must be given, 0..{self.config.num_actions - 1} per frame, got None")
            e = e + self.action_embedding(to_device(actions, self.device))
        return self.time_projection(e).unflatten(2, (6, -1)), self.head.modulation + e[:, :, None]

    def rotary_tables(self, latent_height: int, latent_width: int, device: torch.device | None = None) -> RotaryTables:
        """Return the rotary tables of a latent size. Raises InputError where the patch does not divide it."""
        _, rows, columns = self.config.patch_size
        self.config.tokens_per_frame(latent_height, latent_width)  # raises where the patch does not fit
        size = (latent_height // rows, latent_width // columns)
        return RotaryTables.build(self.config.head_dim, *size, device or self.device)

    def forward(
        self,
        latents: Tensor,
        time: TimeEmbedding,
        text: Sequence[LayerText],
        cache: KVCache,
        attn: AttentionMetadata,
        num_outputs: int | None = None,
        probe: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor | None:
        """Run one pass: write keys and values of all latent frames, return the velocity of the last groups.

        latents: [B, F, C, h, w].
        time: from `embed_time`, one row per latent frame.
        text: from `embed_text`.
        cache: written in place.
        attn: where the cache is written, and what each group attends to.
        num_outputs: number of last groups whose velocity is returned; None = all; 0 = only the cache is updated, and
            the last layer stops at its keys and values.
        probe: called with (layer, tokens) after every layer, for diagnosis.
        Returns [B, F', out_dim, h, w], or None with num_outputs 0.
        """
        frames, _, height, width = latents.shape[1:]
        total = len(attn.ranges)
        num_outputs = total if num_outputs is None else num_outputs
        x = self.patchify(latents)
        last = len(self.blocks) - 1
        for layer, block in enumerate(self.blocks):
            kept = num_outputs if layer == last else total
            x = block(x, time.blocks[layer], text[layer], cache.layers[layer], attn, kept)
            if probe is not None:
                probe(layer, x)
        if num_outputs == 0:
            return None
        return self.unpatchify(x, time.head[:, -(frames * num_outputs // total) :], height, width)

    def forward_sequence(
        self,
        latents: Tensor,
        timesteps: Tensor,
        prompt_embeds: Tensor,
        actions: Tensor | None,
        rope: Tensor,
        attend: Callable[[int], Attend],
        *,
        cameras: Projections | None = None,
        camera_attend: Callable[[int], Attend] | None = None,
        checkpointing: bool = False,
    ) -> Tensor:
        """Return the velocity of a whole sequence of latent frames without a cache; differentiable, for training.

        latents: [B, F, C, h, w].
        timesteps: float [B, F].
        prompt_embeds: [B, text_len, text_dim].
        actions: int64 [B, F], or None.
        rope: float32 [S, D / 2, 2], from `RotaryTables.sequence`.
        attend: returns the attention of a layer.
        cameras: of the F latent frames; None = without the camera branch.
        camera_attend: returns the attention of a layer's camera branch; default: `attend`.
        checkpointing: keep only the blocks' inputs for the backward pass, and run the blocks again there.
        """
        if cameras is not None and not self.config.camera:
            raise InputError("cameras must not be given to a model without the camera branch")
        if cameras is not None and cameras.matrices.shape[:2] != latents.shape[:2]:
            got, wanted = list(cameras.matrices.shape[:2]), list(latents.shape[:2])
            raise InputError(f"cameras must be of the latents' [B, F] = {wanted}, got {got}")
        height, width = latents.shape[-2:]
        rows, head = self._time_rows(timesteps, actions)
        text = self._text_tokens(prompt_embeds)
        x = self.patchify(latents)
        for layer, block in enumerate(self.blocks):
            camera = None if cameras is None else SequenceCamera(cameras, (camera_attend or attend)(layer))
            inputs = (x, rows, text, rope, attend(layer), camera)
            run = block.forward_sequence
            x = checkpoint(run, *inputs, use_reentrant=False) if checkpointing else run(*inputs)
        return self.unpatchify(x, head, height, width)

    def patchify(self, latents: Tensor) -> Tensor:
        """Embed latents [B, F, C, h, w] as tokens [B, F * T, dim]."""
        return self.patch_embedding(latents.to(self.dtype).transpose(1, 2)).flatten(2).transpose(1, 2).contiguous()

    def unpatchify(self, x: Tensor, rows: Tensor, height: int, width: int) -> Tensor:
        """Apply the head: tokens [B, F * T, dim] and rows [B or 1, F, 2, dim] to velocity [B, F, C, h, w]."""
        batch, frames = x.shape[0], rows.shape[1]
        shift, scale = rows.unbind(2)
        x = self.head.head(adaln_modulate(x, shift, scale, self.config.eps))
        _, p, q = self.config.patch_size
        x = x.reshape(batch, frames, height // p, width // q, p, q, self.config.out_dim)
        return x.permute(0, 1, 6, 2, 4, 3, 5).reshape(batch, frames, self.config.out_dim, height, width)


def add_camera_branch(model: CausalWanTransformer) -> CausalWanTransformer:
    """Add a camera branch of zeros to a model without one, in place: until it is trained, results stay the same."""
    if model.config.camera:
        raise InputError("model must be without the camera branch, got one that has it")
    model.config = dataclasses.replace(model.config, camera=True)
    dim = model.config.dim
    for block in model.blocks:
        block.self_attn.prope_o = nn.Linear(dim, dim, device=model.device, dtype=model.dtype)
        for parameter in block.self_attn.prope_o.parameters():
            nn.init.zeros_(parameter).requires_grad_(model.patch_embedding.weight.requires_grad)
    return model


def random_model(config: ModelConfig, *, seed: int, dtype: torch.dtype, device: str = "cpu") -> CausalWanTransformer:
    """Return a model with random weights, for benchmarks and trials without a checkpoint; it generates noise."""
    with torch.device("meta"):
        model = CausalWanTransformer(config).to(dtype)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm_q.weight", "norm_k.weight", "norm3.weight")):
                parameter.fill_(1)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                fan_in = parameter[0].numel() if "modulation" not in name else config.dim
                parameter.normal_(0, fan_in**-0.5, generator=generator)
    return model.eval().requires_grad_(False)
