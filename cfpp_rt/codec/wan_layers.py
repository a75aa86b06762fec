"""The layers of the Wan VAE decoder for one clip of one size: causal convolutions that own the memory of their input.

A causal convolution reads its input and the two frames before it. The previous layer writes the input into a buffer,
behind those two frames; after the convolution the last two frames of the buffer move to its front. So no call has to
concatenate or pad. At the start of a clip the history is zero, which equals the padding of diffusers.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfpp_rt.ops.rms_silu import rms_silu_

HISTORY = 2  # earlier frames that a causal convolution reads
# Pixels are copied 16 bytes at a time where the number of channels allows it.
_COPY_DTYPE = torch.complex128

ConvWeights = tuple[Tensor, Tensor | None]  # weight and bias


def pad_to_eight_channels(weights: ConvWeights) -> ConvWeights:
    """Append output channels of zeros up to a multiple of 8, which tensor core kernels of cuDNN need."""
    weight, bias = weights
    missing = -weight.shape[0] % 8
    padded = F.pad(weight, (0, 0) * (weight.ndim - 1) + (0, missing)).contiguous(memory_format=torch.channels_last_3d)
    return padded, None if bias is None else F.pad(bias, (0, missing))


@dataclasses.dataclass(frozen=True)
class Layout:
    """The memory layout of activations.

    channels_last: the channels of a pixel are adjacent, which tensor core kernels of cuDNN need.
    border: width of the zeros around every frame of a buffer, 1 or 0; with 0 the convolution pads.
    late_bias: the bias of a convolution before a norm is added by the norm; cuDNN would add it in an extra pass over
        memory.
    """

    channels_last: bool
    border: int
    late_bias: bool

    @classmethod
    def of(cls, device: torch.device) -> "Layout":
        """Return the layout for a device: on CUDA channels last, else that of diffusers, to get the same bits."""
        cuda = device.type == "cuda"
        return cls(channels_last=cuda, border=0 if cuda else 1, late_bias=cuda)

    def apply(self, tensor: Tensor) -> Tensor:
        """Return the tensor [., C, ...] in this layout; no copy if it is already, as outputs of cuDNN are."""
        if not self.channels_last:
            return tensor
        return tensor.contiguous(memory_format=torch.channels_last if tensor.ndim == 4 else torch.channels_last_3d)


@dataclasses.dataclass(frozen=True)
class Size:
    """The largest input of a layer.

    batch: number of clips decoded together.
    frames: largest number of frames of one call.
    height, width: of a frame, at this layer.
    """

    batch: int
    frames: int
    height: int
    width: int

    def doubled(self, *, frames: bool) -> "Size":
        """Return the size after an upsampler: twice the height and width, and twice the frames if `frames`."""
        return Size(self.batch, self.frames * (2 if frames else 1), 2 * self.height, 2 * self.width)


class LayerFactory:
    """Builds the layers of one clip from the modules of diffusers, and collects their causal convolutions.

    conv_weights: weight and bias of each convolution of diffusers, in the layout; shared by all clips.
    """

    def __init__(self, conv_weights: Mapping[nn.Module, ConvWeights], layout: Layout):
        self.conv_weights, self.layout = conv_weights, layout
        self.causal: list[CausalConv] = []

    def causal_conv(self, conv: Any, size: Size, *, bias: bool = True) -> "CausalConv":
        """Build a causal convolution. size: of its input. bias: True if it adds its bias."""
        weight, own_bias = self.conv_weights[conv]
        causal = CausalConv((weight, own_bias if bias else None), size, self.layout)
        self.causal.append(causal)
        return causal

    def norm_silu_conv(
        self, norm: Any, conv: Any, size: Size, *, bias: bool = True, bias_before: Tensor | None = None
    ) -> Callable[[Tensor], Tensor]:
        """Build norm, SiLU and convolution.

        bias: True if the convolution adds its own bias. bias_before: added by the norm to its input.
        """
        gamma, causal = norm.gamma.flatten(), self.causal_conv(conv, size, bias=bias)

        def run(x: Tensor) -> Tensor:
            rms_silu_(causal.input_view(x.shape[2]), x, gamma, bias_before)
            return causal(x.shape[2])

        return run

    def residual_block(self, block: Any, size: Size) -> Callable[[Tensor], Tensor]:
        """Build a residual block of two convolutions. size: of its input."""
        late_bias = block.conv1.bias if self.layout.late_bias else None
        first = self.norm_silu_conv(block.norm1, block.conv1, size, bias=late_bias is None)
        second = self.norm_silu_conv(block.norm2, block.conv2, size, bias_before=late_bias)
        shortcut, to_layout = self.conv_weights.get(block.conv_shortcut), self.layout.apply

        def run(x: Tensor) -> Tensor:
            skip = x if shortcut is None else to_layout(F.conv3d(x, *shortcut))
            return second(first(x)).add_(skip)

        return run

    def attention_block(self, block: Any) -> Callable[[Tensor], Tensor]:
        """Build single-head attention within each frame."""
        norm, to_qkv, proj = block.norm, self.conv_weights[block.to_qkv], self.conv_weights[block.proj]
        to_layout = self.layout.apply

        def run(x: Tensor) -> Tensor:
            rows, (height, width) = x.transpose(1, 2).flatten(0, 1), x.shape[3:]
            qkv = F.conv2d(norm(rows), *to_qkv).flatten(2).transpose(1, 2).contiguous().unsqueeze(1)
            q, k, v = qkv.chunk(3, dim=-1)
            mixed = F.scaled_dot_product_attention(q, k, v).squeeze(1)
            mixed = mixed.transpose(1, 2).unflatten(2, (height, width))
            return _frames(to_layout(F.conv2d(mixed, *proj)), x.shape[0]).add_(x)

        return run

    def upsampler(self, block: Any, size: Size) -> "Upsampler":
        """Build an upsampler. size: of its input."""
        time_conv = self.causal_conv(block.time_conv, size) if block.mode == "upsample3d" else None
        return Upsampler(time_conv, self.conv_weights[block.resample[1]], self.layout)


class CausalConv:
    """A convolution over time and the buffer of its input, [B, C, 2 + frames, H, W] plus the border."""

    def __init__(self, weights: ConvWeights, size: Size, layout: Layout):
        self._weight, self._bias = weights
        border = (
            layout.border if self._weight.shape[-1] == 3 else 0
        )  # the convolution of an upsampler is over time alone
        pad = self._weight.shape[-1] // 2 - border
        self._padding, self._border, self._to_layout = (0, pad, pad), border, layout.apply
        planes = (size.batch, self._weight.shape[1], HISTORY + size.frames)
        shape = (*planes, size.height + 2 * border, size.width + 2 * border)
        self.buffer = layout.apply(torch.zeros(shape, dtype=self._weight.dtype, device=self._weight.device))

    def input_view(self, frames: int) -> Tensor:
        """Return the part of the buffer that a call reads as its input, [B, C, frames, H, W], a view."""
        border, (height, width) = self._border, self.buffer.shape[3:]
        return self.buffer[:, :, HISTORY : HISTORY + frames, border : height - border, border : width - border]

    def __call__(self, frames: int) -> Tensor:
        """Convolve `input_view(frames)`; afterwards its last two frames are the history of the next call."""
        buffer = self.buffer
        out = F.conv3d(buffer[:, :, : HISTORY + frames], self._weight, self._bias, padding=self._padding)
        if frames == 1:  # source and destination would overlap
            buffer[:, :, 0].copy_(buffer[:, :, 1])
            buffer[:, :, 1].copy_(buffer[:, :, 2])
        else:
            buffer[:, :, :HISTORY].copy_(buffer[:, :, frames : frames + HISTORY])
        return self._to_layout(out)

    def reset(self) -> None:
        """Return to the start of a clip."""
        self.buffer[:, :, :HISTORY].zero_()


class Upsampler:
    """Doubles height and width, and with a convolution over time the frames, except for the first latent of a clip."""

    def __init__(self, time_conv: CausalConv | None, weights: ConvWeights, layout: Layout):
        self._time_conv, self._conv, self._layout = time_conv, weights, layout

    def __call__(self, x: Tensor, *, first: bool) -> Tensor:
        batch, groups = x.shape[0], 1
        if self._time_conv is not None and not first:
            self._time_conv.input_view(x.shape[2]).copy_(x)
            x, groups = self._time_conv(x.shape[2]), 2  # the channels contain two frames each
        doubled = _doubled_rows(x, groups) if self._layout.channels_last else _doubled_planes(x, groups)
        return _frames(self._layout.apply(F.conv2d(doubled, *self._conv, padding=1)), batch)


def _frames(images: Tensor, batch: int) -> Tensor:
    """Reshape [B * T, C, H, W] to [B, C, T, H, W], a view."""
    return images.unflatten(0, (batch, -1)).transpose(1, 2)


def _doubled_planes(x: Tensor, groups: int) -> Tensor:
    """Repeat each pixel four times: [B, groups * C, T, H, W] to [B * T * groups, C, 2H, 2W]."""
    batch, channels, frames, height, width = x.shape
    planes = x.unflatten(1, (groups, -1)).permute(0, 3, 1, 2, 4, 5)[..., :, None, :, None]
    doubled = planes.expand(*planes.shape[:5], 2, width, 2)
    return doubled.reshape(batch * frames * groups, channels // groups, 2 * height, 2 * width)


def _doubled_rows(x: Tensor, groups: int) -> Tensor:
    """Compute `_doubled_planes` of a channels-last tensor; the result is channels last."""
    batch, channels, frames, height, width = x.shape
    rows = x.permute(0, 2, 3, 4, 1)
    if channels * x.element_size() % (groups * _COPY_DTYPE.itemsize) == 0:
        rows = rows.view(_COPY_DTYPE)
    rows = rows.unflatten(-1, (groups, -1)).permute(0, 1, 4, 2, 3, 5)[..., :, None, :, None, :]
    doubled = rows.expand(batch, frames, groups, height, 2, width, 2, -1)
    images = doubled.reshape(batch * frames * groups, 2 * height, 2 * width, -1).view(x.dtype)
    return images.permute(0, 3, 1, 2)
