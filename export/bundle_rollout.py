"""A student rolled out from its ONNX bundle with numpy and onnxruntime: the counterpart of `Rollout`, free of torch.

The caches are allocated once and bound to each pass as input and as output: TensorScatter writes into them in place.
Between passes nothing of them is copied; what travels is a block's latents, its modulation rows and its velocity.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cfpp_rt.core.controls import Actions, action_rows, check_camera_count, check_latent_frames, no_actions
from cfpp_rt.core.rng import NoiseGenerator
from cfpp_rt.core.rope_angles import axis_table
from cfpp_rt.errors import InputError, NonFiniteError
from cfpp_rt.export.bundle import Bundle, open_bundle
from cfpp_rt.export.cameras import EngineCameras
from cfpp_rt.export.contract import text_names
from cfpp_rt.export.onnx_runner import Array, Buffer, GraphSession

Floats = NDArray[np.float32]
_MOST_TIMES = 512  # embedded timesteps and actions kept


class Latents(NamedTuple):
    """One finished block: values float32 [B, n, C, h, w], and the index of its first latent frame."""

    values: Floats
    start: int


class _Group(NamedTuple):
    """One block's part of a pass: latents [B, n, C, h, w], first frame, index of the timestep, actions, projections."""

    latents: Floats
    start: int
    timestep: int
    actions: Actions
    projections: Floats | None


class OnnxRunner:
    """The sessions of a bundle, opened when first used and shared by its rollouts, one after the other."""

    def __init__(self, bundle: Bundle | str | Path, threads: int | None = None):
        """threads: of onnxruntime, None = chosen by `GraphSession`. Raises InputError as `open_bundle`."""
        self.bundle = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
        self.card, self._threads = self.bundle.card, threads
        self._sessions: dict[str, GraphSession] = {}
        self._times: dict[tuple[tuple[int, Actions], ...], Buffer] = {}

    def session(self, name: str) -> GraphSession:
        if name not in self._sessions:
            self._sessions[name] = GraphSession(self.bundle, name, self._threads)
        return self._sessions[name]

    def modulation(self, *groups: tuple[int, Actions]) -> Buffer:
        """Modulation rows of groups of one timestep and actions each; a rollout uses a handful, each made once."""
        if groups not in self._times:
            if len(self._times) >= _MOST_TIMES:
                self._times.clear()
            self._times[groups] = Buffer(np.concatenate([self._rows(*group) for group in groups], axis=1))
        return self._times[groups]

    def _rows(self, timestep: int, actions: Actions) -> Array:
        given = {"actions": np.array(actions, np.int64)} if actions else {}
        return self.session("embed_time")(timestep=np.array([timestep], np.int64), **given)["modulation"]

    def embed_text(self, prompt_embeds: Floats | None) -> dict[str, Buffer]:
        """Text embeddings float32 [B, text_len, text_dim] to each layer's keys and values; none without text."""
        sizes = self.card.sizes
        if not sizes.model.text_len:
            if prompt_embeds is not None and prompt_embeds.size:
                raise InputError(
                    f"prompt_embeds must not be given to a model without text, got {list(prompt_embeds.shape)}"
                )
            return {}
        if prompt_embeds is None or not np.isfinite(prompt_embeds).all():
            raise InputError("prompt_embeds must be given and finite for a model with text")
        made = self.session("embed_text")(embeds=np.asarray(prompt_embeds, np.float32))
        return {name: Buffer(made[name]) for name in text_names(sizes.model.num_layers)}


