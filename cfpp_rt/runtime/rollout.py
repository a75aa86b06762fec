"""Prompt embeddings in, latents out, block by block: the autoregressive few-step sampler.

For every block of `frames_per_block` latent frames, start from noise and run a few steps; each step predicts the clean
block and adds noise at the next level. Then a clean pass at the context timestep rewrites the block's keys and values,
so that later blocks attend to the finished frames (Causal Forcing, arXiv 2602.02214, algorithm 2).

With `refresh="fused"` that clean pass is computed in the same pass as the first step of the next block. In that pass
the clean queries see the window that ends with their own block; the noisy queries of the next block see the window
that ends with theirs.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from cfpp_rt.cache import CacheShape, KVCache, empty_device_cache
from cfpp_rt.config import RolloutConfig
from cfpp_rt.core.camera import CameraPath, Cameras
from cfpp_rt.core.controls import (
    Actions,
    action_rows,
    camera_rows,
    check_camera_count,
    check_latent_frames,
    no_actions,
)
from cfpp_rt.core.exclusive import Exclusive
from cfpp_rt.core.frame_ring import FrameRing, slots_for
from cfpp_rt.core.schedule import noise_levels
from cfpp_rt.errors import InputError, OutOfMemoryError
from cfpp_rt.model.projections import Projections
from cfpp_rt.model.transformer import CausalWanTransformer, LayerText
from cfpp_rt.ops.denoise_update import denoise_update
from cfpp_rt.runtime.checks import check_initial_latents, check_prompt_embeds
from cfpp_rt.runtime.cuda_graphs import CudaGraphCache
from cfpp_rt.runtime.finite_check import FiniteCheck, Probe
from cfpp_rt.runtime.forward_inputs import BlockInput, FinishedBlock, ForwardBuilder, ForwardInputs
from cfpp_rt.runtime.noise import NoiseSource
from cfpp_rt.values import Latents

PREFILL_TIMESTEP = 0.0  # given frames are clean, whatever context_noise is: as published


class Rollout:
    """An iterator over the finished blocks of a batch of videos: `Latents`, float32 [B, n, C, h, w].

    model: in eval mode, on its device, in its dtype.
    prompt_embeds: float [B, text_len, text_dim]. Text embeddings, zero past the end of a prompt; [B, 0, text_dim] for
        a model without text.
    config: steps, window, sinks and refresh.
    latent_size: (h, w), multiples of the model's patch.
    latent_frames: latent frames in all, given ones included; None = without end, which needs a window.
    initial_latents: clean latents [B, F0, C, h, w] that the video continues (image-to-video, video extension). They
        are not yielded.
    cameras: for a model with the camera branch. One per latent frame, given ones included, or a single one that stands
        still until `set_cameras`; without end, the last one stands still. None: the branch is left out, and no memory
        is allocated for it.
    seed, noise, renoise: see `NoiseSource`.
    check_finite: True: NonFiniteError is raised, with latent frame, step and layer, if the model produces NaN or
        infinity, at one device synchronisation per block. "later": only `require_finite` checks. False: nothing is
        checked.
    cuda_graphs: the CUDA graphs of this model, to run the passes with. Where that is not possible,
        `why_no_cuda_graphs` gives the reason.
    cache: a KV cache of the right size to use instead of allocating one. CUDA graphs are then not used.

    One thread iterates; others may set prompt, actions and cameras meanwhile, which the next block then takes. While a
    call computes, another call that runs passes (`next`, `refresh`, `require_finite`, `set_prompt` with `recache`) and
    `close` raise InputError before anything runs.

    Raises InputError for sizes that do not fit together, and OutOfMemoryError if the cache cannot be allocated, or if
    memory runs out later: this rollout is over then, and another may begin.
    """

    def __init__(
        self,
        model: CausalWanTransformer,
        prompt_embeds: Tensor,
        config: RolloutConfig,
        *,
        latent_size: tuple[int, int],
        latent_frames: int | None,
        initial_latents: Tensor | None = None,
        cameras: Cameras | None = None,
        seed: int | Sequence[int] = 0,
        noise: Tensor | None = None,
        renoise: Iterable[Tensor] | None = None,
        check_finite: bool | Literal["later"] = True,
        cuda_graphs: CudaGraphCache | None = None,
        cache: KVCache | None = None,
    ):
        n, batch = config.frames_per_block, check_prompt_embeds(prompt_embeds, model)
        frame_shape = (model.config.in_dim, *latent_size)
        given = 0 if initial_latents is None else check_initial_latents(initial_latents, batch, frame_shape)
        check_latent_frames(latent_frames, given, n)
        if cameras is not None:
            if not model.config.camera:
                raise InputError("cameras must not be given to a model without the camera branch")
            cameras = camera_rows(cameras, batch)
            check_camera_count(len(cameras), latent_frames)
        self._path = None if cameras is None else CameraPath(cameras)

        self.model, self.config, self.latent_frames = model, config, latent_frames
        generated = None if latent_frames is None else latent_frames - given
        self.noise = NoiseSource(
            frame_shape, batch, model.device, latent_frames=generated, seed=seed, noise=noise, renoise=renoise
        )
        self.next_latent_frame = 0
        self._batch = batch
        self.in_use = Exclusive("a rollout")
        self._failed, self._closed, self._cuda_graphs = False, False, cuda_graphs
        self._forward: Callable[..., Any]
        self.why_no_cuda_graphs: str | None
        self._allocate(latent_size, cache)
        self._builder = ForwardBuilder(model, latent_size, n)
        self._finite_mode, self._finite_check = check_finite, FiniteCheck()
        self._levels = {
            steps: noise_levels(config, steps, model.device)
            for steps in {config.steps, config.first_steps or config.steps}
        }
        self._actions = no_actions(batch, n, model.config.num_actions)
        self._text = self._next_text = self._embed_text(prompt_embeds)  # text of the newest block, and of the next
        self._finished_blocks: dict[int, FinishedBlock] = {}  # those in the cache, by first latent frame
        self._pending_refresh: int | None = None  # first latent frame of the block that waits for its clean pass
        self._generated = False  # True after the first generated block; only that block takes `config.first_steps`
        with self._poison_on_error():
            for start in range(0, given, n):
                self._prefill(initial_latents[:, start : start + n])  # type: ignore[index]

    def _allocate(self, latent_size: tuple[int, int], cache: KVCache | None) -> None:
        """Choose what runs the passes, CUDA graphs or the model, and the KV cache."""
        model, config, graphs = self.model, self.config, self._cuda_graphs
        sinks, ring_slots = slots_for(config, self.latent_frames)
        ring = FrameRing(sinks, ring_slots, config.frames_per_block)
        tokens = model.config.tokens_per_frame(*latent_size)
        shape = CacheShape.of(model.config, self._batch, ring.capacity, tokens, camera=self._path is not None)
        if cache is not None:
            self.cache, self._forward, self.why_no_cuda_graphs = cache, model, "the cache was given"
            cache.reuse(ring)
            return
        graphed = "none were requested" if graphs is None else graphs.acquire(self, shape, latent_size, config)
        if isinstance(graphed, str):  # the reason why there are none
            self.why_no_cuda_graphs, self._forward = graphed, model
            self.cache = KVCache.allocate(shape, ring, model.dtype, model.device, config)
        else:
            self.why_no_cuda_graphs, self._forward, self.cache = None, graphed, graphed.cache
            self.cache.reuse(ring)

    def __iter__(self) -> Iterator[Latents]:
        return self

    def __next__(self) -> Latents:
        """Make the next block."""
        if self.finished:
            raise StopIteration
        with self.in_use, self.next_block_passes() as passes:
            inputs = next(passes)
            while True:
                velocity = self._run(inputs)
                try:
                    inputs = passes.send(velocity)
                except StopIteration as done:
                    return done.value

    @contextmanager
    def next_block_passes(self) -> Iterator[Generator[ForwardInputs, Any, Latents]]:
        """Open a generator over the forward passes of the next block, for `RolloutBatch`; `next()` runs them itself.

        The caller must have entered `in_use`.

        The generator yields the `ForwardInputs` of each pass. The caller sends back the pass's velocity, or None if
        num_outputs is 0. The generator returns the finished block.
        """
        with self._poison_on_error():
            yield self._generate_block()

    def close(self) -> None:
        """End the rollout: further calls raise InputError, and its cache may be used by another."""
        with self.in_use:
            self.end()

    def end(self) -> None:
        """Do what `close` does, for a caller that has entered `in_use`."""
        self._closed = self._closed or not self._failed  # a rollout that broke off says so ever after
        self._failed = True

    def refresh(self) -> None:
        """Run the clean pass of the newest block now, if it still waits and a block follows; otherwise do nothing.

        `next()` runs it when needed. Call it to spend idle time between frames, before the next input arrives.
        """
        with self.in_use:
            if self.waits_for_refresh:
                with self._poison_on_error():
                    self._run_refresh()

    @property
    def newest_finite(self) -> Tensor | None:
        """Device flag (bool []) that is true if the newest block is finite; None if nothing is checked."""
        return self._finite_check.all_finite

    def require_finite(self) -> None:
        """Raise NonFiniteError if the newest block is not finite. Must be called before another pass runs."""
        with self.in_use, self._poison_on_error():
            self._finite_check.require_finite(self._run_again)

    def set_prompt(self, prompt_embeds: Tensor, *, recache: bool = False) -> None:
        """Follow another prompt from the next block on.

        Without `recache`, the newest block's clean pass still runs under the old prompt, as part of `next()`. With it,
        the keys and values of all latent frames in the window are recomputed under the new prompt, oldest block first,
        by one clean pass per block.

        Raises InputError, and leaves the rollout as it was, for another shape or dtype and for what is not finite.
        """
        check_prompt_embeds(prompt_embeds, self.model, self._batch)
        text = self._embed_text(prompt_embeds)
        if not recache:
            self._require_open()
            self._next_text = text
            return
        with self.in_use, self._poison_on_error():
            self._text = self._next_text = text
            if self.next_latent_frame > 0 and not self.finished:  # after the last one the cache may be another's
                self._pending_refresh = None
                self._recache()

    def set_actions(self, actions: int | Sequence[int] | Sequence[Sequence[int]] | Tensor) -> None:
        """Take these actions from the next block on, until others are set; a rollout begins with action 0.

        actions: integers in 0..num_actions - 1: one for all, [B], or [B, frames_per_block].
        Raises InputError, and leaves the actions as they were, for others or for a model without actions.
        """
        self._actions = action_rows(actions, self._batch, self.config.frames_per_block, self.model.config.num_actions)

    def set_cameras(self, cameras: Cameras) -> None:
        """Take these cameras from the next block on, one per latent frame; the last is repeated until others are set.

        cameras: of one video for all rows or of B, in the same world coordinates as those given at construction.
        Raises InputError, and leaves the cameras as they were, for another batch or for a rollout that was made
        without cameras.
        """
        if self._path is None:
            raise InputError("cameras must be given when the rollout is made for set_cameras to work, got none then")
        self._path.follow(camera_rows(cameras, self._batch))

    @property
    def waits_for_refresh(self) -> bool:
        """True if the newest block's clean pass is still to be run; never after the last block, which needs none."""
        return self._pending_refresh is not None and not self.finished

    @property
    def closed(self) -> bool:
        """True if no more passes will run: all blocks are made and checked, or the rollout failed or was closed."""
        return self._failed or (self.finished and not self._finite_check.pending)

    @property
    def finished(self) -> bool:
        """True if all latent frames have been made; never for a rollout without end."""
        return self.latent_frames is not None and self.next_latent_frame >= self.latent_frames

    def _require_open(self) -> None:
        if self._failed:
            end = "was closed" if self._closed else "broke off"
            raise InputError(f"the rollout {end} at latent frame {self.next_latent_frame}: start another")

    @contextmanager
    def _poison_on_error(self) -> Iterator[None]:
        """Run the body without gradients; if it raises, further calls are refused: the cache may be half written."""
        self._require_open()
        try:
            with torch.inference_mode():
                yield
        except BaseException as error:
            self._failed = True
            if not isinstance(error, torch.OutOfMemoryError):
                raise
            error.with_traceback(None)  # its stack frames keep tensors alive
            del self.cache, self._forward, self._finished_blocks, self._builder, self._finite_check
            del self._text, self._next_text
            if self._cuda_graphs is not None:
                self._cuda_graphs.release()
            empty_device_cache(self.model.device)
            raise OutOfMemoryError(
                f"memory ran out at latent frame {self.next_latent_frame} ({str(error).split('. ')[0]}): a smaller"
                " window, frame size or batch is needed; this rollout is over, its memory is free"
            ) from error

    def _generate_block(self) -> Generator[ForwardInputs, Any, Latents]:
        config, n, start = self.config, self.config.frames_per_block, self.next_latent_frame
        steps = config.steps if self._generated else config.first_steps or config.steps
        timesteps, levels = self._levels[steps]
        # The controls are read here, once: another thread may set others before the block is finished.
        text, actions, cameras = self._next_text, self._actions, self._projections(start, n)
        if self._pending_refresh is not None and (config.refresh == "separate" or text is not self._text):
            yield self._build([self._take_pending_refresh()], num_outputs=0)  # under the prompt of its own block
        self._text = text

        x = self.noise.start(n)
        self._finite_check.clear()
        for step, timestep in enumerate(timesteps):
            blocks = self._open_block(start) if step == 0 else []
            visible = self.cache.ring.visible(start + n, config.window)
            blocks.append(BlockInput(x, start, timestep, actions, cameras, visible))
            velocity = yield self._build(blocks, num_outputs=1)
            next_level = levels[step + 1] if step + 1 < len(levels) else None  # the last step's result stays clean
            noise = None if next_level is None else self.noise.between_steps(n)
            clean, x = denoise_update(x, velocity, levels[step], noise, next_level)
            if self._finite_mode:
                self._finite_check.record(blocks, clean)
        if self.latent_frames is None or start + n < self.latent_frames:
            self.noise.prepare(n)
        if self._finite_mode is True:
            self._finite_check.require_finite(self._run_again)

        self.next_latent_frame, self._generated = start + n, True
        self._keep(clean, start, float(config.context_noise), actions, cameras)
        if config.refresh != "skip":
            self._pending_refresh = start
        return Latents(clean, start)

    def _open_block(self, start: int) -> list[BlockInput]:
        """Claim the block's slots; return the pending clean pass, which is computed in the same pass as its first step.

        The slots are claimed first, because a pass writes all its keys before it reads any: the visible frames of the
        clean queries must be looked up in the ring after the claim.
        """
        self.cache.ring.write(start)
        return [] if self._pending_refresh is None else [self._take_pending_refresh()]

    def _take_pending_refresh(self) -> BlockInput:
        start, self._pending_refresh = self._pending_refresh, None
        assert start is not None
        return self._clean_block(start)

    def _clean_block(self, start: int) -> BlockInput:
        """The clean pass of a finished block; its window ends with the block itself."""
        done = self._finished_blocks[start]
        visible = self.cache.ring.visible(start + done.latents.shape[1], self.config.window)
        return BlockInput(done.latents, start, done.timestep, done.actions, done.cameras, visible)

    def _run_refresh(self) -> None:
        if self._pending_refresh is not None:
            self._run(self._build([self._take_pending_refresh()], num_outputs=0))

    def _recache(self) -> None:
        window = self.cache.ring.visible(self.next_latent_frame, self.config.window)
        for start, done in sorted(self._finished_blocks.items()):
            own = range(start, start + done.latents.shape[1])
            if not set(own).isdisjoint(window):
                visible = sorted({frame for frame in window if frame < own.stop} | set(own))
                block = BlockInput(done.latents, start, done.timestep, done.actions, done.cameras, visible)
                self._run(self._build([block], num_outputs=0))

    def _prefill(self, latents: Tensor) -> None:
        start, self.next_latent_frame = self.next_latent_frame, self.next_latent_frame + latents.shape[1]
        self.cache.ring.write(start)
        cameras = self._projections(start, latents.shape[1])
        clean = latents.to(self.model.device, torch.float32)
        self._keep(clean, start, PREFILL_TIMESTEP, self._actions, cameras)
        self._run(self._build([self._clean_block(start)], num_outputs=0))

    def _keep(
        self, latents: Tensor, start: int, timestep: float, actions: Actions, cameras: Projections | None
    ) -> None:
        """Keep a copy of a finished block that the caller cannot change; drop blocks that the ring has overwritten."""
        ring = self.cache.ring
        self._finished_blocks[start] = FinishedBlock(latents.clone(), timestep, actions, cameras)
        self._finished_blocks = {
            first: done
            for first, done in self._finished_blocks.items()
            if ring.stored_frames[ring.slot(first)] == first
        }

    def _embed_text(self, prompt_embeds: Tensor) -> list[LayerText]:
        with torch.inference_mode():
            return self.model.embed_text(prompt_embeds)

    def _projections(self, start: int, latent_frames: int) -> Projections | None:
        """P and P^-1 of the latent frames beginning at `start`; None without cameras."""
        if self._path is None:
            return None
        return Projections.of(self._path.cameras(start, latent_frames), self.model.device)

    def _build(self, blocks: list[BlockInput], num_outputs: int) -> ForwardInputs:
        return self._builder.build(self.cache, blocks, self._text, num_outputs)

    def _run(self, inputs: ForwardInputs, probe: Probe | None = None) -> Tensor | None:
        """Run a pass; returns the velocity of its last num_outputs blocks."""
        return self._forward(
            inputs.latents, inputs.time, inputs.text, self.cache, inputs.attn, inputs.num_outputs, probe
        )

    def _run_again(self, blocks: list[BlockInput], probe: Probe) -> None:
        self._run(self._build(blocks, num_outputs=1), probe)
