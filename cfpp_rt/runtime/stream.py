"""A video while it is generated: an iterator of frames with timings and controls."""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from cfpp_rt.codec.base import Codec
from cfpp_rt.codec.streaming import finite_frames, require_finite_frames, to_uint8
from cfpp_rt.config import RolloutConfig
from cfpp_rt.core.camera import Cameras
from cfpp_rt.core.exclusive import Exclusive
from cfpp_rt.core.frame_counts import count_latent_frames
from cfpp_rt.device.timing import Timings
from cfpp_rt.errors import InputError, NonFiniteError
from cfpp_rt.model.transformer import CausalWanTransformer
from cfpp_rt.runtime.cuda_graphs import CudaGraphCache
from cfpp_rt.runtime.rollout import Rollout
from cfpp_rt.values import Frames

MAX_AHEAD = 8


@dataclasses.dataclass(frozen=True)
class StreamRequest:
    """The arguments of one `Stream`; see `Pipeline.stream`.

    prompt: texts, or text embeddings [B, text_len, text_dim].
    """

    prompt: Sequence[str] | Tensor
    config: RolloutConfig
    num_frames: int | None
    height: int
    width: int
    seed: int | Sequence[int] = 0
    initial_frames: Tensor | None = None
    cameras: Cameras | None = None
    noise: Tensor | None = None
    renoise: Sequence[Tensor] | None = None
    ahead: int = 0


@dataclasses.dataclass(frozen=True)
class _InFlightBlock:
    """A decoded block whose copy to the host may still be pending.

    start: index of its first latent frame.
    pixels: uint8 [B, T, height, width, 3].
    finite: bool [T + 1]. Flags that the latents are finite (true if `Rollout.require_finite` checks them), and that
        each frame is.
    done: CUDA event after which pixels and finite are valid; None = they are valid already.
    """

    start: int
    pixels: Tensor
    finite: Tensor
    done: torch.cuda.Event | None


