"""Runs a student's exported graphs as a rollout with numpy; the torch-free counterpart of `Rollout`.

The caches are allocated once and bound to each pass as input and as output: TensorScatter writes into them in place.
No cache is copied between passes. Only a block's latents, its modulation rows, a few small inputs and its velocity
are exchanged with the graphs in a pass.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from cfpp_rt.core.camera import CameraPath, Cameras
from cfpp_rt.core.controls import (
    Actions,
    action_rows,
    camera_rows,
    check_camera_count,
    check_latent_frames,
    check_latents_shape,
    no_actions,
)
from cfpp_rt.core.exclusive import Exclusive
from cfpp_rt.core.rng import NoiseGenerator
from cfpp_rt.core.rope_angles import axis_table
from cfpp_rt.errors import InputError, NonFiniteError
from cfpp_rt.export.runner import Array, Buffer, Floats, Runner


class LatentArrays(NamedTuple):
    """One finished block, as numpy arrays; `cfpp_rt.values.Latents` is its counterpart with tensors.

    values: float32 [B, n, C, h, w].
    start: index of its first latent frame.
    """

    values: Floats
    start: int


class _BlockInput(NamedTuple):
    """One block's part of a forward pass.

    latents: float32 [B, n, C, h, w].
    start: index of its first latent frame.
    timestep_index: index into the card's timesteps.
    actions: see `Actions`.
    projections: P and P^-1 of each latent frame, float32 [B, n, 2, 4, 4]; None without cameras.
    """

    latents: Floats
    start: int
    timestep_index: int
    actions: Actions
    projections: Floats | None


class BundleRollout:
    """An iterator over the finished blocks of a batch of videos: `LatentArrays`. The bundle determines the batch.

    runner: executes the bundle's graphs.
    prompt_embeds: float32 [B, text_len, text_dim], zero past the end of a prompt; None for a model without text.
    latent_frames: latent frames in all, given ones included; None = without end, which needs a bundle with a window.
    initial_latents: clean latents [B, F0, C, h, w] that the video continues. They are not yielded.
    cameras: required by a model with the camera branch. One per latent frame, given ones included, or a single one that
        stands still until `set_cameras`.
    seed, noise, renoise: see `NoiseGenerator`.
    refresh: "fused", "separate" or "skip"; None = the student's own.

    One thread iterates; others may set prompt, actions and cameras meanwhile, which the next block then takes. A second
    call of `next` or `refresh` while one computes is refused with InputError.

    Raises InputError for sizes that do not fit together.
    """

    def __init__(
        self,
        runner: Runner,
        prompt_embeds: Floats | None = None,
        *,
        latent_frames: int | None,
        initial_latents: Floats | None = None,
        cameras: Cameras | None = None,
        seed: int | Sequence[int] = 0,
        noise: Floats | None = None,
        renoise: Iterable[Floats] | None = None,
        refresh: str | None = None,
    ):
        card, sizes = runner.card, runner.card.sizes
        n, self.frame_shape = sizes.frames_per_block, sizes.frame_shape(1)[2:]
        self.runner, self.card, self.latent_frames = runner, card, latent_frames
        self.config = card.config.replace(refresh=refresh or card.config.refresh)
        if latent_frames is None and card.config.window is None:
            raise InputError("latent_frames must be given for a bundle without a window, got None")
        if latent_frames is not None and card.latent_frames is not None and latent_frames > card.latent_frames:
            raise InputError(
                f"latent_frames must be <= {card.latent_frames}, what the bundle was exported for, got {latent_frames}"
            )
        given = None if initial_latents is None else self._check_initial_latents(initial_latents)
        num_given = 0 if given is None else given.shape[1]
        check_latent_frames(latent_frames, num_given, n)
        if (cameras is not None) != sizes.model.camera:
            wanted = "be given for a model with" if sizes.model.camera else "not be given to a model without"
            raise InputError(f"cameras must {wanted} the camera branch")
        if cameras is not None:
            cameras = camera_rows(cameras, sizes.batch)
            check_camera_count(len(cameras), latent_frames)
        self._path = None if cameras is None else CameraPath(cameras)
        if noise is not None:
            _check_finite("noise", noise)
        self._noise = NoiseGenerator(
            self.frame_shape,
            sizes.batch,
            seed,
            latent_frames=None if latent_frames is None else latent_frames - num_given,
            noise=noise,
            renoise=renoise,
        )
        self.ring = card.ring()
        step = runner.session("step").spec
        self.caches = {tensor.updates: Buffer.zeros(tensor) for tensor in step.outputs if tensor.updates is not None}
        self._velocity = Buffer.zeros(step.outputs[0])
        self._in_use = Exclusive("a rollout")
        self._text = self._next_text = runner.embed_text(prompt_embeds)  # of the newest block; of the next one
        self.next_latent_frame = 0
        self._actions = no_actions(sizes.batch, n, sizes.model.num_actions)
        self._pending_refresh: _BlockInput | None = None  # the finished block that waits for its clean pass
        self._generated = False  # True once a block has been generated: later ones take `card.steps`
        self._failed = False
        for start in range(0, num_given, n):
            self._prefill(given[:, start : start + n])  # type: ignore[index]

    def __iter__(self) -> Iterator[LatentArrays]:
        return self

    def __next__(self) -> LatentArrays:
        """Make the next block."""
        if self.finished:
            raise StopIteration
        with self._in_use, self._poison_on_error():
            return self._generate_block()

    def refresh(self) -> None:
        """Run the clean pass of the newest block now, if it still waits and a block follows; otherwise do nothing."""
        with self._in_use:
            if self.waits_for_refresh:
                with self._poison_on_error():
                    self._run_refresh()

    def set_prompt(self, prompt_embeds: Floats) -> None:
        """Follow another prompt from the next block on.

        The newest block's clean pass still runs under the old prompt, as part of `next()`. Raises InputError, and
        leaves the rollout as it was, for another shape or dtype and for what is not finite.
        """
        text = self.runner.embed_text(prompt_embeds)
        self._require_sound()
        self._next_text = text

    def set_actions(self, actions: int | Sequence[int] | Sequence[Sequence[int]] | Array) -> None:
        """Take these actions from the next block on, until others are set; see `Rollout.set_actions`."""
        sizes = self.card.sizes
        self._actions = action_rows(actions, sizes.batch, sizes.frames_per_block, sizes.model.num_actions)

    def set_cameras(self, cameras: Cameras) -> None:
        """Take these cameras from the next block on, one per latent frame; see `Rollout.set_cameras`."""
        if self._path is None:
            raise InputError("cameras must not be given to a model without the camera branch")
        self._path.follow(camera_rows(cameras, self.card.sizes.batch))

    @property
    def waits_for_refresh(self) -> bool:
        """True if the newest block's clean pass is still to be run; never after the last block, which needs none."""
        return self._pending_refresh is not None and not self.finished

    @property
    def finished(self) -> bool:
        """True if all latent frames have been made; never for a rollout without end."""
        return self.latent_frames is not None and self.next_latent_frame >= self.latent_frames

    def _require_sound(self) -> None:
        if self._failed:
            raise InputError(f"the rollout broke off at latent frame {self.next_latent_frame}: start another")

    @contextmanager
    def _poison_on_error(self) -> Iterator[None]:
        """Run the body; if it raises, the cache is half written and all further calls are refused."""
        self._require_sound()
        try:
            yield
        except BaseException:
            self._failed = True
            raise

    def _generate_block(self) -> LatentArrays:
        start, n = self.next_latent_frame, self.card.sizes.frames_per_block
        steps = self.card.steps if self._generated else self.card.first_steps
        x = self._noise.start(n)
        # The controls are read here, once: another thread may set others before the block is finished.
        text, own = self._next_text, self._block_input(x, start, steps[0].timestep)
        if self.config.refresh == "separate" or text is not self._text:
            self._run_refresh()  # under the prompt of its own block
        self._text = text
        for index, step in enumerate(steps):
            block = own._replace(latents=x, timestep_index=step.timestep)
            velocity = self._run_one_block("step", block) if self._pending_refresh is None else self._run_fused(block)
            clean = x - np.float32(step.sigma) * velocity
            if not np.isfinite(clean).all():
                raise NonFiniteError(f"the model produced NaN or infinity at latent frame {start}, step {index + 1}")
            if index + 1 < len(steps):
                sigma = np.float32(steps[index + 1].sigma)
                x = (1 - sigma) * clean + sigma * self._noise.between_steps(n)
        self.next_latent_frame, self._generated = start + n, True
        if self.config.refresh != "skip":
            self._pending_refresh = own._replace(latents=clean.copy(), timestep_index=self.card.context)
        return LatentArrays(clean, start)

    def _prefill(self, latents: Floats) -> None:
        start, self.next_latent_frame = self.next_latent_frame, self.next_latent_frame + latents.shape[1]
        self._pending_refresh = self._block_input(latents, start, self.card.given)
        self._run_refresh()

    def _run_refresh(self) -> None:
        block, self._pending_refresh = self._pending_refresh, None
        if block is not None:
            self._run_one_block("refresh", block)

    def _block_input(self, latents: Floats, start: int, timestep_index: int) -> _BlockInput:
        """Return a block as input of a pass, with the current actions and cameras."""
        projections = None
        if self._path is not None:
            projections = np.stack(self._path.cameras(start, latents.shape[1]).matrices(), axis=2)
        return _BlockInput(latents, start, timestep_index, self._actions, projections)

    def _run_one_block(self, name: str, block: _BlockInput) -> Floats:
        return self._run(name, [block], **self._claim_slots(block))

    def _claim_slots(self, block: _BlockInput) -> dict[str, Array]:
        """Claim the block's slots; return `valid`, the number of tokens from slot 0 on that its queries attend to."""
        self.ring.write(block.start)
        end = block.start + self.card.sizes.frames_per_block
        slots = {self.ring.slot(frame) for frame in self.ring.visible(end, self.config.window)}
        if slots != set(range(len(slots))):
            raise InputError(f"the block ending at {end} must see the first slots of the cache, got {sorted(slots)}")
        return {"valid": np.full(self.card.sizes.batch, len(slots) * self.card.sizes.tokens_per_frame, np.int64)}

    def _run_fused(self, noisy: _BlockInput) -> Floats:
        """Run the pending clean pass and a step of `noisy` in one pass, which writes only the finished block."""
        clean, self._pending_refresh = self._pending_refresh, None
        assert clean is not None
        ring, window, n = self.ring, self.config.window, self.card.sizes.frames_per_block
        visible = np.zeros((2, self.card.sizes.slots + n), bool)
        visible[0, [ring.slot(frame) for frame in ring.visible(noisy.start, window)]] = True
        ring.write(noisy.start)
        past = [frame for frame in ring.visible(noisy.start + n, window) if frame < noisy.start]
        visible[1, [ring.slot(frame) for frame in past]] = True
        visible[1, -n:] = True
        return self._run("fused", [clean, noisy], visible=visible)

    def _run(self, name: str, blocks: list[_BlockInput], **inputs: Array) -> Floats:
        """Run a pass that writes the first block; return the velocity of the last, valid until the next pass."""
        session, sizes = self.runner.session(name), self.card.sizes
        frames = [block.start + i for block in blocks for i in range(sizes.frames_per_block)]
        first_token = self.ring.slot(blocks[0].start) * sizes.tokens_per_frame
        inputs["latents"] = np.concatenate([block.latents for block in blocks], axis=1)
        inputs["rope_time"] = axis_table(frames, sizes.time_pairs)
        if self._path is not None:
            inputs["projections"] = np.concatenate([block.projections for block in blocks], axis=1)
        inputs["write_index"] = np.full(sizes.batch, first_token, np.int64)
        buffers = {tensor_name: Buffer(array) for tensor_name, array in inputs.items()}
        buffers["modulation"] = self.runner.modulation(*((block.timestep_index, block.actions) for block in blocks))
        with self.runner.lock:
            session.bind({**buffers, **self._text, **self.caches})
            if name != "refresh":
                session.bind_output("velocity", self._velocity)
            session.run()
        return self._velocity.array

    def _check_initial_latents(self, latents: Any) -> Floats:
        """Return a float32 copy. Raises InputError for another shape and for values that are not finite."""
        check_latents_shape("initial_latents", np.shape(latents), self.card.sizes.batch, self.frame_shape)
        _check_finite("initial_latents", latents)
        return np.array(latents, np.float32)


def _check_finite(name: str, array: Any) -> None:
    if not np.isfinite(np.asarray(array)).all():
        raise InputError(f"{name} must be finite, got NaN or infinity")
