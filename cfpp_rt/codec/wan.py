"""The Wan2.1 VAE: weights and encoder of diffusers' `AutoencoderKLWan`, and a streaming decoder of this project.

diffusers keeps the state of the causal convolutions inside the model, which allows one clip at a time, and drops it
after each call. But its networks also take that state as an argument. So here the state belongs to one object per clip:
`WanEncoder`, and `LibraryDecoder`, which export traces and with which tests compare `WanDecoder`.
"""

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cfpp_rt.codec.base import clamp_pixels, require_latents, require_pixels
from cfpp_rt.codec.wan_decoder import ClipNetwork, ClipNetworkPool
from cfpp_rt.codec.wan_names import infer_config, to_diffusers
from cfpp_rt.device.capture import CudaCapture
from cfpp_rt.errors import CheckpointError, InputError, MissingExtraError
from cfpp_rt.io.checkpoint import read_sharded, read_tensors, require_exact

ORIGINAL_FILES = ("Wan2.1_VAE.pth", "Wan2.1_VAE.safetensors")
_DIFFUSERS_STEM = "diffusion_pytorch_model"


class WanVAE:
    """The Wan2.1 VAE as a `Codec`: 16 latent channels, 8 x 8 pixels and 4 frames per latent.

    vae: an `AutoencoderKLWan`; used in its own dtype on its own device, without gradients and without storing the state
        of a clip. Latents in and out are normalised with the statistics in its config.
    cuda_graphs: on CUDA, decode by CUDA graphs.
    """

    temporal_factor = 4
    spatial_factor = 8

    def __init__(self, vae: Any, *, cuda_graphs: bool = True):
        self.vae = vae.eval().requires_grad_(False)
        self.latent_channels: int = vae.config.z_dim
        shape = (1, 1, self.latent_channels, 1, 1)
        self._mean = torch.tensor(vae.config.latents_mean, device=self.device).view(shape)
        self._std = torch.tensor(vae.config.latents_std, device=self.device).view(shape)
        self._cuda_graphs = cuda_graphs
        self._networks: ClipNetworkPool | None = None
        # Older diffusers do not have this argument: there an empty state alone marks the first latent.
        self.takes_first_chunk = "first_chunk" in inspect.signature(vae.decoder.forward).parameters

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "WanVAE":
        """Load the VAE.

        path: Wan2.1 directory (`Wan2.1_VAE.pth`), a diffusers model directory (`vae/`) or its `vae` folder, or one
            weights file in original or diffusers names.
        dtype, device: of the loaded weights.

        Raises CheckpointError if the file is missing, broken or of another model, MissingExtraError without diffusers.
        """
        try:
            from diffusers import AutoencoderKLWan
        except ImportError as error:
            raise MissingExtraError("diffusers", "wan", "the Wan VAE") from error
        source, config, state = _read(Path(path))
        try:
            with torch.device("meta"):
                vae = AutoencoderKLWan.from_config(config)
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            raise CheckpointError(f"{source}: no AutoencoderKLWan can be made from its config ({error})") from error
        _require_wan21(vae.config, source)
        require_exact(state, {name: tensor.shape for name, tensor in vae.state_dict().items()}, source)
        vae.load_state_dict({name: t.to(device=device, dtype=dtype) for name, t in state.items()}, assign=True)
        return cls(vae)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.vae.post_quant_conv.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.vae.post_quant_conv.weight.dtype

    def decode(self, latents: Tensor) -> Tensor:
        """Decode an entire clip: latents [B, F, 16, h, w] to float32 pixels [B, 1 + 4 * (F - 1), 3, 8h, 8w]."""
        return self.decoder().decode(latents)

    def decoder(self) -> "WanDecoder":
        """Return a decoder at the start of a clip.

        At its first latent it takes memory: 5.3 GB at 480x832 in half precision, and on CUDA that of its CUDA graphs.
        Once it is garbage-collected, the next decoder of the same size reuses the memory; see `release`.
        """
        return WanDecoder(self)

    def library_decoder(self) -> "LibraryDecoder":
        """Return the decoder of diffusers at the start of a clip: the same pixels, slower."""
        return LibraryDecoder(self)

    @property
    def networks(self) -> ClipNetworkPool:
        """The networks of the decoders, created at the first access."""
        if self._networks is None:
            self._networks = ClipNetworkPool(self.vae, CudaCapture if self._cuda_graphs else None)
        return self._networks

    def release(self) -> None:
        """Free the memory of decoders that are garbage-collected."""
        if self._networks is not None:
            self._networks.release()

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode an entire clip: pixels [B, 1 + 4 * k, 3, height, width] in [-1, 1] to latents [B, 1 + k, 16, h, w].

        The latents are the normalised means of the posterior, float32: no sampling, as in the published code.
        """
        return self.encoder().encode(pixels)

    def encoder(self) -> "WanEncoder":
        """Return an encoder at the start of a clip."""
        return WanEncoder(self)

    def denormalise(self, latents: Tensor) -> Tensor:
        """Convert normalised latents [B, n, C, h, w] to the input of the decoder, [B, C, n, h, w] in its dtype."""
        values = latents.to(device=self.device, dtype=torch.float32) * self._std + self._mean
        return values.to(self.dtype).transpose(1, 2)

    def normalise(self, moments: Tensor) -> Tensor:
        """Convert mean and log-variance [B, 2C, n, h, w] to normalised float32 latents [B, n, C, h, w]."""
        mean = moments[:, : self.latent_channels].transpose(1, 2).float()
        return (mean - self._mean) / self._std


def _empty_state(network: nn.Module) -> list[Any]:
    """Return an empty entry per 3-D convolution; the entries of a few pointwise convolutions stay unused."""
    return [None] * sum(isinstance(module, nn.Conv3d) for module in network.modules())


class WanDecoder:
    """The decoder of one clip. first: True until the first latent has been decoded."""

    def __init__(self, codec: WanVAE):
        self._codec = codec
        self._network: ClipNetwork | None = None
        self.first = True

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode the next latents [B, n, 16, h, w] to float32 pixels [B, T, 3, 8h, 8w] in [-1, 1].

        T = 4 * n, and 3 fewer at the start of the clip. Raises InputError if B, h or w change within a clip.
        """
        codec = self._codec
        require_latents(latents, codec.latent_channels)
        clip_size = (latents.shape[0], latents.shape[3], latents.shape[4])
        if self._network is None:
            self._network = codec.networks.acquire(self, clip_size)
        elif self._network.clip_size != clip_size:
            raise InputError(f"latents must keep B, h, w = {self._network.clip_size} within a clip, got {clip_size}")
        values = codec.vae.post_quant_conv(codec.denormalise(latents))
        factor = codec.temporal_factor
        height, width = (codec.spatial_factor * side for side in clip_size[1:])
        num_frames = factor * latents.shape[1] - (factor - 1 if self.first else 0)
        pixels = torch.empty(latents.shape[0], num_frames, 3, height, width, device=codec.device)
        decoded = 0
        with torch.inference_mode():
            for latent in values.split(1, dim=2):
                frames = self._network.decode(latent, first=self.first).transpose(1, 2)
                pixels[:, decoded : decoded + frames.shape[1]] = clamp_pixels(frames.float(), -1)
                decoded += frames.shape[1]
                self.first = False
        return pixels


