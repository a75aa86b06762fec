"""The streaming decoder of the Wan VAE: the library's weights and arithmetic, its own memory.

A clip's latents are decoded one by one, in two kinds of call: the first, which becomes one picture, and every other,
which becomes four. Both work in memory that stays in place, so on CUDA each is captured as a graph. What a clip needs
(buffers and graphs) is lent, and when the clip's decoder is gone the next clip of the same size has it.
"""

import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cfpp_rt.codec.wan_layers import Kernel, Layers, Layout, Size, Upsampler, in_eights
from cfpp_rt.device.capture import Capture, CudaCapture

Key = tuple[int, int, int]  # clips side by side, height and width of a latent


class ClipNetwork:
    """The decoder network and its memory for one clip at a time.

    decoder: of an `AutoencoderKLWan`. kernels: see `Layers`. key: sizes. Raises what allocation raises.
    """

    def __init__(self, decoder: Any, kernels: dict[nn.Module, Kernel], key: Key, layout: Layout):
        self.key = key
        self.holder: weakref.ref[object] | None = None
        self._layers = layers = Layers(kernels, layout)
        size = Size(key[0], 1, key[1], key[2])
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
        """From now on both kinds of call are replayed. Raises what `capture` raises, and is then as it was."""
        with self._convolutions():
            self._runs = {first: capture(run) for first, run in self._runs.items()}
        self.captured = True

    @property
    def num_bytes(self) -> int:
        """Memory of the buffers, without that of graphs."""
        return sum(conv.buffer.nbytes for conv in self._layers.causal)

    def reset(self) -> None:
        """To the start of a clip."""
        for conv in self._layers.causal:
            conv.reset()

    def decode(self, latent: Tensor, *, first: bool) -> Tensor:
        """What the decoder takes, [B, C, 1, h, w], to pixels [B, 3, 1 or 4, 8h, 8w], overwritten by the next call."""
        self._conv_in.slot(1).copy_(latent)
        if self.captured or not latent.is_cuda:
            return self._runs[first]()
        with self._convolutions():
            return self._runs[first]()

    @contextmanager
    def _convolutions(self) -> Iterator[None]:
        """Where cuDNN times its kernels when it meets a shape, two dozen in all, and goes on with the fastest. Not in
        float32, where the fastest may be less exact.
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


class ClipNetworks:
    """The networks of a VAE: one for each clip that is being decoded, and those of clips that are over.

    vae: an `AutoencoderKLWan` whose weights stay as they are. capture: makes the `Capture` for a device (CUDA graphs
    are for CUDA alone); None = no graphs. Safe to call from several threads.
    """

    def __init__(self, vae: Any, capture: Callable[[torch.device], Capture] | None = CudaCapture):
        self._decoder, self._make_capture = vae.decoder, capture
        weight = vae.decoder.conv_in.weight
        self._device, self.layout = weight.device, Layout.of(weight.device)
        with torch.no_grad():
            self._kernels: dict[nn.Module, Kernel] = {
                module: (self.layout.place(module.weight), module.bias)
                for module in vae.decoder.modules()
                if isinstance(module, (nn.Conv2d, nn.Conv3d))
            }
            if self.layout.channels_last:
                self._kernels[vae.decoder.conv_out] = in_eights(self._kernels[vae.decoder.conv_out])
        self._networks: list[ClipNetwork] = []
        self._lock = threading.Lock()
        self._no_graphs: str | None = None  # why

    def lend(self, holder: object, key: Key) -> ClipNetwork:
        """A network at the start of a clip, for the holder alone until it is gone. Raises OutOfMemoryError of torch."""
        with self._lock, torch.inference_mode():
            network = next((n for n in self._networks if n.key == key and _is_free(n)), None)
            if network is None:
                self._release()
                network = ClipNetwork(self._decoder, self._kernels, key, self.layout)
                self._capture(network)
                self._networks.append(network)
            elif self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # the holder before may have used another stream
            network.reset()
            network.holder = weakref.ref(holder)
            return network

    def release(self) -> None:
        """Let go of the memory that no clip uses."""
        with self._lock:
            self._release()

    def _release(self) -> None:
        held, self._networks = self._networks, [n for n in self._networks if not _is_free(n)]
        if len(held) > len(self._networks) and self._device.type == "cuda":
            del held
            torch.cuda.empty_cache()

    def _capture(self, network: ClipNetwork) -> None:
        if self._make_capture is None or self._no_graphs is not None:
            return
        if self._make_capture is CudaCapture and self._device.type != "cuda":
            return
        try:
            network.capture(self._make_capture(self._device))
        except RuntimeError as error:  # what CUDA and torch raise
            self._no_graphs = f"capture failed: {type(error).__name__}: {str(error).splitlines()[0]}"
            warnings.warn(f"Wan VAE without CUDA graphs: {self._no_graphs}", RuntimeWarning, stacklevel=5)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # what warming up took, on a stream that is not used again


def _is_free(network: ClipNetwork) -> bool:
    return network.holder is None or network.holder() is None