class Stream:
    """An iterator of `Frames`, made by `Pipeline.stream`. `timings` is filled as it runs.

    One thread iterates; others may set prompt, actions and cameras meanwhile. Calls that run passes (`next`, `refresh`,
    `set_prompt` with `recache`) are refused with InputError while another one computes.

    model, codec, encode_prompt: what generates. cuda_graphs: of the model; None = the passes run without CUDA graphs.
    """

    def __init__(
        self,
        request: StreamRequest,
        *,
        model: CausalWanTransformer,
        codec: Codec,
        encode_prompt: Callable[[Sequence[str]], Tensor],
        cuda_graphs: CudaGraphCache | None,
    ):
        self.timings = Timings(model.device)
        config, height, width = request.config, request.height, request.width
        multiple = codec.spatial_factor * model.config.patch_size[1]
        if height < multiple or width < multiple or height % multiple or width % multiple:
            raise InputError(f"height and width must be multiples of {multiple}, got {height}x{width}")
        if not isinstance(request.ahead, int) or not 0 <= request.ahead <= MAX_AHEAD:
            raise InputError(f"ahead must be in 0..{MAX_AHEAD}, got {request.ahead!r}")
        latent_frames = None
        if request.num_frames is not None:
            latent_frames = count_latent_frames(request.num_frames, codec.temporal_factor, config.frames_per_block)
        self._encode_prompt = encode_prompt
        self._decoder, self._temporal_factor = codec.decoder(), codec.temporal_factor
        prompt_embeds = self._prompt_embeds(request.prompt)
        initial_latents = None
        if request.initial_frames is not None:
            initial_latents = self._encode_initial(request, request.initial_frames, codec, prompt_embeds.shape[0])
        self.rollout = Rollout(
            model,
            prompt_embeds,
            config,
            latent_size=(height // codec.spatial_factor, width // codec.spatial_factor),
            latent_frames=latent_frames,
            initial_latents=initial_latents,
            cameras=request.cameras,
            seed=request.seed,
            noise=request.noise,
            renoise=request.renoise,
            cuda_graphs=cuda_graphs,
            check_finite="later",
        )
        self._in_use = Exclusive("a stream")
        self._initial_latents = initial_latents
        self._delivered = 0
        self._ahead, self._in_flight = request.ahead, deque[_InFlightBlock]()
        on_cuda = model.device.type == "cuda"
        self._decode_stream = torch.cuda.Stream(model.device) if request.ahead and on_cuda else None

    def __iter__(self) -> Iterator[Frames]:
        return self

    def __next__(self) -> Frames:
        """Generate, decode and deliver the next block.

        Raises NonFiniteError, and ends the stream, if its latents or its pixels are not finite.
        """
        with self._in_use:
            return self._next_frames()

    def _next_frames(self) -> Frames:
        while len(self._in_flight) <= self._ahead:
            block = self._start_block()
            if block is None:
                break
            self._in_flight.append(block)
        if not self._in_flight:
            raise StopIteration
        block = self._in_flight.popleft()
        if block.done is not None:
            block.done.synchronize()
        try:
            self._require_finite(block)
        except NonFiniteError:
            self._in_flight.clear()  # a later block would be delivered in the place of this one
            self.rollout.close()
            raise
        frames = Frames(block.pixels, self._delivered)
        self._delivered += block.pixels.shape[1]
        self.timings.deliver(block.pixels.shape[1])
        return frames

    def _require_finite(self, block: _InFlightBlock) -> None:
        if self._ahead == 0 or (self.rollout.finished and not self._in_flight):
            # No pass was launched after this block, so the check can run its passes again; and the host has waited for
            # the device already.
            self.rollout.require_finite()
        elif not bool(block.finite[0]):
            raise NonFiniteError(
                f"the model produced NaN or infinity at latent frame {block.start};"
                " use ahead=0 to learn the step and the layer"
            )
        require_finite_frames(block.finite[1:], self._delivered, self._temporal_factor)

    def _start_block(self) -> _InFlightBlock | None:
        """Launch the next block's passes and its decoding; None after the last block."""
        finite = None
        if self._initial_latents is not None:  # given frames come back through the codec, as the start of the video
            latents, self._initial_latents, start = self._initial_latents, None, 0
        else:
            if self.rollout.finished:
                return None
            if self.rollout.config.refresh == "separate":
                self._refresh()
            with self.timings.stage("diffuse"):
                block = next(self.rollout)
            latents, start = block.values, block.start
            finite = self.rollout.newest_finite if self._ahead else None
        if self._decode_stream is None:
            with self.timings.stage("decode"):
                pixels, flags = self._decode(latents, finite)
                return _InFlightBlock(start, pixels.cpu(), flags, None)  # waits for the flags, too
        self._decode_stream.wait_stream(torch.cuda.current_stream(latents.device))
        with torch.cuda.stream(self._decode_stream):
            with self.timings.stage("decode"):
                pixels, flags = self._decode(latents, finite)
                pixels = pixels.to("cpu", non_blocking=True)  # to pinned memory
            if finite is not None:
                finite.record_stream(self._decode_stream)
            latents.record_stream(self._decode_stream)
            return _InFlightBlock(start, pixels, flags, self._decode_stream.record_event())

    def _decode(self, latents: Tensor, finite: Tensor | None) -> tuple[Tensor, Tensor]:
        """Decode the next latents.

        finite: flag that the latents are finite, bool []; None = `Rollout.require_finite` checks them.

        Returns uint8 pixels on the device and `_InFlightBlock.finite`, whose copy to the host may still be pending.
        """
        pixels = self._decoder.decode(latents)
        frames_finite = finite_frames(pixels)
        latents_finite = torch.ones_like(frames_finite[:1]) if finite is None else finite[None]
        flags = torch.cat((latents_finite, frames_finite)).to("cpu", non_blocking=True)
        return to_uint8(pixels), flags

    def refresh(self) -> None:
        """Run the newest block's clean pass now if it still waits: for idle time before the next input arrives."""
        with self._in_use:
            self._refresh()

    def _refresh(self) -> None:
        if self.rollout.waits_for_refresh:
            with self.timings.stage("refresh"):
                self.rollout.refresh()

    def set_prompt(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        prompt_embeds: Tensor | None = None,
        recache: bool = False,
    ) -> None:
        """Follow another prompt from the first block that has not been launched yet; see `Rollout.set_prompt`.

        prompt: one text, or one per video. prompt_embeds: [B, text_len, text_dim], in its place.
        """
        embeds = self._prompt_embeds(require_prompt(prompt, prompt_embeds))
        with self._in_use if recache else nullcontext():
            self.rollout.set_prompt(embeds, recache=recache)

    def set_actions(self, actions: int | Sequence[int] | Sequence[Sequence[int]] | Tensor) -> None:
        """Take these actions from the first block that has not been launched yet; see `Rollout.set_actions`."""
        self.rollout.set_actions(actions)

    def set_cameras(self, cameras: Cameras) -> None:
        """Take these cameras from the first block that has not been launched yet; see `Rollout.set_cameras`."""
        self.rollout.set_cameras(cameras)

    def _prompt_embeds(self, prompt: Sequence[str] | Tensor) -> Tensor:
        if isinstance(prompt, Tensor):
            return prompt
        with self.timings.stage("encode_text"):
            return self._encode_prompt(prompt)

    def _encode_initial(self, request: StreamRequest, pixels: Tensor, codec: Codec, batch: int) -> Tensor:
        """Check the given frames and encode them to latents [B, F0, C, h, w]."""
        size = (request.height, request.width)
        if pixels.ndim != 5 or pixels.shape[0] not in (1, batch) or tuple(pixels.shape[2:]) != (3, *size):
            raise InputError(
                f"initial_frames must be [1 or {batch}, T, 3, {size[0]}, {size[1]}], got {list(pixels.shape)}"
            )
        given = pixels.shape[1]
        count_latent_frames(given, codec.temporal_factor, request.config.frames_per_block, "initial_frames")
        if request.num_frames is not None and given >= request.num_frames:
            raise InputError(f"num_frames must be more than the {given} given frames, got {request.num_frames}")
        if not (float(pixels.amin()) >= -1.001 and float(pixels.amax()) <= 1.001):
            raise InputError("initial_frames must be pixels in [-1, 1], got values outside or NaN")
        with self.timings.stage("encode_image"), torch.inference_mode():
            return codec.encode(pixels).float().expand(batch, -1, -1, -1, -1)


def require_prompt(prompt: str | Sequence[str] | None, prompt_embeds: Tensor | None) -> list[str] | Tensor:
    """Return the texts or the text embeddings, of which exactly one must be given; else raise InputError."""
    if (prompt is None) == (prompt_embeds is None):
        which = "neither" if prompt is None else "both"
        raise InputError(f"exactly one of prompt and prompt_embeds must be given, got {which}")
    if prompt_embeds is not None:
        if not isinstance(prompt_embeds, Tensor) or prompt_embeds.ndim != 3:
            got = list(prompt_embeds.shape) if isinstance(prompt_embeds, Tensor) else type(prompt_embeds).__name__
            raise InputError(f"prompt_embeds must be a tensor [B, text_len, text_dim], got {got}")
        return prompt_embeds
    texts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(texts, Sequence) or not texts or not all(isinstance(text, str) for text in texts):
        raise InputError(f"prompt must be a text or a list of texts, got {prompt!r}")
    return list(texts)
