"""Streaming decoder of the Wan VAE: the diffusers weights and arithmetic, in preallocated buffers.

Latent frames are decoded one by one, by two kinds of call: the first latent frame of a clip becomes one frame, each
later one four. Both use buffers at fixed addresses, so on CUDA each is captured as a CUDA graph. Buffers and graphs
belong to one clip at a time; once its decoder has been garbage-collected, the next clip of the same size reuses them.
A clip is a batch of videos that are decoded together.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cfpp_rt.codec.wan_layers import ConvWeights, LayerFactory, Layout, Size, Upsampler, pad_to_eight_channels
from cfpp_rt.device.capture import Capture, CudaCapture
from cfpp_rt.device.lease import LeasePool

ClipSize = tuple[int, int, int]  # batch size, and height and width of a latent frame


class ClipNetwork:
    """The decoder network and its buffers, for one clip at a time.

    decoder: the decoder of an `AutoencoderKLWan`.
    conv_weights: see `LayerFactory`.
    clip_size: the size of every latent frame.

    Raises torch.OutOfMemoryError on a GPU, RuntimeError on the CPU, if the buffers do not fit in memory.
    """

    def __init__(self, decoder: Any, conv_weights: dict[nn.Module, ConvWeights], clip_size: ClipSize, layout: Layout):
        self.clip_size = clip_size
        self._layers = layers = LayerFactory(conv_weights, layout)
        batch, height, width = clip_size
        size = Size(batch, 1, height, width)
        self._conv_in = layers.causal_conv(decoder.conv_in, size)
        blocks = decoder.mid_block.resnets
        self._stages: list[Callable[..., Tensor]] = [layers.residual_block(blocks[0], size)]
        for attention, block in zip(decoder.mid_block.attentions, blocks[1:], strict=True):
            self._stages += [layers.attention_block(attention), layers.residual_block(block, size)]
        for level in decoder.up_blocks:
            self._stages += [layers.residual_block(block, size) for block in level.resnets]
            for upsampler in level.upsamplers or ():
                self._stages.append(layers.upsampler(upsampler, size))
                size = size.doubled(frames=upsampler.mode == "upsample3d")
        self._head = layers.norm_silu_conv(decoder.norm_out, decoder.conv_out, size)
        self._channels = decoder.conv_out.out_channels
        self._runs: dict[bool, Callable[[], Tensor]] = {first: partial(self._run, first) for first in (True, False)}
        self.captured = False

    def capture(self, capture: Capture) -> None:
        """Capture both kinds of call; later calls replay them.

        Raises RuntimeError if CUDA cannot capture a call; the network then still decodes, without CUDA graphs.
        """
        with self._fastest_convolutions():
            self._runs = {first: capture(run) for first, run in self._runs.items()}
        self.captured = True

    @property
    def num_bytes(self) -> int:
        """Size of the buffers, without the memory of CUDA graphs."""
        return sum(conv.buffer.nbytes for conv in self._layers.causal)

    def reset(self) -> None:
        """Return to the start of a clip."""
        for conv in self._layers.causal:
            conv.reset()

    def decode(self, latent: Tensor, *, first: bool) -> Tensor:
        """Decode one denormalised latent frame.

        latent: [B, C, 1, h, w], see `WanVAE.denormalise`.
        first: True for the first latent frame of a clip.

        Returns pixels [B, 3, 1 or 4, 8h, 8w], which the next call overwrites.
        """
        self._conv_in.input_view(1).copy_(latent)
        if self.captured or not latent.is_cuda:
            return self._runs[first]()
        with self._fastest_convolutions():
            return self._runs[first]()

    @contextmanager
    def _fastest_convolutions(self) -> Iterator[None]:
        """Let cuDNN time its kernels for each new shape, about two dozen in all, and use the fastest.

        In float32 this is off, because the fastest kernel may be less accurate.
        """
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = self._conv_in.buffer.dtype != torch.float32
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = before

    def _run(self, first: bool) -> Tensor:
        x = self._conv_in(1)
        for stage in self._stages:
            x = stage(x, first=first) if isinstance(stage, Upsampler) else stage(x)
        return self._head(x)[:, : self._channels]


class ClipNetworkPool:
    """The decoder networks of a VAE: one per clip that is being decoded, and free ones for later clips.

    vae: an `AutoencoderKLWan` whose weights do not change.
    capture: function that returns the `Capture` of a device; None = no CUDA graphs.

    Safe to call from several threads.
    """

    def __init__(self, vae: Any, capture: Callable[[torch.device], Capture] | None = CudaCapture):
        self._decoder, self._make_capture = vae.decoder, capture
        weight = vae.decoder.conv_in.weight
        self._device, self._layout = weight.device, Layout.of(weight.device)
        with torch.no_grad():
            self._conv_weights: dict[nn.Module, ConvWeights] = {
                module: (self._layout.apply(module.weight), module.bias)
                for module in vae.decoder.modules()
                if isinstance(module, (nn.Conv2d, nn.Conv3d))
            }
            if self._layout.channels_last:
                conv_out = vae.decoder.conv_out
                self._conv_weights[conv_out] = pad_to_eight_channels(self._conv_weights[conv_out])
        self._pool: LeasePool[ClipNetwork] = LeasePool(weight.device)
        self._capture_failed = False

    def acquire(self, holder: object, clip_size: ClipSize) -> ClipNetwork:
        """Return a network at the start of a clip, reserved for `holder` until that object is garbage-collected.

        Raises the errors of `ClipNetwork`.
        """
        with torch.inference_mode():
            network = self._pool.acquire(holder, clip_size, lambda: self._make_network(clip_size))
            network.reset()
            return network

    @property
    def networks(self) -> list[ClipNetwork]:
        """The networks that are allocated, free ones included."""
        return self._pool.resources

    def release(self) -> None:
        """Free the networks that no clip uses."""
        self._pool.release()

    def _make_network(self, clip_size: ClipSize) -> ClipNetwork:
        network = ClipNetwork(self._decoder, self._conv_weights, clip_size, self._layout)
        if self._make_capture is None or self._capture_failed:
            return network
        if self._make_capture is CudaCapture and self._device.type != "cuda":
            return network
        try:
            network.capture(self._make_capture(self._device))
        except RuntimeError as error:  # raised by CUDA or torch
            self._capture_failed = True  # later networks do not try again
            reason = f"capture failed: {type(error).__name__}: {str(error).splitlines()[0]}"
            warnings.warn(f"Wan VAE without CUDA graphs: {reason}", RuntimeWarning, stacklevel=7)
        return network
