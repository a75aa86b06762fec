"""One video while it is being made: prompts and seeds in, pictures out, times noted."""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from cfpp_rt.codec.base import Codec
from cfpp_rt.codec.streaming import to_uint8
from cfpp_rt.config import RolloutConfig
from cfpp_rt.core.camera import Cameras
from cfpp_rt.device.timing import Timings
from cfpp_rt.errors import InputError, NonFiniteError
from cfpp_rt.model.transformer import CausalWanTransformer
from cfpp_rt.runtime.cuda_graphs import Graphs
from cfpp_rt.runtime.rollout import Rollout
from cfpp_rt.values import Conditioning, Frames


def latent_frames(pictures: int, factor: int, block: int, name: str = "frames") -> int:
    """Latent frames of a video of `pictures` frames: the first is alone, then `factor` pictures each.

    Raises InputError, naming `name`, where they do not make whole blocks.
    """
    latents = 1 + (pictures - 1) // factor
    if pictures < 1 or (pictures - 1) % factor or latents % block:
        below = max(latents // block * block, block)
        fitting = [1 + factor * (n - 1) for n in (below, below + block)]
        raise InputError(
            f"{name} must be 1 + {factor} * n pictures and make whole blocks of {block} latent frames"
            f" (such as {fitting[0]} or {fitting[1]}), got {pictures}"
        )
    return latents


@dataclasses.dataclass(frozen=True)
class _Underway:
    """A block that the device may still work on. pixels, finite: in host memory, valid once `done` is (None = now)."""

    start: int
    pixels: Tensor
    finite: Tensor | None
    done: torch.cuda.Event | None


class Stream:
    """An iterator of `Frames`; made by `Pipeline.stream`. `timings` is filled as it runs."""

    def __init__(
        self,
        *,
        model: CausalWanTransformer,
        codec: Codec,
        encode_text: Callable[[Sequence[str]], Conditioning],
        prompt: Sequence[str] | Conditioning,
        config: RolloutConfig,
        frames: int | None,
        size: tuple[int, int],
        initial: Tensor | None,
        cameras: Cameras | None,
        seed: int | Sequence[int],
        noise: Tensor | None,
        renoise: Sequence[Tensor] | None,
        ahead: int,
        graphs: Graphs | None,
    ):
        self.timings = Timings(model.device)
        height, width = size
        step = codec.spatial_factor * model.config.patch_size[1]
        if height < step or width < step or height % step or width % step:
            raise InputError(f"size must be (height, width) in multiples of {step}, got {height}x{width}")
        if not isinstance(ahead, int) or not 0 <= ahead <= 8:
            raise InputError(f"ahead must be in 0..8, got {ahead!r}")
        total = None if frames is None else latent_frames(frames, codec.temporal_factor, config.frames_per_block)
        self._encode_text = encode_text
        self._decoder = codec.decoder()
        text = self._conditioning(prompt)
        given = None
        if initial is not None:
            given = self._encode_initial(initial, codec, text.embeds.shape[0], size, config.frames_per_block, frames)
        self.rollout = Rollout(
            model,
            text,
            config,
            latent_size=(height // codec.spatial_factor, width // codec.spatial_factor),
            frames=total,
            initial=given,
            cameras=cameras,
            seed=seed,
            noise=noise,
            renoise=renoise,
            graphs=graphs,
            check_finite="later",
        )
        self._initial = given
        self._delivered = 0
        self._ahead, self._underway = ahead, deque[_Underway]()
        self._beside = torch.cuda.Stream(model.device) if ahead and model.device.type == "cuda" else None

    def __iter__(self) -> Iterator[Frames]:
        return self

    def __next__(self) -> Frames:
        while len(self._underway) <= self._ahead:
            block = self._start_block()
            if block is None:
                break
            self._underway.append(block)
        if not self._underway:
            raise StopIteration
        block = self._underway.popleft()
        if block.done is not None:
            block.done.synchronize()
        if self._ahead == 0 or (self.rollout.finished and not self._underway):  # no pass has come after this block's
            self.rollout.require_finite()  # only now, when the host has waited for the device anyway
        elif block.finite is not None and not bool(block.finite):
            raise NonFiniteError(
                f"the model produced NaN or infinity at latent frame {block.start};"
                " ahead=0 would tell step and layer as well"
            )
        frames = Frames(block.pixels, self._delivered)
        self._delivered += block.pixels.shape[1]
        self.timings.deliver(block.pixels.shape[1])
        return frames

    def _start_block(self) -> _Underway | None:
        """Ask the device for the next block's latents and pictures; None after the last."""
        finite = None
        if self._initial is not None:  # given frames come back through the codec, as the start of the video
            latents, self._initial, start = self._initial, None, 0
        else:
            if self.rollout.finished:
                return None
            if self.rollout.config.refresh == "separate":
                self.refresh()
            with self.timings.stage("diffuse"):
                made = next(self.rollout)
            latents, start = made.values, made.start
            finite = self.rollout.newest_finite if self._ahead else None
        if self._beside is None:
            with self.timings.stage("decode"):
                return _Underway(start, to_uint8(self._decoder.decode(latents)).cpu(), finite, None)
        self._beside.wait_stream(torch.cuda.current_stream(latents.device))
        with torch.cuda.stream(self._beside):
            with self.timings.stage("decode"):
                pixels = to_uint8(self._decoder.decode(latents)).to("cpu", non_blocking=True)  # to pinned memory
            if finite is not None:
                finite.record_stream(self._beside)
                finite = finite.to("cpu", non_blocking=True)
            latents.record_stream(self._beside)
            return _Underway(start, pixels, finite, self._beside.record_event())

    def refresh(self) -> None:
        """Run the newest block's clean pass now if it still waits: for idle time before the next input arrives."""
        if self.rollout.waits_for_refresh:
            with self.timings.stage("refresh"):
                self.rollout.refresh()

    def switch_prompt(self, prompt: str | Sequence[str] | Conditioning, *, recache: bool = False) -> None:
        """Follow another prompt from the next block on that is not made ahead; see `Rollout.switch_prompt`."""
        self.rollout.switch_prompt(self._conditioning([prompt] if isinstance(prompt, str) else prompt), recache=recache)

    def act(self, actions: int | Sequence[int] | Tensor) -> None:
        """Take these actions from the next block on that is not made ahead, until others come; see `Rollout.act`."""
        self.rollout.act(actions)

    def move(self, cameras: Cameras) -> None:
        """Take these cameras from the next block on that is not made ahead, one per frame; see `Rollout.move`."""
        self.rollout.move(cameras)

    def _conditioning(self, prompt: Sequence[str] | Conditioning) -> Conditioning:
        if isinstance(prompt, Conditioning):
            return prompt
        with self.timings.stage("encode_text"):
            return self._encode_text(prompt)

    def _encode_initial(
        self, pixels: Tensor, codec: Codec, batch: int, size: tuple[int, int], block: int, frames: int | None
    ) -> Tensor:
        if pixels.ndim != 5 or pixels.shape[0] not in (1, batch) or tuple(pixels.shape[2:]) != (3, *size):
            raise InputError(f"initial must be [1 or {batch}, T, 3, {size[0]}, {size[1]}], got {list(pixels.shape)}")
        pictures = pixels.shape[1]
        latent_frames(pictures, codec.temporal_factor, block, "initial")
        if frames is not None and pictures >= frames:
            raise InputError(f"frames must be more than the {pictures} given pictures, got {frames}")
        if not (float(pixels.amin()) >= -1.001 and float(pixels.amax()) <= 1.001):
            raise InputError("initial must be pixels in [-1, 1], got values outside or NaN")
        with self.timings.stage("encode_image"), torch.inference_mode():
            return codec.encode(pixels).float().expand(batch, -1, -1, -1, -1)
