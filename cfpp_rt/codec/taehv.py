"""The tiny autoencoder for Wan2.1 latents (TAEHV by Ollin Boer Bohan, weights `taew2_1.pth`): fast, approximate.

Both networks consist of 2-D convolutions. Only the `MemBlock` reads the past: the previous frame at the same depth.
Module names and their order are those of the weights file. Inside the networks, pixels are in [0, 1].
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfpp_rt.codec.base import clamp_pixels, require_latents, require_pixels
from cfpp_rt.errors import CheckpointError, InputError
from cfpp_rt.io.checkpoint import read_tensors, require_exact

_STAGES = 3
_DECODER_STRIDES = (1, 2, 2)  # output frames per input frame, by stage
_ENCODER_STRIDES = (2, 2, 1)  # input frames per output frame, by stage
_BLOCKS = 3  # MemBlocks per stage


class MemBlock(nn.Module):
    """Residual block over a frame x and the previous frame, past: both [N, C_in, h, w] -> [N, C_out, h, w]."""

    def __init__(self, width_in: int, width_out: int):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(2 * width_in, width_out, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(width_out, width_out, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(width_out, width_out, 3, padding=1),
        )
        self.skip = nn.Conv2d(width_in, width_out, 1, bias=False) if width_in != width_out else nn.Identity()

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        return F.relu(self.conv(torch.cat((x, past), dim=1)) + self.skip(x))


class TPool(nn.Module):
    """Temporal pooling of each `stride` frames to one: [N * stride, C, h, w] -> [N, C, h, w]."""

    def __init__(self, width: int, stride: int):
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(width * stride, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.reshape(-1, self.stride * x.shape[1], *x.shape[2:]))


class TGrow(nn.Module):
    """Temporal upsampling of each frame to `stride` frames, in order: [N, C, h, w] -> [N * stride, C, h, w]."""

    def __init__(self, width: int, stride: int):
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(width, width * stride, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).reshape(-1, *x.shape[1:])


class SoftClamp(nn.Module):
    """Smooth limiter of latents to (-3, 3); small values stay nearly unchanged."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


def build_decoder(latent_channels: int, widths: tuple[int, ...]) -> nn.Sequential:
    """Build the network from latents to pixels in about [0, 1]. widths: channels of the stages and the last layer."""
    layers: list[nn.Module] = [SoftClamp(), nn.Conv2d(latent_channels, widths[0], 3, padding=1), nn.ReLU()]
    for stage, stride in enumerate(_DECODER_STRIDES):
        width = widths[stage]
        layers += [MemBlock(width, width) for _ in range(_BLOCKS)]
        layers += [nn.Upsample(scale_factor=2), TGrow(width, stride)]
        layers += [nn.Conv2d(width, widths[stage + 1], 3, padding=1, bias=False)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(widths[_STAGES], 3, 3, padding=1))


