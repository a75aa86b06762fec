"""A rollout's passes as CUDA graphs: captured once, valid for every frame, lent from one rollout to the next.

A graph replays what was captured, with the addresses and host values of that moment. So whatever changes between
passes (latents, slot, ranges, rotary row, timestep, actions, cameras, text) lies in buffers on the device that the
graphs own and every call fills, and a graph keeps the cache that it was captured over. There is one graph for each kind
of pass: a block's step, its clean pass, and both together where refresh is fused.
"""

import dataclasses
import warnings
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from cfpp_rt.cache import CacheShape, KVCache, allocate, give_back
from cfpp_rt.config import RolloutConfig
from cfpp_rt.core.camera import Projections
from cfpp_rt.core.frame_ring import FrameRing
from cfpp_rt.device.capture import Capture, CudaCapture, Work
from cfpp_rt.errors import OutOfMemoryError
from cfpp_rt.model.attention import CachePass, CameraPass
from cfpp_rt.model.transformer import CausalWanTransformer, LayerText, TimeEmbedding
from cfpp_rt.ops.block_attention import why_not_kernel
from cfpp_rt.ops.token_ranges import TokenRanges


class Holder(Protocol):
    @property
    def over(self) -> bool:
        """Whether it runs no more passes."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What graphs are made for; another needs others. shape: of the cache. latent_size: (h, w). block: frames."""

    shape: CacheShape
    latent_size: tuple[int, int]
    block: int
    fused: bool
    kv_dtype: str | None


def _inputs(latents: Tensor, time: TimeEmbedding, cached: CachePass) -> list[Tensor]:
    """All that a pass reads and that another pass of its kind may have otherwise, but text."""
    tensors = [latents, time.blocks, time.head, cached.write_index, cached.ranges.device, cached.rope_time]
    if cached.camera is not None:
        projections = cached.camera.projections
        tensors += [projections.matrices, projections.inverses, cached.camera.slots]
    return tensors


