"""Text in, latents out, block by block: the autoregressive few-step sampler.

For every block of `frames_per_block` latent frames: denoise from noise in a few steps, each an estimate of the clean
block that is noised again to the next level; then a clean pass at the context timestep rewrites the block's keys and
values, so that later blocks attend to the finished frames (Causal Forcing, arXiv 2602.02214, algorithm 2).

With `refresh="fused"` that clean pass travels in one forward with the first step of the next block: its queries see the
window that ends with their own block, the noisy queries the window that ends one block later.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from cfpp_rt.cache import CacheShape, KVCache, ring_for
from cfpp_rt.config import RolloutConfig
from cfpp_rt.errors import InputError, NonFiniteError
from cfpp_rt.memory import require_cache_fits
from cfpp_rt.model.attention import CachePass
from cfpp_rt.model.transformer import CausalWanTransformer, TimeEmbedding
from cfpp_rt.noise import NoiseSource
from cfpp_rt.schedule import FlowMatchSchedule, add_noise, to_clean
from cfpp_rt.values import Conditioning, Latents

_PREFILL_TIMESTEP = 0.0  # given frames are clean, whatever context_noise is: as published


@dataclasses.dataclass(frozen=True)
class _Group:
    """One block's part of a pass: latents [B, n, C, h, w], first frame, timestep, and the frames its queries see."""

    latents: Tensor
    start: int
    timestep: float
    sees: list[int]