class BundleRollout:
    """One batch of videos in the making: an iterator of finished blocks, `Latents`; arguments as for `Rollout`.

    prompt_embeds: text embeddings, None for a model without text. latent_frames: latent frames in all, None = without
    end (needs a bundle with a window). cameras: for a student with the camera branch, and needed there; one per latent frame, or a
    single one that stands still until `set_cameras`. refresh: None = the student's own. The batch is the bundle's.

    Raises InputError for sizes that do not fit together.
    """

    def __init__(
        self,
        engine: OnnxRunner,
        prompt_embeds: Floats | None = None,
        *,
        latent_frames: int | None,
        initial_latents: Floats | None = None,
        cameras: EngineCameras | None = None,
        seed: int | Sequence[int] = 0,
        noise: Floats | None = None,
        renoise: Iterable[Floats] | None = None,
        refresh: str | None = None,
    ):
        card, sizes = engine.card, engine.card.sizes
        block, self.frame_shape = sizes.block, sizes.frame_shape(1)[2:]
        self.engine, self.card, self.latent_frames = engine, card, latent_frames
        self.config = card.rollout.replace(refresh=refresh or card.rollout.refresh)
        if latent_frames is None and card.rollout.window is None:
            raise InputError("latent_frames must be given for a bundle without a window, got None")
        if latent_frames is not None and card.frames is not None and latent_frames > card.frames:
            raise InputError(
                f"latent_frames must be <= {card.frames}, what the bundle was exported for, got {latent_frames}"
            )
        given = 0 if initial_latents is None else self._require(initial_latents, "initial_latents").shape[1]
        check_latent_frames(latent_frames, given, block)
        if (cameras is not None) != sizes.model.camera:
            wanted = "be given for a model with" if sizes.model.camera else "not be given to a model without"
            raise InputError(f"cameras must {wanted} the camera branch")
        if cameras is not None:
            check_camera_count(len(cameras), latent_frames)
        self._path, self._path_start = None if cameras is None else self._rows(cameras), 0  # of that frame and on
        self._world = None if self._path is None else self._path.views[:, :1]
        self._draws = NoiseGenerator(sizes.frame_shape(1)[2:], sizes.batch, seed)
        self._noise = None if noise is None else self._require(noise, "noise")
        if self._noise is not None and latent_frames is not None and self._noise.shape[1] != latent_frames - given:
            raise InputError(
                f"noise must cover the {latent_frames - given} generated frames, got {self._noise.shape[1]}"
            )
        self._renoise = None if renoise is None else iter(renoise)
        self._taken = 0
        self.ring = card.ring()
        step = engine.session("step").spec
        self.caches = {tensor.updates: Buffer.zeros(tensor) for tensor in step.outputs if tensor.updates is not None}
        self._velocity = Buffer.zeros(step.outputs[0])
        self._text = engine.embed_text(prompt_embeds)
        self.next_frame = 0
        self._actions = no_actions(sizes.batch, block, sizes.model.num_actions)
        self._newest: _Group | None = None  # the finished block that still waits for its clean pass
        self._generated = self._broken = False
        for start in range(0, given, block):
            self._prefill(initial_latents[:, start : start + block])  # type: ignore[index]

    def __iter__(self) -> Iterator[Latents]:
        return self

    def __next__(self) -> Latents:
        if self._finished:
            raise StopIteration
        with self._whole():
            return self._next_block()

    def refresh(self) -> None:
        """Run the clean pass of the newest block now, if it still waits and a block follows; otherwise do nothing."""
        if self.waits_for_refresh:
            with self._whole():
                self._run_refresh()

    def set_prompt(self, prompt_embeds: Floats) -> None:
        """Follow another prompt from the next block on; the newest block's clean pass still runs under the old one."""
        text = self.engine.embed_text(prompt_embeds)
        with self._whole():
            self._run_refresh()
            self._text = text

    def set_actions(self, actions: int | Sequence[int] | Sequence[Sequence[int]] | Array) -> None:
        """Take these actions from the next block on, until others are given; as `Rollout.act`."""
        sizes = self.card.sizes
        self._actions = action_rows(actions, sizes.batch, sizes.block, sizes.model.num_actions)

    def set_cameras(self, cameras: EngineCameras) -> None:
        """Take these cameras from the next block on, one per latent frame; as `Rollout.move`."""
        if self._path is None:
            raise InputError("cameras must not be given to a model without the camera branch")
        self._path, self._path_start = self._rows(cameras), self.next_frame

    def _rows(self, cameras: EngineCameras) -> EngineCameras:
        return EngineCameras.of(cameras.views, cameras.focal, self.card.sizes.batch)

    def _group(self, latents: Floats, start: int, timestep: int) -> _Group:
        """A block as a pass takes it: under the actions and the cameras of now."""
        projections = None
        if self._path is not None and self._world is not None:
            last, first = len(self._path) - 1, start - self._path_start
            frames = [min(first + i, last) for i in range(latents.shape[1])]
            projections = self._path.projections(frames, self._world)
        return _Group(latents, start, timestep, self._actions, projections)

    @property
    def waits_for_refresh(self) -> bool:
        return self._newest is not None and not self._finished

    @property
    def _finished(self) -> bool:
        return self.latent_frames is not None and self.next_frame >= self.latent_frames

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """What happens inside happens wholly, or the rollout refuses to go on with a cache in between."""
        if self._broken:
            raise InputError(f"the rollout broke off at latent frame {self.next_frame}: start another")
        self._broken = True
        yield
        self._broken = False

    def _next_block(self) -> Latents:
        start, n = self.next_frame, self.card.sizes.block
        steps = self.card.steps if self._generated else self.card.first_steps
        if self.config.refresh == "separate":
            self._run_refresh()
        x = self._start_noise(n)
        for index, step in enumerate(steps):
            group = self._group(x, start, step.timestep)
            velocity = self._step(group) if self._newest is None else self._fused(group)
            clean = x - np.float32(step.sigma) * velocity
            if not np.isfinite(clean).all():
                raise NonFiniteError(f"the model produced NaN or infinity at latent frame {start}, step {index + 1}")
            if index + 1 < len(steps):
                sigma = np.float32(steps[index + 1].sigma)
                x = (1 - sigma) * clean + sigma * self._step_noise(n)
        self.next_frame, self._generated = start + n, True
        if self.config.refresh != "skip":
            self._newest = self._group(clean.copy(), start, self.card.context)
        return Latents(clean, start)

    def _prefill(self, latents: Floats) -> None:
        start, self.next_frame = self.next_frame, self.next_frame + latents.shape[1]
        self._newest = self._group(latents.astype(np.float32), start, self.card.given)
        self._run_refresh()

    def _run_refresh(self) -> None:
        newest, self._newest = self._newest, None
        if newest is not None:
            self._run("refresh", [newest], **self._one_block(newest))

    def _step(self, group: _Group) -> Floats:
        return self._run("step", [group], **self._one_block(group))

    def _one_block(self, group: _Group) -> dict[str, Array]:
        """Claim the block's slots; what it sees is then a whole number of slots from the first one on."""
        self.ring.write(group.start)
        end = group.start + self.card.sizes.block
        slots = {self.ring.slot(frame) for frame in self.ring.visible(end, self.config.window)}
        if slots != set(range(len(slots))):
            raise InputError(f"the block ending at {end} must see the first slots of the cache, got {sorted(slots)}")
        return {"valid": np.full(self.card.sizes.batch, len(slots) * self.card.sizes.tokens, np.int64)}

    def _fused(self, noisy: _Group) -> Floats:
        """The waiting clean pass and the first step of the next block in one pass; only the former is written."""
        clean, self._newest = self._newest, None
        assert clean is not None
        ring, window, n = self.ring, self.config.window, self.card.sizes.block
        visible = np.zeros((2, self.card.sizes.slots + n), bool)
        visible[0, [ring.slot(frame) for frame in ring.visible(noisy.start, window)]] = True
        ring.write(noisy.start)
        seen = [frame for frame in ring.visible(noisy.start + n, window) if frame < noisy.start]
        visible[1, [ring.slot(frame) for frame in seen]] = True
        visible[1, -n:] = True
        return self._run("fused", [clean, noisy], visible=visible)

    def _run(self, name: str, groups: list[_Group], **inputs: Array) -> Floats:
        """Run a pass that writes the first group; returns the velocity of the last, valid until the next pass."""
        session, sizes = self.engine.session(name), self.card.sizes
        frames = [group.start + i for group in groups for i in range(sizes.block)]
        first_token = self.ring.slot(groups[0].start) * sizes.tokens
        inputs["latents"] = np.concatenate([group.latents for group in groups], axis=1)
        inputs["rope_time"] = axis_table(frames, sizes.time_pairs)
        if self._path is not None:
            inputs["projections"] = np.concatenate([group.projections for group in groups], axis=1)
        inputs["write_index"] = np.full(sizes.batch, first_token, np.int64)
        bound = {tensor_name: Buffer(array) for tensor_name, array in inputs.items()}
        bound["modulation"] = self.engine.modulation(*((group.timestep, group.actions) for group in groups))
        session.bind({**bound, **self._text, **self.caches})
        if name != "refresh":
            session.bind_output("velocity", self._velocity)
        session.run()
        return self._velocity.array

    def _start_noise(self, frames: int) -> Floats:
        if self._noise is None:
            return self._draws.start(frames)
        first, self._taken = self._taken, self._taken + frames
        if self._taken > self._noise.shape[1]:
            raise InputError(f"noise must cover {self._taken} generated frames, got {self._noise.shape[1]}")
        return self._noise[:, first : self._taken]

    def _step_noise(self, frames: int) -> Floats:
        if self._renoise is None:
            return self._draws.between_steps(frames)
        given = next(self._renoise, None)
        if given is None:
            raise InputError("renoise must hold one array per step that follows another, got fewer")
        shape = self.card.sizes.frame_shape(frames)
        if given.size != np.prod(shape) or given.shape[-3:] != shape[2:]:
            raise InputError(f"renoise must be {list(shape)} or its first two merged, got {list(given.shape)}")
        return given.reshape(shape).astype(np.float32)

    def _require(self, array: Any, name: str) -> Floats:
        batch = self.card.sizes.batch
        array = np.asarray(array)
        if array.ndim != 5 or array.shape[0] != batch or array.shape[2:] != self.frame_shape:
            raise InputError(
                f"{name} must be [B={batch}, F, {', '.join(map(str, self.frame_shape))}], got {list(array.shape)}"
            )
        if not np.isfinite(array).all():
            raise InputError(f"{name} must be finite, got NaN or infinity")
        return array.astype(np.float32)