class LibraryDecoder:
    """The decoder of diffusers for one clip.

    state: the last two input frames of each causal convolution, in the form that diffusers uses; None = not set yet.
    first: True until the first latent has been decoded.
    """

    def __init__(self, codec: WanVAE):
        self._codec = codec
        self.state = _empty_state(codec.vae.decoder)
        self.first = True

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode the next latents [B, n, 16, h, w] to float32 pixels [B, T, 3, 8h, 8w] in [-1, 1].

        T = 4 * n, and 3 fewer at the start of the clip. B, h and w must stay the same within a clip.
        """
        codec = self._codec
        require_latents(latents, codec.latent_channels)
        values = codec.vae.post_quant_conv(codec.denormalise(latents))
        frames = []
        for latent in values.split(1, dim=2):
            # The upsamplers over time recognise the first latent by an empty state; zeros in it would not do.
            first = {"first_chunk": self.first} if codec.takes_first_chunk else {}
            frames.append(codec.vae.decoder(latent, feat_cache=self.state, feat_idx=[0], **first))
            self.first = False
        return clamp_pixels(torch.cat(frames, dim=2).transpose(1, 2).float(), -1)


class WanEncoder:
    """The encoder of one clip; its state is that of the causal convolutions of diffusers."""

    def __init__(self, codec: WanVAE):
        self._codec = codec
        self._state = _empty_state(codec.vae.encoder)
        self._first = True

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Encode the next frames [B, T, 3, height, width] in [-1, 1] to normalised float32 latents [B, n, 16, h, w].

        At the start of the clip T = 1 + 4 * k and n = 1 + k; after it T = 4 * k and n = k.
        """
        codec = self._codec
        require_pixels(pixels, codec.spatial_factor, codec.temporal_factor, first=self._first)
        values = pixels.to(device=codec.device, dtype=codec.dtype).transpose(1, 2)
        groups: list[Tensor] = []
        if self._first:
            groups, values = [values[:, :, :1]], values[:, :, 1:]
            self._first = False
        groups += [group for group in values.split(codec.temporal_factor, dim=2) if group.shape[2]]
        moments = [codec.vae.encoder(group, feat_cache=self._state, feat_idx=[0]) for group in groups]
        return codec.normalise(codec.vae.quant_conv(torch.cat(moments, dim=2)))


def _read(path: Path) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """Return the file or folder that was read, the diffusers config and the state dict in diffusers names."""
    if path.is_dir():
        original = next((path / name for name in ORIGINAL_FILES if (path / name).exists()), None)
        folder = next((f for f in (path / "vae", path) if (f / "config.json").exists()), None)
        if original is None and folder is not None and _is_wan_config(folder):
            return folder, _read_config(folder), read_sharded(folder, _DIFFUSERS_STEM)
        if original is None:
            raise CheckpointError(f"{path}: has neither {ORIGINAL_FILES[0]} nor vae/config.json of a Wan VAE")
        path = original
    state = read_tensors(path)
    if "decoder.conv_in.weight" in state:
        beside = path.parent / "config.json"
        return path, _read_config(path.parent) if beside.exists() else {}, state
    return path, infer_config(state, path), to_diffusers(state)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / 'config.json'}: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{folder / 'config.json'}: must contain a mapping, got {type(config).__name__}")
    return config


def _is_wan_config(folder: Path) -> bool:
    return _read_config(folder).get("_class_name") == "AutoencoderKLWan"


def _require_wan21(config: Any, source: Path) -> None:
    levels, halvings = len(config.dim_mult), sum(map(bool, config.temperal_downsample))
    if getattr(config, "is_residual", False) or getattr(config, "patch_size", None) or (levels, halvings) != (4, 2):
        raise CheckpointError(
            f"{source}: a VAE of another model: that of Wan2.1 has 8 x 8 pixels and 4 frames per latent"
        )
    if len(config.latents_mean) != config.z_dim:
        raise CheckpointError(f"{source}: {config.z_dim} latent channels, statistics for {len(config.latents_mean)}")
