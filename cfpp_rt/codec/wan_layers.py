"""The layers of the Wan VAE's decoder for one clip of one size: causal convolutions that own their input's memory.

A causal convolution looks two frames back. Its input lies in a buffer behind those two frames, where the layer before
writes it, and once it has run the last two frames of the buffer move to the front: nothing is joined or padded for a
call. Before the clip the history is zero, which is what the library pads with.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfpp_rt.ops.rms_silu import rms_silu_

HISTORY = 2  # frames that a causal convolution looks back
# Copied as they are, 16 bytes at a time where the channels allow it.
_WIDE = torch.complex128

Kernel = tuple[Tensor, Tensor | None]  # weight and bias


@dataclasses.dataclass(frozen=True)
class Layout:
    """How activations lie in memory.

    channels_last: the channels of a pixel side by side, as cuDNN's tensor core kernels want them. border: zeros round
    every frame of a buffer, 1 or 0; where there are none the convolution pads. late_bias: the bias of a convolution
    that a norm follows is added by the norm; cuDNN's convolutions leave it to a pass over memory of its own.
    """

    channels_last: bool
    border: int
    late_bias: bool

    @classmethod
    def of(cls, device: torch.device) -> "Layout":
        """CUDA: channels last, padded by the convolution. Else as the library: other layouts give other bits there."""
        cuda = device.type == "cuda"
        return cls(channels_last=cuda, border=0 if cuda else 1, late_bias=cuda)

    def place(self, tensor: Tensor) -> Tensor:
        """The tensor [., C, ...] in this layout; itself where it is, as what cuDNN makes of such tensors always is."""
        if not self.channels_last or tensor.ndim < 4:
            return tensor
        return tensor.contiguous(memory_format=torch.channels_last if tensor.ndim == 4 else torch.channels_last_3d)


@dataclasses.dataclass(frozen=True)
class Size:
    """What a layer sees: clips side by side, most frames of a call, height and width."""

    batch: int
    frames: int
    height: int
    width: int

    def doubled(self, *, frames: bool) -> "Size":
        return Size(self.batch, self.frames * (2 if frames else 1), 2 * self.height, 2 * self.width)


class Layers:
    """Makes the layers of one clip from the library's, and holds their convolutions.

    kernels: weight and bias of each of the library's convolutions, in the layout; shared by all clips.
    """

    def __init__(self, kernels: Mapping[nn.Module, Kernel], layout: Layout):
        self.kernels, self.layout = kernels, layout
        self.causal: list[CausalConv] = []

    def causal_conv(self, conv: Any, size: Size, *, bias: bool = True) -> "CausalConv":
        weight, own_bias = self.kernels[conv]
        made = CausalConv((weight, own_bias if bias else None), size, self.layout)
        self.causal.append(made)
        return made

    def norm_silu_conv(
        self, norm: Any, conv: Any, size: Size, *, bias: bool = True, bias_before: Tensor | None = None
    ) -> Callable[[Tensor], Tensor]:
        """bias: whether the convolution adds its own. bias_before: what the norm adds to its input first."""
        gamma, causal = norm.gamma.flatten(), self.causal_conv(conv, size, bias=bias)

        def run(x: Tensor) -> Tensor:
            rms_silu_(causal.slot(x.shape[2]), x, gamma, bias_before)
            return causal(x.shape[2])

        return run

    def residual_block(self, block: Any, size: Size) -> Callable[[Tensor], Tensor]:
        late = block.conv1.bias if self.layout.late_bias else None
        first = self.norm_silu_conv(block.norm1, block.conv1, size, bias=late is None)
        second = self.norm_silu_conv(block.norm2, block.conv2, size, bias_before=late)
        shortcut, place = self.kernels.get(block.conv_shortcut), self.layout.place

        def run(x: Tensor) -> Tensor:
            along = x if shortcut is None else place(F.conv3d(x, *shortcut))
            return second(first(x)).add_(along)

        return run

    def attention_block(self, block: Any) -> Callable[[Tensor], Tensor]:
        """Single-head attention within each frame."""
        norm, to_qkv, proj = block.norm, self.kernels[block.to_qkv], self.kernels[block.proj]
        place = self.layout.place

        def run(x: Tensor) -> Tensor:
            rows, (height, width) = x.transpose(1, 2).flatten(0, 1), x.shape[3:]
            qkv = F.conv2d(norm(rows), *to_qkv).flatten(2).transpose(1, 2).contiguous().unsqueeze(1)
            q, k, v = qkv.chunk(3, dim=-1)
            mixed = F.scaled_dot_product_attention(q, k, v).squeeze(1)
            mixed = mixed.transpose(1, 2).unflatten(2, (height, width))
            return _frames(place(F.conv2d(mixed, *proj)), x.shape[0]).add_(x)

        return run

    def upsampler(self, block: Any, size: Size) -> "Upsampler":
        """size: of its input."""
        time_conv = self.causal_conv(block.time_conv, size) if block.mode == "upsample3d" else None
        return Upsampler(time_conv, self.kernels[block.resample[1]], self.layout)


class CausalConv:
    """A convolution over time and the buffer that holds its input, [B, C, 2 + frames, H, W] and the border."""

    def __init__(self, kernel: Kernel, size: Size, layout: Layout):
        self._weight, self._bias = kernel
        border = layout.border if self._weight.shape[-1] == 3 else 0  # the one of an upsampler looks at time alone
        pad = self._weight.shape[-1] // 2 - border
        self._padding, self._border, self._place = (0, pad, pad), border, layout.place
        planes = (size.batch, self._weight.shape[1], HISTORY + size.frames)
        shape = (*planes, size.height + 2 * border, size.width + 2 * border)
        self.buffer = layout.place(torch.zeros(shape, dtype=self._weight.dtype, device=self._weight.device))

    def slot(self, frames: int) -> Tensor:
        """Where the input of a call lies, [B, C, frames, H, W]."""
        border, (height, width) = self._border, self.buffer.shape[3:]
        return self.buffer[:, :, HISTORY : HISTORY + frames, border : height - border, border : width - border]

    def __call__(self, frames: int) -> Tensor:
        """The convolution of what lies in `slot(frames)`; afterwards its last two frames are history."""
        buffer = self.buffer
        out = F.conv3d(buffer[:, :, : HISTORY + frames], self._weight, self._bias, padding=self._padding)
        if frames == 1:  # the frames to move overlap those to be overwritten
            buffer[:, :, 0].copy_(buffer[:, :, 1])
            buffer[:, :, 1].copy_(buffer[:, :, 2])
        else:
            buffer[:, :, :HISTORY].copy_(buffer[:, :, frames : frames + HISTORY])
        return self._place(out)

    def reset(self) -> None:
        """To the start of a clip."""
        self.buffer[:, :, :HISTORY].zero_()


class Upsampler:
    """Twice the height and width, and where it has a convolution over time twice the frames, but for the first."""

    def __init__(self, time_conv: CausalConv | None, kernel: Kernel, layout: Layout):
        self._time_conv, self._kernel, self._layout = time_conv, kernel, layout

    def __call__(self, x: Tensor, *, first: bool) -> Tensor:
        batch, groups = x.shape[0], 1
        if self._time_conv is not None and not first:
            self._time_conv.slot(x.shape[2]).copy_(x)
            x, groups = self._time_conv(x.shape[2]), 2  # the channels of two frames each
        doubled = _doubled_rows(x, groups) if self._layout.channels_last else _doubled_planes(x, groups)
        return _frames(self._layout.place(F.conv2d(doubled, *self._kernel, padding=1)), batch)


def _frames(pictures: Tensor, batch: int) -> Tensor:
    """[B * T, C, H, W] to [B, C, T, H, W], a view."""
    return pictures.unflatten(0, (batch, -1)).transpose(1, 2)


def _doubled_planes(x: Tensor, groups: int) -> Tensor:
    """[B, groups * C, T, H, W] to [B * T * groups, C, 2H, 2W], each pixel four times."""
    batch, channels, frames, height, width = x.shape
    planes = x.unflatten(1, (groups, -1)).permute(0, 3, 1, 2, 4, 5)[..., :, None, :, None]
    wide = planes.expand(*planes.shape[:5], 2, width, 2)
    return wide.reshape(batch * frames * groups, channels // groups, 2 * height, 2 * width)


def _doubled_rows(x: Tensor, groups: int) -> Tensor:
    """As `_doubled_planes`, channels last in and out."""
    batch, channels, frames, height, width = x.shape
    rows = x.permute(0, 2, 3, 4, 1)
    if channels * x.element_size() % (groups * _WIDE.itemsize) == 0:
        rows = rows.view(_WIDE)
    rows = rows.unflatten(-1, (groups, -1)).permute(0, 1, 4, 2, 3, 5)[..., :, None, :, None, :]
    wide = rows.expand(batch, frames, groups, height, 2, width, 2, -1)
    pictures = wide.reshape(batch * frames * groups, 2 * height, 2 * width, -1).view(x.dtype)
    return pictures.permute(0, 3, 1, 2)
