"""The frame codec against frames of episodes that it was not fitted to."""

import numpy as np
import pytest
import torch

from cfpp_rt.errors import CheckpointError, InputError
from cfpp_rt.world.codec import PatchCodec, fit_codec, to_pixels
from cfpp_rt.world.policy import Wanderer
from cfpp_rt.world.simulator import Simulator
from cfpp_rt.world.sprites import render


@pytest.fixture(scope="module")
def codec():
    return fit_codec(0, episodes=64)


@pytest.fixture(scope="module")
def pixels():
    simulator, wanderer = Simulator([10**6 + i for i in range(16)]), Wanderer(1, 16)
    return to_pixels(np.stack([render(simulator.step(wanderer(simulator.state))) for _ in range(20)], axis=1))


def test_unseen_frames_are_reconstructed(codec, pixels):
    latents = codec.encode(pixels)
    assert latents.shape == (16, 20, 16, 6, 6) and latents.dtype == torch.float32
    error = (codec.decode(latents) - pixels) / 2
    assert -10 * torch.log10(error.square().mean()) > 40  # dB
    assert error.unflatten(4, (6, 8)).unflatten(3, (6, 8)).square().mean(dim=(2, 4, 6)).max() < 0.02  # the worst patch


def test_a_latent_comes_back_where_the_pixels_do_not_saturate(codec):
    latents = 0.05 * torch.randn(2, 3, 16, 6, 6)
    torch.testing.assert_close(codec.encode(codec.decode(latents)), latents, atol=1e-4, rtol=0)


def test_tiles_keep_their_places(codec, pixels):
    latents = codec.encode(pixels)
    latents[:, :, :, 2, 4] = codec.encode(pixels)[:, :, :, 0, 0]
    changed = (codec.decode(latents) - codec.decode(codec.encode(pixels))).abs().amax(dim=(0, 1, 2)) > 1e-6
    assert changed.any()
    changed[16:24, 32:40] = False
    assert not changed.any()


def test_file_round_trip_and_a_file_of_something_else(codec, tmp_path):
    from safetensors.torch import save_file

    save_file(codec.state_dict(), tmp_path / "codec.safetensors")
    read = PatchCodec.load(tmp_path / "codec.safetensors")
    assert all(torch.equal(value, codec.state_dict()[name]) for name, value in read.state_dict().items())
    save_file({"mean": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="other.safetensors: missing"):
        PatchCodec.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize("shape", [(1, 2, 3, 47, 48), (1, 2, 1, 48, 48), (2, 3, 48, 48)])
def test_wrong_sizes_are_refused(codec, shape):
    with pytest.raises(InputError):
        codec.encode(torch.zeros(shape))
