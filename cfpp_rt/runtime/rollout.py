"""Text in, latents out, block by block: the autoregressive few-step sampler.

For every block of `frames_per_block` latent frames: denoise from noise in a few steps, each an estimate of the clean
block that is noised again to the next level; then a clean pass at the context timestep rewrites the block's keys and
values, so that later blocks attend to the finished frames (Causal Forcing, arXiv 2602.02214, algorithm 2).

With `refresh="fused"` that clean pass travels in one forward with the first step of the next block: its queries see the
window that ends with their own block, the noisy queries the window that ends one block later.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from cfpp_rt.cache import CacheShape, KVCache, allocate, give_back
from cfpp_rt.config import RolloutConfig
from cfpp_rt.core.camera import CameraPath, Cameras, Projections
from cfpp_rt.core.frame_ring import FrameRing, slots_for
from cfpp_rt.core.schedule import noise_levels
from cfpp_rt.device.transfer import to_device
from cfpp_rt.errors import InputError, NonFiniteError, OutOfMemoryError
from cfpp_rt.model.attention import CachePass, CameraPass
from cfpp_rt.model.transformer import CausalWanTransformer, LayerText
from cfpp_rt.ops.denoise_update import denoise_update
from cfpp_rt.runtime.cuda_graphs import Graphs
from cfpp_rt.runtime.forward_inputs import Clean, Group, Pass
from cfpp_rt.runtime.noise import NoiseSource
from cfpp_rt.runtime.time_rows import Actions, TimeRows
from cfpp_rt.values import Conditioning, Latents

PREFILL_TIMESTEP = 0.0  # given frames are clean, whatever context_noise is: as published


class Rollout:
    """One batch of videos in the making: an iterator of finished blocks, `Latents` [B, n, C, h, w] float32.

    model: in eval mode, on its device, in its dtype. text: Conditioning [B, text_len, text_dim].
    latent_size: (h, w), multiples of the patch. frames: latent frames in all, given ones included; None = without end
    (needs a window). initial: given clean latents [B, F0, C, h, w] that the video continues (image-to-video, video
    extension); they are not yielded. cameras: for a model with the camera branch, one per latent frame, given ones
    included, or a single one that stands still until `move`; without end, the last one stands still. None: the branch
    is left out, and no memory is taken for it. seed, noise, renoise: see `NoiseSource`. check_finite: True raises
    NonFiniteError, naming frame and layer, when the model produces NaN or infinity (one device synchronisation per
    block); "later" leaves it to `require_finite`. graphs: of this model, to run the passes as CUDA graphs; where that
    cannot be, `why_not_graphs` says why. cache: memory of this size to use instead of taking some.

    Raises InputError for sizes that do not fit together and OutOfMemoryError if the cache cannot be allocated, or if
    memory runs out later: the rollout is over then, and another may begin.
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
        cameras: Cameras | None = None,
        seed: int | Sequence[int] = 0,
        noise: Tensor | None = None,
        renoise: Iterable[Tensor] | None = None,
        check_finite: bool | Literal["later"] = True,
        graphs: Graphs | None = None,
        cache: KVCache | None = None,
    ):
        block = config.frames_per_block
        batch = text.embeds.shape[0]
        frame_shape = (model.config.in_dim, *latent_size)
        if initial is not None and (initial.ndim != 5 or initial.shape[0] != batch or initial.shape[2:] != frame_shape):
            raise InputError(f"initial must be [B={batch}, F, {frame_shape}], got {list(initial.shape)}")
        given = 0 if initial is None else initial.shape[1]
        if frames is not None and (not isinstance(frames, int) or frames < 1 or frames % block):
            raise InputError(f"frames must be a multiple >= {block} of frames_per_block={block}, got {frames}")
        if given % block or (frames is not None and given >= frames):
            raise InputError(
                f"initial must hold a multiple of {block} frames and fewer than frames={frames}, got {given}"
            )
        if initial is not None and not bool(initial.isfinite().all()):
            raise InputError("initial must be finite, got NaN or infinity")
        if not bool(text.embeds.isfinite().all()):
            raise InputError("text embeds must be finite, got NaN or infinity")
        if cameras is not None and not model.config.camera:
            raise InputError("cameras must not be given to a model without the camera branch")
        if cameras is not None and frames is not None and len(cameras) not in (1, frames):
            raise InputError(f"cameras must be one per latent frame, {frames}, or a single one, got {len(cameras)}")
        self._path = None if cameras is None else CameraPath(cameras.rows(batch))

        self.model, self.config, self.frames = model, config, frames
        generated = None if frames is None else frames - given
        self.noise = NoiseSource(
            frame_shape, batch, model.device, frames=generated, seed=seed, noise=noise, renoise=renoise
        )
        sinks, ring = slots_for(config, frames)
        tokens = model.config.tokens_per_frame(*latent_size)
        shape = CacheShape.of(model.config, batch, sinks + ring, tokens, camera=cameras is not None)
        self._broken, self._closed, self._graphs = False, False, graphs
        self._run: Callable[..., Any]
        self.why_not_graphs: str | None
        self._prepare(shape, FrameRing(sinks, ring, block), latent_size, cache)
        self.tables = model.rotary_tables(*latent_size)
        self.next_frame = 0
        self._batch = batch
        self._check_finite = check_finite
        self._levels = {
            steps: noise_levels(config, steps, model.device)
            for steps in {config.steps, config.first_steps or config.steps}
        }
        self._times = TimeRows(model, block)
        self._actions = ((0,) * block,) * batch if model.config.num_actions else ()
        self._text = self._embed(text)
        self._held: dict[int, Clean] = {}  # finished blocks whose keys are in the cache, by first frame
        self._unrefreshed: int | None = None  # first frame of the finished block that still waits for its clean pass
        self._generated = False
        self._unchecked: list[tuple[list[Group], Tensor]] = []  # passes of the newest block, and whether all is finite
        with self._whole():
            for start in range(0, given, block):
                self._prefill(initial[:, start : start + block])  # type: ignore[index]

    def _prepare(self, shape: CacheShape, ring: FrameRing, latent_size: tuple[int, int], cache: KVCache | None) -> None:
        """The cache, and what runs passes over it: graphs, or the model and why."""
        graphs = self._graphs
        if cache is not None:
            self.cache, self._run, self.why_not_graphs = cache, self.model, "the cache was given"
            cache.reuse(ring)
            return
        lent = "none were asked for" if graphs is None else graphs.lend(self, shape, latent_size, self.config)
        self.why_not_graphs = lent if isinstance(lent, str) else None
        if isinstance(lent, str):
            self.cache = allocate(shape, ring, self.model.dtype, self.model.device, self.config)
            self._run = self.model
        else:
            self.cache, self._run = lent.cache, lent
            self.cache.reuse(ring)

    def __iter__(self) -> Iterator[Latents]:
        return self

    def __next__(self) -> Latents:
        if self.finished:
            raise StopIteration
        with self.block() as passes:
            asked = next(passes)
            while True:
                velocity = self._run_pass(asked)
                try:
                    asked = passes.send(velocity)
                except StopIteration as done:
                    return done.value

    @contextmanager
    def block(self) -> Iterator[Generator[Pass, Any, Latents]]:
        """The passes of the next block, for who runs those of several rollouts together: each is to be answered by its
        velocity, None for one that keeps none; the last answer returns the block. `next()` is all of that.
        """
        with self._whole():
            yield self._next_block()

    def close(self) -> None:
        """Make no more blocks: the cache may be another's from now on."""
        self._broken = self._closed = True

    def refresh(self) -> None:
        """Run the clean pass of the newest block now, if it still waits and a block follows; otherwise do nothing.

        `next()` does it when needed. Call it to spend idle time between frames, before the next input arrives.
        """
        if self.waits_for_refresh:
            with self._whole():
                self._run_refresh()

    @property
    def newest_finite(self) -> Tensor | None:
        """Whether the newest block is finite: bool [], on the device, nobody waits; None where nobody looks."""
        return torch.stack([finite for _, finite in self._unchecked]).all() if self._unchecked else None

    def require_finite(self) -> None:
        """Raise NonFiniteError if the newest block is not finite; to be called before another pass."""
        with self._whole():
            self._locate_non_finite()

    def switch_prompt(self, text: Conditioning, *, recache: bool = False) -> None:
        """Follow another prompt from the next block on.

        The newest block's clean pass still runs under the old prompt. With `recache`, the keys and values of all frames
        in the window are then made again under the new one, oldest block first: one clean pass per block.
        """
        if text.embeds.shape[0] != self._batch:
            raise InputError(f"text must have batch {self._batch}, got {text.embeds.shape[0]}")
        embedded = self._embed(text)  # refuses another shape before anything changes
        with self._whole():
            if not recache and self.waits_for_refresh:
                self._run_refresh()
            self._text = embedded
            if recache and self.next_frame > 0 and not self.finished:  # graphs may be another's after the last frame
                self._unrefreshed = None
                self._recache()

    def act(self, actions: int | Sequence[int] | Tensor) -> None:
        """Take these actions from the next block on, until others are given; a rollout begins with action 0.

        actions: one for all, [B], or [B, frames_per_block], in 0..num_actions - 1. Raises InputError, and leaves the
        actions as they were, for others or for a model without actions.
        """
        known, n = self.model.config.num_actions, self.config.frames_per_block
        if not known:
            raise InputError(f"actions must not be given to a model without actions, got {actions}")
        given = torch.as_tensor(actions)
        fits = given.ndim < 2 and given.numel() in (1, self._batch) or given.shape == (self._batch, n)
        if not fits or given.is_floating_point() or not bool(((given >= 0) & (given < known)).all()):
            raise InputError(
                f"actions must be integers in 0..{known - 1}: one, [B={self._batch}] or [B, {n}], got {actions}"
            )
        rows = given if given.ndim == 2 else given.reshape(-1, 1).expand(self._batch, n)
        self._actions = tuple(tuple(row) for row in rows.tolist())

    def move(self, cameras: Cameras) -> None:
        """Take these cameras from the next block on, one per latent frame; the last one stands still until others come.

        They are in the world of those that the rollout was made with, of one video for all or of B. Raises InputError,
        and leaves the cameras as they were, for another batch or for a rollout that was made without cameras.
        """
        if self._path is None:
            raise InputError("cameras must be given when the rollout is made for it to move, got none then")
        self._path.follow(cameras.rows(self._batch), self.next_frame)

    def _look(self, start: int, frames: int) -> Projections | None:
        """The cameras of a block as its keys and queries take them."""
        return None if self._path is None else self._path.projections(start, frames, self.model.device)

    @property
    def waits_for_refresh(self) -> bool:
        """Whether the newest block's clean pass is still to be run; never after the last block, which needs none."""
        return self._unrefreshed is not None and not self.finished

    @property
    def over(self) -> bool:
        """Whether it runs no more passes: all blocks are made and looked at, or it broke off."""
        return self._broken or (self.finished and not self._unchecked)

    @property
    def finished(self) -> bool:
        """Whether all frames have been made; never for a rollout without end."""
        return self.frames is not None and self.next_frame >= self.frames

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """What happens inside happens wholly, or the rollout refuses to go on with a cache in between."""
        if self._broken:
            end = "was closed" if self._closed else "broke off"
            raise InputError(f"the rollout {end} at latent frame {self.next_frame}: start another")
        try:
            with torch.inference_mode():
                yield
        except BaseException as error:
            self._broken = True
            if not isinstance(error, torch.OutOfMemoryError):
                raise
            error.with_traceback(None)  # its frames keep tensors alive
            del self.cache, self._run, self._held, self._times, self._text, self._unchecked
            if self._graphs is not None:
                self._graphs.release()
            give_back(self.model.device)
            raise OutOfMemoryError(
                f"memory ran out at latent frame {self.next_frame} ({str(error).split('. ')[0]}): a smaller window,"
                " picture or batch is needed; this rollout is over, its memory is free"
            ) from error

    def _run_refresh(self) -> None:
        start, self._unrefreshed = self._unrefreshed, None
        if start is not None:
            self._run_pass(self._pass([self._clean_group(start)], keep=0))

    def _recache(self) -> None:
        visible = self.cache.ring.visible(self.next_frame, self.config.window)
        for start, held in sorted(self._held.items()):
            own = range(start, start + held.latents.shape[1])
            if not set(own).isdisjoint(visible):
                sees = sorted({frame for frame in visible if frame < own.stop} | set(own))
                group = Group(held.latents, start, held.timestep, held.actions, held.cameras, sees)
                self._run_pass(self._pass([group], keep=0))

    def _embed(self, text: Conditioning) -> list[LayerText]:
        with torch.inference_mode():
            return self.model.embed_text(text.embeds)

    def _prefill(self, latents: Tensor) -> None:
        start, self.next_frame = self.next_frame, self.next_frame + latents.shape[1]
        self.cache.ring.write(start)
        cameras = self._look(start, latents.shape[1])
        self._hold(latents.to(self.model.device, torch.float32), start, PREFILL_TIMESTEP, cameras)
        self._run_pass(self._pass([self._clean_group(start)], keep=0))

    def _next_block(self) -> Generator[Pass, Any, Latents]:
        config, n, start = self.config, self.config.frames_per_block, self.next_frame
        steps = config.steps if self._generated else config.first_steps or config.steps
        timesteps, levels = self._levels[steps]
        if config.refresh == "separate" and self._unrefreshed is not None:
            waiting, self._unrefreshed = self._unrefreshed, None
            yield self._pass([self._clean_group(waiting)], keep=0)

        x = self.noise.start(n)
        cameras = self._look(start, n)
        self._unchecked = []
        for step, timestep in enumerate(timesteps):
            groups = self._open_block(start) if step == 0 else []
            groups.append(self._group(x, start, timestep, self._actions, cameras))
            velocity = yield self._pass(groups, keep=1)
            again = levels[step + 1] if step + 1 < len(levels) else None  # after the last step nothing is noised again
            noise = None if again is None else self.noise.between_steps(n)
            clean, x = denoise_update(x, velocity, levels[step], noise, again)
            if self._check_finite:
                self._unchecked.append((groups, clean.isfinite().all()))
        if self.frames is None or start + n < self.frames:
            self.noise.prepare(n)
        if self._check_finite is True:
            self._locate_non_finite()

        self.next_frame, self._generated = start + n, True
        self._hold(clean, start, float(config.context_noise), cameras)
        if config.refresh != "skip":
            self._unrefreshed = start
        return Latents(clean, start)

    def _open_block(self, start: int) -> list[Group]:
        """Claim the block's slots; return the waiting clean pass of the block before, to travel with its first step.

        The slots are claimed first: every key of a pass is written before any is read, so the frames that the clean
        queries see are looked up in the ring as the pass will find it.
        """
        self.cache.ring.write(start)
        waiting, self._unrefreshed = self._unrefreshed, None
        return [] if waiting is None else [self._clean_group(waiting)]

    def _group(
        self, latents: Tensor, start: int, timestep: float, actions: Actions, cameras: Projections | None
    ) -> Group:
        sees = self.cache.ring.visible(start + latents.shape[1], self.config.window)
        return Group(latents, start, timestep, actions, cameras, sees)

    def _clean_group(self, start: int) -> Group:
        """The clean pass of a held block. Its window ends with the block itself."""
        held = self._held[start]
        return self._group(held.latents, start, held.timestep, held.actions, held.cameras)

    def _hold(self, latents: Tensor, start: int, timestep: float, cameras: Projections | None) -> None:
        """Keep a copy of a finished block, out of the caller's reach; forget those that the ring has overwritten."""
        ring = self.cache.ring
        self._held[start] = Clean(latents.clone(), timestep, self._actions, cameras)
        self._held = {first: kept for first, kept in self._held.items() if ring.holds[ring.slot(first)] == first}

    def _place(self, groups: list[Group]) -> CachePass:
        cache, device = self.cache, self.model.device
        first_tokens = [cache.ring.slot(group.start) * cache.tokens_per_frame for group in groups]
        frames = [group.start + i for group in groups for i in range(group.latents.shape[1])]
        return CachePass(
            write_index=to_device(torch.tensor([first_tokens] * self._batch, dtype=torch.int32), device),
            ranges=cache.token_ranges([group.sees for group in groups]),
            rope_time=self.tables.time(frames).expand(self._batch, -1, -1, -1),
            rope_rows=self.tables.rows,
            rope_columns=self.tables.columns,
            camera=self._place_cameras(groups, frames),
        )

    def _place_cameras(self, groups: list[Group], frames: list[int]) -> CameraPass | None:
        seen = [group.cameras for group in groups if group.cameras is not None]
        if not seen:
            return None
        slots = torch.tensor([self.cache.ring.slot(frame) for frame in frames])
        return CameraPass(Projections.cat(seen), to_device(slots, self.model.device))

    def _pass(self, groups: list[Group], keep: int) -> Pass:
        latents = groups[0].latents if len(groups) == 1 else torch.cat([group.latents for group in groups], dim=1)
        time = self._times.of(tuple((group.timestep, group.actions) for group in groups))
        return Pass(latents, time, self._text, self._place(groups), keep)

    def _run_pass(self, asked: Pass, probe: Callable[[int, Tensor], None] | None = None) -> Tensor | None:
        place = asked.place
        return self._run(asked.latents, asked.time, asked.text, self.cache, place, groups=asked.keep, probe=probe)

    def _locate_non_finite(self) -> None:
        """If there is any, run the first failed pass again (it overwrites the same slots), looking at every layer."""
        passes, self._unchecked = self._unchecked, []
        if not passes or bool(torch.stack([finite for _, finite in passes]).all()):
            return
        step, groups = next((i, groups) for i, (groups, finite) in enumerate(passes) if not bool(finite))
        where = f"latent frame {groups[-1].start}, step {step + 1}"

        def stop_at_first(layer: int, tokens: Tensor) -> None:
            if not bool(tokens.isfinite().all()):
                raise NonFiniteError(f"the model produced NaN or infinity at {where}, layer {layer}")

        self._run_pass(self._pass(groups, keep=1), stop_at_first)
        raise NonFiniteError(f"the model produced NaN or infinity at {where}, output head")
