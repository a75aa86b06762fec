"""The forward passes of rollouts as CUDA graphs: captured once, valid for every frame, reused by later rollouts.

A CUDA graph replays fixed addresses and host values. Everything that changes between passes (latents, slot, ranges,
rotary row, timestep, actions, cameras, text) is therefore copied into device buffers that the graphs own, and each
graph is tied to its KV cache. There is one graph for each kind
of pass: a block's step, its clean pass, and both together where the refresh is fused.
"""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from cfpp_rt.cache import CacheShape, KVCache, empty_device_cache
from cfpp_rt.config import RolloutConfig
from cfpp_rt.core.frame_ring import FrameRing
from cfpp_rt.device.capture import Capture, CudaCapture, Work
from cfpp_rt.device.lease import LeasePool
from cfpp_rt.errors import OutOfMemoryError
from cfpp_rt.model.attention import AttentionMetadata
from cfpp_rt.model.projections import Projections
from cfpp_rt.model.transformer import CausalWanTransformer, LayerText, TimeEmbedding
from cfpp_rt.ops.block_attention import why_not_kernel
from cfpp_rt.ops.token_ranges import TokenRanges


class Holder(Protocol):
    """The holder of captured passes: a rollout."""

    @property
    def closed(self) -> bool:
        """True if it runs no more passes."""


@dataclasses.dataclass(frozen=True)
class GraphKey:
    """The settings that captured passes depend on.

    shape: size of the KV cache. latent_size: (h, w). frames_per_block: latent frames of a block. fused: whether the
    refresh is fused. kv_dtype: see `RolloutConfig`.
    """

    shape: CacheShape
    latent_size: tuple[int, int]
    frames_per_block: int
    fused: bool
    kv_dtype: str | None


def _input_tensors(latents: Tensor, time: TimeEmbedding, attn: AttentionMetadata) -> list[Tensor]:
    """The input tensors that differ between replays of one graph, in buffer order; text is copied separately."""
    tensors = [latents, time.blocks, time.head, attn.write_index, attn.ranges.tensor, attn.rope_time]
    if attn.camera is not None:
        projections = attn.camera.projections
        tensors += [projections.matrices, projections.inverses, attn.camera.slots]
    return tensors