def build_encoder(latent_channels: int, width: int) -> nn.Sequential:
    """Build the network from pixels in [0, 1] to normalised latents. width: channels of all stages."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.ReLU()]
    for stride in _ENCODER_STRIDES:
        layers += [TPool(width, stride), nn.Conv2d(width, width, 3, padding=1, stride=2, bias=False)]
        layers += [MemBlock(width, width) for _ in range(_BLOCKS)]
    return nn.Sequential(*layers, nn.Conv2d(width, latent_channels, 3, padding=1))


class TAEHV(nn.Module):
    """The tiny autoencoder as a `Codec`. Latents in and out are normalised; it applies no statistics to them.

    latent_channels: C.
    decoder_widths: channels of the three stages and of the last layer of the decoder.
    encoder_width: channels of the encoder.
    """

    temporal_factor = 4
    spatial_factor = 8

    def __init__(
        self,
        latent_channels: int = 16,
        decoder_widths: tuple[int, ...] = (256, 128, 64, 64),
        encoder_width: int = 64,
    ):
        super().__init__()
        self.latent_channels = latent_channels
        # The weights file says `decoder.` and `encoder.`, which are methods here; so the modules are one level deeper.
        self.networks = nn.ModuleDict(
            {
                "decoder": build_decoder(latent_channels, decoder_widths),
                "encoder": build_encoder(latent_channels, encoder_width),
            }
        )
        self.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "TAEHV":
        """Load `taew2_1.pth` or `taew2_1.safetensors`; the shapes determine the widths.

        Raises CheckpointError if the file is missing, broken or the tiny autoencoder of another model.
        """
        return cls.from_state_dict(read_tensors(path), path).to(device=device, dtype=dtype)

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor], source: str | Path = "state dict") -> "TAEHV":
        """Build the model from a state dict in the names of the weights file. source: the file that an error names."""
        try:
            # After the stem (3 layers) each stage has its MemBlocks, an upsampler, a TGrow and a convolution.
            outputs = [3 + (stage + 1) * (_BLOCKS + 3) - 1 for stage in range(_STAGES)]
            first = state["decoder.1.weight"]
            widths = (first.shape[0], *(state[f"decoder.{index}.weight"].shape[0] for index in outputs))
            encoder_width = state["encoder.0.weight"].shape[0]
        except (KeyError, AttributeError, IndexError) as error:
            raise CheckpointError(f"{source}: not the tiny autoencoder of Wan2.1: no {error.args[0]}") from error
        with torch.device("meta"):
            model = cls(first.shape[1], widths, encoder_width)
        wanted = {name.removeprefix("networks."): tensor.shape for name, tensor in model.state_dict().items()}
        state = {name: _last_rows(tensor, wanted.get(name)) for name, tensor in state.items()}
        require_exact(state, wanted, source)
        model.load_state_dict({f"networks.{name}": tensor for name, tensor in state.items()}, assign=True)
        return model.requires_grad_(False)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode an entire clip: latents [B, F, C, h, w] to float32 pixels [B, 1 + 4 * (F - 1), 3, 8h, 8w] in [-1, 1].

        All frames pass through each layer together: fast, but memory grows with F. Use `decoder` for long clips.
        """
        return self.decoder().decode(latents)

    def decoder(self) -> "TAEHVDecoder":
        """Return a decoder at the start of a clip."""
        return TAEHVDecoder(self)

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode an entire clip: pixels [B, 1 + 4 * k, 3, 8h, 8w] in [-1, 1] to float32 latents [B, 1 + k, C, h, w]."""
        return self.encoder().encode(pixels)

    def encoder(self) -> "TAEHVEncoder":
        """Return an encoder at the start of a clip."""
        return TAEHVEncoder(self)

    @property
    def _device_and_dtype(self) -> dict:
        weight = next(self.parameters())
        return {"device": weight.device, "dtype": weight.dtype}


def _last_rows(tensor: Tensor, wanted: torch.Size | None) -> Tensor:
    """Cut the weight of a TGrow that was trained for more frames to its last rows, which make the last frames."""
    if wanted is None or not torch.is_tensor(tensor) or len(wanted) != 4 or wanted[2:] != (1, 1):
        return tensor
    fits = tensor.ndim == 4 and tensor.shape[1:] == wanted[1:] and tensor.shape[0] > wanted[0]
    return tensor[-wanted[0] :].clone() if fits else tensor


class _StreamingNetwork:
    """Encoder or decoder network with the state of one clip.

    state: the last input frame of each MemBlock, by the index of its layer; a missing one means zeros.
    """

    def __init__(self, network: nn.Module):
        self._network = network
        self.state: dict[int, Tensor] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """Run the network: [B, n, C, h, w] -> [B, m, C', h', w']. Updates the state."""
        batch = x.shape[0]
        x = x.flatten(0, 1)
        for index, layer in enumerate(self._network.children()):
            if not isinstance(layer, MemBlock):
                x = layer(x)
                continue
            frames = x.unflatten(0, (batch, -1))
            last = self.state.get(index)
            if last is None:
                last = torch.zeros_like(frames[:, :1])
            elif last.shape != frames[:, :1].shape:
                raise InputError(
                    f"batch and size must not change within a clip: was {list(last.shape)} at layer {index},"
                    f" got {list(frames[:, :1].shape)}"
                )
            past = torch.cat((last, frames[:, :-1]), dim=1)
            self.state[index] = frames[:, -1:].clone()  # a view would keep all the frames alive
            x = layer(x, past.flatten(0, 1))
        return x.unflatten(0, (batch, -1))


class TAEHVDecoder:
    """The decoder of one clip. first: True until the first latent has been decoded."""

    def __init__(self, codec: TAEHV):
        self._codec = codec
        self._network = _StreamingNetwork(codec.networks["decoder"])
        self.first = True

    @property
    def state(self) -> dict[int, Tensor]:
        """The last input frame of each MemBlock, by the index of its layer."""
        return self._network.state

    @property
    def stateful_layers(self) -> list[int]:
        """The keys that `state` has after the first latent."""
        layers = self._codec.networks["decoder"].children()
        return [index for index, layer in enumerate(layers) if isinstance(layer, MemBlock)]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode the next latents [B, n, C, h, w] to float32 pixels [B, T, 3, 8h, 8w] in [-1, 1].

        T = 4 * n, and 3 fewer at the start of the clip, where the network also makes three frames before the first.
        """
        require_latents(latents, self._codec.latent_channels)
        pixels = self._network(latents.to(**self._codec._device_and_dtype))
        if self.first:
            pixels = pixels[:, self._codec.temporal_factor - 1 :]
            self.first = False
        return clamp_pixels(pixels.float(), 0) * 2 - 1


class TAEHVEncoder:
    """The encoder of one clip.

    The network pools each four frames to a latent, but a clip begins with a single one. That frame is repeated three
    times in front, so that latents and frames correspond as in the decoder and in the Wan VAE. (The public script
    repeats the last frame at the end instead: the same for a single frame, and shifted by three frames otherwise.)
    """

    def __init__(self, codec: TAEHV):
        self._codec = codec
        self._network = _StreamingNetwork(codec.networks["encoder"])
        self._first = True

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Encode the next frames [B, T, 3, height, width] in [-1, 1] to float32 latents [B, n, C, h, w].

        At the start of the clip T = 1 + 4 * k and n = 1 + k; after it T = 4 * k and n = k.
        """
        codec = self._codec
        require_pixels(pixels, codec.spatial_factor, codec.temporal_factor, first=self._first)
        pixels = pixels.to(**codec._device_and_dtype) * 0.5 + 0.5
        if self._first:
            padding = pixels[:, :1].expand(-1, codec.temporal_factor - 1, -1, -1, -1)
            pixels = torch.cat((padding, pixels), dim=1)
            self._first = False
        return self._network(pixels).float()