class Rollout:
    """One batch of videos in the making: an iterator of finished blocks, `Latents` [B, n, C, h, w] float32.

    model: in eval mode, on its device, in its dtype. text: Conditioning [B, text_len, text_dim].
    latent_size: (h, w), multiples of the patch. frames: latent frames in all, given ones included; None = without end
    (needs a window). initial: given clean latents [B, F0, C, h, w] that the video continues (image-to-video, video
    extension); they are not yielded. seed, noise, renoise: see `NoiseSource`. check_finite: raise NonFiniteError,
    naming frame and layer, when the model produces NaN or infinity (one device synchronisation per block).

    Raises InputError for sizes that do not fit together and OutOfMemoryError if the cache cannot be allocated.
    """

    def __init__(
        self,
        model: CausalWanTransformer,
        text: Conditioning,
        config: RolloutConfig,
        *,
        latent_size: tuple[int, int],
        frames: int | None,
        initial: Tensor | None = None,
        seed: int | Sequence[int] = 0,
        noise: Tensor | None = None,
        renoise: Iterable[Tensor] | None = None,
        check_finite: bool = True,
    ):
        block = config.frames_per_block
        given = 0 if initial is None else initial.shape[1]
        if frames is not None and (frames < 1 or frames % block):
            raise InputError(f"frames must be a multiple >= {block} of frames_per_block={block}, got {frames}")
        if given % block or (frames is not None and given >= frames):
            raise InputError(
                f"initial must hold a multiple of {block} frames and fewer than frames={frames}, got {given}"
            )
        batch = text.embeds.shape[0]
        frame_shape = (model.config.in_dim, *latent_size)
        if initial is not None and (initial.shape[0] != batch or initial.shape[2:] != frame_shape):
            raise InputError(f"initial must be [B={batch}, F, {frame_shape}], got {list(initial.shape)}")

        self.model, self.config, self.frames = model, config, frames
        self.tables = model.rotary_tables(*latent_size)
        self.noise = NoiseSource(frame_shape, batch, model.device, seed=seed, noise=noise, renoise=renoise)
        ring = ring_for(config, frames)
        shape = CacheShape.of(model.config, batch, ring.capacity, model.config.tokens_per_frame(*latent_size))
        require_cache_fits(shape, model.dtype, model.device, block)
        self.cache = KVCache(shape, ring, model.dtype, model.device)
        self.next_frame = 0
        self._batch = batch
        self._check_finite = check_finite
        self._schedule = FlowMatchSchedule(config.shift)
        self._times: dict[tuple[float, ...], TimeEmbedding] = {}
        self._text = self._embed(text)
        self._unrefreshed: Latents | None = None  # the finished block that still waits for its clean pass
        self._held: dict[int, Tensor] = {}  # latents whose keys are in the cache, by first frame
        self._generated = False
        for start in range(0, given, block):
            self._prefill(initial[:, start : start + block])  # type: ignore[index]

    def __iter__(self) -> Iterator[Latents]:
        return self

    def __next__(self) -> Latents:
        with torch.inference_mode():
            return self._next_block()

    def refresh(self) -> None:
        """Run the clean pass of the newest block now, if it still waits; otherwise do nothing.

        `next()` does it when needed. Call it to spend idle time between frames, before the next input arrives.
        """
        block, self._unrefreshed = self._unrefreshed, None
        if block is not None:
            with torch.inference_mode():
                self._forward([self._group(block.values, block.start, self.config.context_noise)], keep=0)

    def switch_prompt(self, text: Conditioning, *, recache: bool = False) -> None:
        """Follow another prompt from the next block on.

        The newest block's clean pass still runs under the old prompt. With `recache`, the keys and values of all frames
        in the window are then made again under the new one, oldest block first: one clean pass per block.
        """
        if text.embeds.shape[0] != self._batch:
            raise InputError(f"text must have batch {self._batch}, got {text.embeds.shape[0]}")
        if not recache and self.config.refresh != "skip":
            self.refresh()
        self._unrefreshed = None
        self._text = self._embed(text)
        if not recache or self.next_frame == 0:
            return
        visible = self.cache.ring.visible(self.next_frame, self.config.window)
        with torch.inference_mode():
            for start, latents in sorted(self._held.items()):
                end = start + latents.shape[1]
                if any(start <= frame < end for frame in visible):
                    sees = [frame for frame in visible if frame < end]
                    self._forward([_Group(latents, start, float(self.config.context_noise), sees)], keep=0)

    def _embed(self, text: Conditioning) -> list[tuple[Tensor, Tensor]]:
        with torch.inference_mode():
            return self.model.embed_text(text.embeds)

    def _prefill(self, latents: Tensor) -> None:
        with torch.inference_mode():
            values = latents.to(self.model.device, torch.float32)
            start, self.next_frame = self.next_frame, self.next_frame + values.shape[1]
            self.cache.ring.write(start)
            self._hold(values, start)
            self._forward([self._group(values, start, _PREFILL_TIMESTEP)], keep=0)

    def _next_block(self) -> Latents:
        config, n, start = self.config, self.config.frames_per_block, self.next_frame
        if self.frames is not None and start >= self.frames:
            raise StopIteration
        steps = config.steps if self._generated else config.first_steps or config.steps
        timesteps = self._schedule.warp(steps).tolist()
        sigmas = self._schedule.sigma(torch.tensor(timesteps)).tolist()
        if config.refresh == "separate":
            self.refresh()

        x = self.noise.start(n)
        clean = x
        for step, (timestep, sigma) in enumerate(zip(timesteps, sigmas, strict=True)):
            if step:
                x = add_noise(clean, self.noise.between_steps(n), sigma)
            groups = self._open_block(start) if step == 0 else []
            groups.append(self._group(x, start, timestep))
            velocity = self._forward(groups, keep=1)
            clean = to_clean(x, velocity, sigma)
            if self._check_finite and not bool(clean.isfinite().all()):
                self._locate_non_finite(groups, step)

        self.next_frame, self._generated = start + n, True
        self._hold(clean, start)
        block = Latents(clean, start)
        if config.refresh != "skip":
            self._unrefreshed = block
        return block

    def _open_block(self, start: int) -> list[_Group]:
        """Claim the block's slots; return the waiting clean pass of the block before, to travel with its first step.

        The slots are claimed first: every key of a pass is written before any is read, so the frames that the clean
        queries see are looked up in the ring as the pass will find it.
        """
        self.cache.ring.write(start)
        block, self._unrefreshed = self._unrefreshed, None
        return [] if block is None else [self._group(block.values, block.start, self.config.context_noise)]

    def _group(self, latents: Tensor, start: int, timestep: float) -> _Group:
        sees = self.cache.ring.visible(start + latents.shape[1], self.config.window)
        return _Group(latents, start, float(timestep), sees)

    def _hold(self, latents: Tensor, start: int) -> None:
        ring = self.cache.ring
        self._held[start] = latents
        self._held = {first: kept for first, kept in self._held.items() if ring.holds[ring.slot(first)] == first}

    def _time(self, groups: list[_Group]) -> TimeEmbedding:
        """Modulation rows, one per frame; a rollout uses a handful of combinations, each made once."""
        key = tuple(group.timestep for group in groups)
        if key not in self._times:
            timesteps = torch.tensor(key).repeat_interleave(self.config.frames_per_block)
            self._times[key] = self.model.embed_time(timesteps)
        return self._times[key]

    def _place(self, groups: list[_Group]) -> CachePass:
        cache, device = self.cache, self.model.device
        first_tokens = [cache.ring.slot(group.start) * cache.tokens_per_frame for group in groups]
        frames = [group.start + i for group in groups for i in range(group.latents.shape[1])]
        return CachePass(
            write_index=torch.tensor([first_tokens] * self._batch, dtype=torch.int32, device=device),
            ranges=tuple(cache.token_ranges(group.sees) for group in groups),
            rope_time=self.tables.time(frames).expand(self._batch, -1, -1, -1),
            rope_rows=self.tables.rows,
            rope_columns=self.tables.columns,
        )

    def _forward(self, groups: list[_Group], keep: int, probe: Callable[[int, Tensor], None] | None = None) -> Tensor:
        latents = groups[0].latents if len(groups) == 1 else torch.cat([group.latents for group in groups], dim=1)
        return self.model(
            latents, self._time(groups), self._text, self.cache, self._place(groups), groups=keep, probe=probe
        )

    def _locate_non_finite(self, groups: list[_Group], step: int) -> None:
        """Run the failed pass again (it overwrites the same slots), looking at every layer."""
        start = groups[-1].start
        where = f"latent frame {start}, step {step + 1}"

        def stop_at_first(layer: int, tokens: Tensor) -> None:
            if not bool(tokens.isfinite().all()):
                raise NonFiniteError(f"the model produced NaN or infinity at {where}, layer {layer}")

        self._forward(groups, keep=1, probe=stop_at_first)
        raise NonFiniteError(f"the model produced NaN or infinity at {where}, output head")
