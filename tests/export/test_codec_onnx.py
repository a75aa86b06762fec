"""Streaming decoders as graphs: frame by frame what the codec makes of all frames at once."""

import numpy as np
import pytest
import torch

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from cfpp_rt.codec.streaming import to_uint8
from cfpp_rt.codec.taehv import TAEHV
from cfpp_rt.config import RolloutConfig
from cfpp_rt.errors import InputError, NonFiniteError
from cfpp_rt.export.bundle import open_bundle
from cfpp_rt.export.bundle_stream import BundleDecoder, BundleStream
from cfpp_rt.export.bundle_stream import to_uint8 as to_uint8_without_torch
from cfpp_rt.export.codec_onnx import export_decoder
from cfpp_rt.export.contract import Sizes
from cfpp_rt.export.export_bundle import export_onnx
from cfpp_rt.export.onnx_runner import OnnxRunner
from cfpp_rt.export.parity import verify
from cfpp_rt.model.transformer import random_model
from cfpp_rt.world.codec import PatchCodec
from tests.test_actions import ACTING

RUN = RolloutConfig(steps=(1000, 500), window=3)


def tiny():
    torch.manual_seed(0)
    return TAEHV(16, (16, 8, 8, 8), 8)


def patches():
    generator = torch.Generator().manual_seed(0)
    mean, basis = torch.zeros(192), torch.linalg.qr(torch.randn(192, 16, generator=generator))[0]
    return PatchCodec(mean, basis, torch.full((16,), 0.1))


def wan():
    pytest.importorskip("diffusers")
    from cfpp_rt.random_weights import random_pipeline

    return random_pipeline(RolloutConfig(), dtype=torch.float32, device=torch.device("cpu")).codec


@pytest.mark.parametrize(
    "make", [patches, pytest.param(tiny, marks=pytest.mark.slow), pytest.param(wan, marks=pytest.mark.slow)]
)
def test_a_bundle_decodes_as_its_codec(tmp_path, make):
    codec, model = make(), random_model(ACTING, seed=0, dtype=torch.float32)
    export_onnx(model, RUN, tmp_path / "b", latent_size=(4, 4), latent_frames=None, codec=codec)
    runner = OnnxRunner(tmp_path / "b", threads=1)
    latents = torch.randn(1, 5, 16, 4, 4, generator=torch.Generator().manual_seed(1))
    decoder = BundleDecoder(runner)
    made = [decoder.decode(part.numpy()) for part in latents.split([1, 3, 1], dim=1)]
    np.testing.assert_allclose(np.concatenate(made, axis=1), codec.decode(latents).numpy(), rtol=0, atol=2e-5)
    stream = BundleStream(runner, latent_frames=5, initial_latents=latents[:, :1].numpy())
    pixels = [frames.pixels for frames in stream]
    assert np.concatenate(pixels, 1).shape == (1, 1 + 4 * codec.temporal_factor, 32, 32, 3)
    np.testing.assert_array_equal(pixels[0], to_uint8(codec.decode(latents[:, :1])).numpy())
    report = verify(open_bundle(tmp_path / "b"), model, codec=codec, threads=1)
    assert report["passed"] and (report["rollout"]["psnr_db"] or 99) > 60
    assert [entry["tensor"] for entry in report["tensors"] if entry["graph"] == "decoder"] == ["pixels"]


@pytest.mark.slow
def test_the_same_decoder_gives_the_same_bytes(tmp_path):
    sizes = Sizes(ACTING, 1, (2, 2), 1, 0, 3, 3, "float32")
    for name in "ab":
        (tmp_path / name).mkdir()
        export_decoder(tiny(), sizes, tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_pixels_are_those_of_the_runtime():
    pixels = torch.rand(2, 3, 3, 4, 5, generator=torch.Generator().manual_seed(0)) * 2.2 - 1.1
    np.testing.assert_array_equal(to_uint8_without_torch(pixels.numpy()), to_uint8(pixels).numpy())


def test_another_codec_is_refused_and_leaves_nothing(tmp_path):
    model = random_model(ACTING, seed=0, dtype=torch.float32)
    with pytest.raises(InputError, match="codec must have 16 latent channels, got 4"):
        export_onnx(model, RUN, tmp_path / "b", latent_size=(4, 4), latent_frames=None, codec=TAEHV(4, (8, 8, 8, 8), 8))
    assert not list(tmp_path.iterdir())


def test_a_bundle_without_a_decoder_says_so(tmp_path):
    model = random_model(ACTING, seed=0, dtype=torch.float32)
    export_onnx(model, RUN, tmp_path / "b", latent_size=(4, 4), latent_frames=None)
    with pytest.raises(InputError, match="has no decoder: export it with a codec"):
        BundleStream(OnnxRunner(tmp_path / "b"), latent_frames=2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("make", [patches, pytest.param(tiny, marks=pytest.mark.slow)])
def test_pixels_that_are_not_finite_stop_a_bundle(tmp_path, make, value):
    codec, model = make(), random_model(ACTING, seed=0, dtype=torch.float32)
    (codec.mean if make is patches else codec.networks["decoder"][-1].bias)[1] = value
    export_onnx(model, RUN, tmp_path / "b", latent_size=(4, 4), latent_frames=None, codec=codec)
    runner = OnnxRunner(tmp_path / "b", threads=1)
    with pytest.raises(NonFiniteError, match="decoder of the codec produced NaN or infinity at latent frame 0$"):
        next(BundleStream(runner, latent_frames=5))


def test_the_latent_frame_of_a_bundle_is_named_and_nothing_follows(tmp_path):
    model = random_model(ACTING, seed=0, dtype=torch.float32)
    export_onnx(model, RUN, tmp_path / "b", latent_size=(4, 4), latent_frames=None, codec=patches())
    decoder = BundleDecoder(OnnxRunner(tmp_path / "b", threads=1))
    latents = np.zeros((1, 3, 16, 4, 4), np.float32)
    decoder.decode(latents)
    latents[0, 2, 5] = np.inf
    with pytest.raises(NonFiniteError, match="latent frame 5$"):
        decoder.decode(latents)
    with pytest.raises(InputError, match="broke off at latent frame 5: start another"):
        decoder.decode(latents)
