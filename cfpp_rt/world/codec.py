"""The frame codec of the world: it projects every 8 x 8 patch of a frame onto 16 principal directions.

The world is drawn from few sprites, so its patches are close to a linear subspace. Singular value decomposition gives
its principal directions; every latent channel is scaled to the same standard deviation.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cfpp_rt.codec.base import clamp_pixels, require_latents, require_pixels
from cfpp_rt.errors import InputError
from cfpp_rt.io.checkpoint import read_tensors, require_exact
from cfpp_rt.world.policy import Wanderer
from cfpp_rt.world.simulator import Simulator
from cfpp_rt.world.sprites import TILE, render

CHANNELS = 16
_PATCH = 3 * TILE * TILE


class PatchCodec:
    """A linear `Codec` with one latent frame per frame. It has no state and is its own streaming encoder and decoder.

    The latent of a patch (rows, columns, RGB in [-1, 1]) is (patch - mean) basis / scale.
    mean: float32 [192].
    basis: float32 [192, 16], orthonormal columns.
    scale: float32 [16], > 0.
    """

    temporal_factor = 1
    spatial_factor = TILE
    latent_channels = CHANNELS

    def __init__(self, mean: Tensor, basis: Tensor, scale: Tensor):
        self.mean, self.basis, self.scale = mean, basis, scale

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "PatchCodec":
        """Load a codec. Raise CheckpointError for a file that is not such a codec."""
        state = read_tensors(path)
        require_exact(state, {"mean": (_PATCH,), "basis": (_PATCH, CHANNELS), "scale": (CHANNELS,)}, path)
        return cls(*(state[name].to(device, torch.float32) for name in ("mean", "basis", "scale")))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors that `load` reads from a file."""
        return {"mean": self.mean, "basis": self.basis, "scale": self.scale}

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels [B, T, 3, height, width] in [-1, 1] to float32 latents [B, T, 16, height / 8, width / 8]."""
        require_pixels(pixels, TILE, 1, first=True)
        patches = _patches(pixels.to(self.mean))
        return ((patches - self.mean) @ self.basis / self.scale).movedim(-1, 2)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents [B, F, 16, h, w] to float32 pixels [B, F, 3, 8h, 8w] in [-1, 1]."""
        require_latents(latents, CHANNELS)
        patches = (latents.to(self.mean).movedim(2, -1) * self.scale) @ self.basis.T + self.mean
        patches = clamp_pixels(patches, -1).unflatten(-1, (TILE, TILE, 3))  # [B, F, h, w, row, column, RGB]
        return patches.permute(0, 1, 6, 2, 4, 3, 5).flatten(3, 4).flatten(4, 5)

    def decoder(self) -> "PatchCodec":
        return self

    def encoder(self) -> "PatchCodec":
        return self


def fit_codec(seed: int, *, episodes: int = 512, num_frames: int = 64) -> PatchCodec:
    """Fit a codec to frames that the simulator renders with this seed.

    Raise InputError if they have too few distinct patches for 16 directions.
    """
    simulator = Simulator([seed + episode for episode in range(episodes)])
    wanderer = Wanderer(seed, episodes)
    frames = [render(simulator.state)]
    for _ in range(num_frames - 1):
        frames.append(render(simulator.step(wanderer(simulator.state))))
    distinct, counts = _distinct(np.stack(frames, axis=1))
    if len(distinct) <= CHANNELS:
        raise InputError(f"episodes and num_frames must show more than {CHANNELS} patches, got {len(distinct)}")
    # The square root keeps rare patches (a crate half over a gate) from being lost beside the floor.
    weights = counts.double().pow(0.5)
    weights /= weights.sum()
    mean = weights @ distinct.double()
    _, spread, basis = torch.linalg.svd((distinct - mean) * weights.sqrt()[:, None], full_matrices=False)
    return PatchCodec(mean.float(), basis[:CHANNELS].T.float().contiguous(), spread[:CHANNELS].float())


def _distinct(frames: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
    """Return the distinct patches of frames [B, T, height, width, 3], float32 [n, 192] sorted, and their counts."""
    batch, num_frames, height, width, _ = frames.shape
    tiles = frames.reshape(batch, num_frames, height // TILE, TILE, width // TILE, TILE * 3).swapaxes(3, 4)
    rows = np.ascontiguousarray(tiles).reshape(-1, _PATCH)
    # Sorting hashes of 64 bits is much faster than sorting a million rows. The assertion below shows that no two
    # different rows have the same hash.
    rng = np.random.Generator(np.random.Philox(key=0))
    factors = rng.integers(0, 2**63, _PATCH // 8, dtype=np.uint64) | np.uint64(1)
    hashes = (rows.view(np.uint64) * factors).sum(axis=1, dtype=np.uint64)
    _, first, places, counts = np.unique(hashes, return_index=True, return_inverse=True, return_counts=True)
    assert np.array_equal(rows[first][places], rows)
    unsorted = torch.from_numpy(rows[first]).float() / 127.5 - 1
    distinct, order = unsorted.unique(dim=0, return_inverse=True)
    return distinct, torch.zeros(len(unsorted), dtype=torch.int64).scatter_(0, order, torch.from_numpy(counts))


def to_pixels(frames: NDArray[np.uint8]) -> Tensor:
    """Convert frames uint8 [B, T, height, width, 3] to pixels float32 [B, T, 3, height, width] in [-1, 1]."""
    return torch.from_numpy(frames).movedim(-1, 2).float() / 127.5 - 1


def _patches(pixels: Tensor) -> Tensor:
    """Cut pixels [B, T, 3, height, width] into patches [B, T, h, w, 192] (rows, columns, RGB)."""
    tiles = pixels.unflatten(4, (-1, TILE)).unflatten(3, (-1, TILE))  # [B, T, RGB, h, row, w, column]
    return tiles.permute(0, 1, 3, 5, 4, 6, 2).flatten(4)