class GraphedModel:
    """A model whose passes over one KV cache are CUDA graphs; called like the model.

    The result is overwritten by the next call. Passes with a `probe`, and those that set the scales of a float8 cache,
    are run by the model itself.
    """

    def __init__(self, model: CausalWanTransformer, key: GraphKey, config: RolloutConfig, capture: Capture):
        """Allocate the cache and capture the passes.

        Raises OutOfMemoryError if the cache does not fit, and RuntimeError if the capture fails.
        """
        self.model, self.key = model, key
        shape = key.shape
        self.cache = KVCache.allocate(
            shape, FrameRing(0, shape.capacity, key.frames_per_block), model.dtype, model.device, config
        )
        sizes = model.config
        with torch.inference_mode():
            self._text = model.embed_text(torch.zeros(shape.batch, sizes.text_len, sizes.text_dim))
            self._filled_from: Sequence[LayerText] | None = None  # the text that the buffers hold, compared by identity
            for layer in self.cache.layers:
                layer.waits_for_scales = False  # else setting them would become part of every pass
            self._inputs: dict[tuple[int, int], list[Tensor]] = {}
            self._runs: dict[tuple[int, int], Work] = {}  # keeps alive what the graphs read by address
            self._replays: dict[tuple[int, int], Work] = {}
            for blocks, outputs in [(1, 1), (1, 0), *([(2, 1)] if key.fused else [])]:
                latents, time, attn = self._buffers(blocks)
                self._inputs[blocks, outputs] = _input_tensors(latents, time, attn)
                run = partial(model, latents, time, self._text, self.cache, attn, outputs)
                self._runs[blocks, outputs], self._replays[blocks, outputs] = run, capture(run)

    def _buffers(self, blocks: int) -> tuple[Tensor, TimeEmbedding, AttentionMetadata]:
        """Allocate the buffers that the graph of one kind of pass reads, filled with values of a possible pass."""
        model, shape, device = self.model, self.key.shape, self.model.device
        batch, frames, own = shape.batch, blocks * self.key.frames_per_block, range(self.key.frames_per_block)
        latents = torch.zeros(batch, frames, model.config.in_dim, *self.key.latent_size, device=device)
        actions = torch.zeros(batch, frames, dtype=torch.int64) if model.config.num_actions else None
        projections = None
        if shape.camera:
            identities = [torch.eye(4, device=device).repeat(batch, frames, 1, 1) for _ in range(2)]
            projections = Projections(*identities)
        tables = model.rotary_tables(*self.key.latent_size)
        attn = AttentionMetadata.build(self.cache, tables, [own] * blocks, [list(own)] * blocks, projections)
        attn = dataclasses.replace(
            attn,
            ranges=TokenRanges.on_device(attn.ranges.tensor),
            rope_time=attn.rope_time.clone(memory_format=torch.contiguous_format),
        )
        return latents, model.embed_time(torch.zeros(frames), actions), attn

    def __call__(
        self,
        latents: Tensor,
        time: TimeEmbedding,
        text: Sequence[LayerText],
        cache: KVCache,
        attn: AttentionMetadata,
        num_outputs: int,
        probe: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor | None:
        """Run a pass; arguments as for `CausalWanTransformer.forward`, cache: `self.cache`."""
        if probe is not None or cache.layers[0].waits_for_scales:
            return self.model(latents, time, text, cache, attn, num_outputs, probe)
        if text is not self._filled_from:
            for buffers, given in zip(self._text, text, strict=True):
                for buffer, tensor in zip(buffers or (), given or (), strict=True):
                    buffer.copy_(tensor)
            self._filled_from = text
        kind = len(attn.ranges), num_outputs
        for buffer, tensor in zip(self._inputs[kind], _input_tensors(latents, time, attn), strict=True):
            buffer.copy_(tensor)
        return self._replays[kind]()


class CudaGraphCache:
    """The CUDA graphs of a model, captured for the first rollout with a `GraphKey` and reused by later ones with it.

    model: its weights may change in place; its modules must not be replaced.
    capture: makes the `Capture` of a device.

    The KV cache stays allocated with the graphs, until a rollout with other settings begins or `release` is called.
    """

    def __init__(self, model: CausalWanTransformer, capture: Callable[[torch.device], Capture] = CudaCapture):
        self.model = model
        self._capture = capture
        self._pool: LeasePool[GraphedModel] = LeasePool(model.device)
        self._refused: dict[GraphKey, str] = {}  # settings whose capture failed, which is not tried again
        self._warned: set[str] = set()

    def acquire(
        self, holder: Holder, shape: CacheShape, latent_size: tuple[int, int], config: RolloutConfig
    ) -> GraphedModel | str:
        """Return captured passes for the holder alone until it is closed or gone, or the reason why there are none.

        The reason is also given by a warning, once. Raises OutOfMemoryError if the cache does not fit.
        """
        key = GraphKey(shape, latent_size, config.frames_per_block, config.refresh == "fused", config.kv_dtype)
        reason = self._refused.get(key) or self.why_not(shape.head_dim)
        if reason is None:
            try:
                return self._pool.acquire(
                    holder, key, lambda: GraphedModel(self.model, key, config, self._capture(self.model.device))
                )
            except OutOfMemoryError:  # not even the cache fits
                raise
            except RuntimeError as error:  # raised by CUDA or torch
                first_line = str(error).partition("\n")[0]
                reason = f"capture failed: {type(error).__name__}: {first_line}"
                if not isinstance(error, torch.OutOfMemoryError):
                    self._refused[key] = reason
        self._pool.release()
        if reason not in self._warned:
            empty_device_cache(self.model.device)  # memory of the attempt: no traceback refers to it any more
            warnings.warn(f"rollout without CUDA graphs: {reason}", RuntimeWarning, stacklevel=4)
            self._warned.add(reason)
        return reason

    def why_not(self, head_dim: int) -> str | None:
        """Return the reason why passes of this model cannot be captured; None = they can."""
        device = self.model.device
        if self._capture is CudaCapture and device.type != "cuda":
            return f"CUDA graphs need a CUDA GPU, the model is on {device}"
        return why_not_kernel(device, self.model.dtype, head_dim)

    def release(self) -> None:
        """Free the graphs and caches that no rollout uses."""
        self._pool.release()