class GraphedPasses:
    """Called like the model, for the passes of rollouts of one setting over one cache.

    The result is overwritten by the next call. Passes that look inside (`probe`), and those that set the scales of a
    float8 cache, are run by the model itself.
    """

    def __init__(self, model: CausalWanTransformer, setting: Setting, rollout: RolloutConfig, capture: Capture):
        """Allocates the cache and captures; raises what either raises."""
        self.model, self.setting = model, setting
        shape = setting.shape
        self.cache = allocate(shape, FrameRing(0, shape.frames, setting.block), model.dtype, model.device, rollout)
        self.holder: weakref.ref[Holder] | None = None
        sizes = model.config
        with torch.inference_mode():
            self._text = model.embed_text(torch.zeros(shape.batch, sizes.text_len, sizes.text_dim))
            self._filled_from: Sequence[LayerText] | None = None  # held, so that no other list is taken for it
            for layer in self.cache.layers:
                layer.waits_for_scales = False  # else setting them would become part of every pass
            self._inputs: dict[tuple[int, int], list[Tensor]] = {}
            self._runs: dict[tuple[int, int], Work] = {}  # hold all that graphs read: they keep addresses only
            self._replays: dict[tuple[int, int], Work] = {}
            for groups, keep in [(1, 1), (1, 0), *([(2, 1)] if setting.fused else [])]:
                latents, time, cached = self._buffers(groups)
                self._inputs[groups, keep] = _inputs(latents, time, cached)
                run = partial(model, latents, time, self._text, self.cache, cached, groups=keep)
                self._runs[groups, keep], self._replays[groups, keep] = run, capture(run)

    def _buffers(self, groups: int) -> tuple[Tensor, TimeEmbedding, CachePass]:
        """What the graph of a kind reads, filled with values of a pass that could be."""
        model, shape, device = self.model, self.setting.shape, self.model.device
        batch, frames = shape.batch, groups * self.setting.block
        latents = torch.zeros(batch, frames, model.config.in_dim, *self.setting.latent_size, device=device)
        actions = torch.zeros(batch, frames, dtype=torch.int64) if model.config.num_actions else None
        tables = model.rotary_tables(*self.setting.latent_size)
        ranges = self.cache.token_ranges([list(range(self.setting.block))] * groups)
        camera = None
        if shape.camera:
            units = [torch.eye(4, device=device).repeat(batch, frames, 1, 1) for _ in range(2)]
            camera = CameraPass(Projections(*units), torch.arange(frames, device=device) % self.setting.block)
        cached = CachePass(
            write_index=torch.zeros(batch, groups, dtype=torch.int32, device=device),
            ranges=TokenRanges.on_device(ranges.device),
            rope_time=tables.time(range(frames)).repeat(batch, 1, 1, 1),
            rope_rows=tables.rows,
            rope_columns=tables.columns,
            camera=camera,
        )
        return latents, model.embed_time(torch.zeros(frames), actions), cached

    def __call__(
        self,
        latents: Tensor,
        time: TimeEmbedding,
        text: Sequence[LayerText],
        cache: KVCache,
        cached: CachePass,
        groups: int,
        probe: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor | None:
        """As `CausalWanTransformer.forward`; cache: `self.cache`."""
        if probe is not None or cache.layers[0].waits_for_scales:
            return self.model(latents, time, text, cache, cached, groups=groups, probe=probe)
        if text is not self._filled_from:
            for buffers, given in zip(self._text, text, strict=True):
                for buffer, tensor in zip(buffers or (), given or (), strict=True):
                    buffer.copy_(tensor)
            self._filled_from = text
        kind = len(cached.ranges), groups
        for buffer, tensor in zip(self._inputs[kind], _inputs(latents, time, cached), strict=True):
            buffer.copy_(tensor)
        return self._replays[kind]()


class Graphs:
    """The CUDA graphs of a model, made when a rollout first asks and kept for the next one of the same setting.

    model: as it will stay; its weights may change in place, its modules must not. With the graphs their cache is kept,
    until a rollout of another setting asks or `release` is called. capture: makes the `Capture` for a device.
    """

    def __init__(self, model: CausalWanTransformer, capture: Callable[[torch.device], Capture] = CudaCapture):
        self.model = model
        self._capture = capture
        self._sets: list[GraphedPasses] = []
        self._refused: dict[Setting, str] = {}  # not tried again
        self._told: set[str] = set()

    def lend(
        self, holder: Holder, shape: CacheShape, latent_size: tuple[int, int], rollout: RolloutConfig
    ) -> GraphedPasses | str:
        """Graphs for the holder alone until it is over or gone; or the reason why there can be none, and a warning.

        Raises OutOfMemoryError if the cache does not fit.
        """
        found = self._find(shape, latent_size, rollout)
        if isinstance(found, str):
            self.release()
            if found not in self._told:
                give_back(self.model.device)  # what an attempt took: no traceback holds it any more
                warnings.warn(f"rollout without CUDA graphs: {found}", RuntimeWarning, stacklevel=4)
                self._told.add(found)
            return found
        found.holder = weakref.ref(holder)
        return found

    def _find(self, shape: CacheShape, latent_size: tuple[int, int], rollout: RolloutConfig) -> GraphedPasses | str:
        """Graphs that nobody holds: kept ones, else new ones."""
        setting = Setting(shape, latent_size, rollout.frames_per_block, rollout.refresh == "fused", rollout.kv_dtype)
        reason = self._refused.get(setting) or self.why_not(shape.head_dim)
        if reason is not None:
            return reason
        kept = next((graphs for graphs in self._sets if graphs.setting == setting and _is_free(graphs)), None)
        if kept is not None:
            if self.model.device.type == "cuda":
                torch.cuda.synchronize(self.model.device)  # the holder before may have used another stream
            return kept
        self.release()
        try:
            made = GraphedPasses(self.model, setting, rollout, self._capture(self.model.device))
        except OutOfMemoryError:  # not even the cache
            raise
        except RuntimeError as error:  # what CUDA and torch raise
            first_line = str(error).partition("\n")[0]
            reason = f"capture failed: {type(error).__name__}: {first_line}"
            if not isinstance(error, torch.OutOfMemoryError):
                self._refused[setting] = reason
            return reason
        self._sets.append(made)
        give_back(self.model.device)  # what warming up took, on a stream that is not used again
        return made

    def why_not(self, head_dim: int) -> str | None:
        """Why passes of this model cannot be captured; None = they can."""
        device = self.model.device
        if self._capture is CudaCapture and device.type != "cuda":
            return f"CUDA graphs need a CUDA GPU, the model is on {device}"
        return why_not_kernel(device, self.model.dtype, head_dim)

    def release(self) -> None:
        """Let go of graphs and caches that no rollout uses."""
        held, self._sets = self._sets, [graphs for graphs in self._sets if not _is_free(graphs)]
        if len(held) > len(self._sets):
            del held
            give_back(self.model.device)


def _is_free(graphs: GraphedPasses) -> bool:
    holder = None if graphs.holder is None else graphs.holder()
    return holder is None or holder.over
