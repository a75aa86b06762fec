"""Pixels that are not finite are an error that names the first latent frame, never a black or white video."""

import pytest
import torch

from cfpp_rt.codec.streaming import decode_stream
from cfpp_rt.codec.taehv import TAEHV
from cfpp_rt.config import RolloutConfig
from cfpp_rt.errors import InputError, NonFiniteError
from cfpp_rt.pipeline import Pipeline
from cfpp_rt.values import Latents
from cfpp_rt.world.codec import CHANNELS, PatchCodec

CODECS = ["world", "tiny", "wan"]


def codec_with(name: str, value: float):
    """A codec with random weights and one value in the biases of its last layer."""
    generator = torch.Generator().manual_seed(5)
    if name == "world":
        basis = torch.linalg.qr(torch.randn(192, CHANNELS, generator=generator))[0]
        mean = torch.zeros(192)
        mean[7] = value
        return PatchCodec(mean, basis, torch.ones(CHANNELS))
    if name == "tiny":
        torch.manual_seed(5)
        codec = TAEHV(CHANNELS, (8, 8, 8, 8), 8)
        codec.networks["decoder"][-1].bias[1] = value
        return codec
    pytest.importorskip("diffusers")
    from cfpp_rt.random_weights import random_vae

    codec = random_vae(1, torch.float32, torch.device("cpu"), base_dim=8)
    codec.vae.decoder.conv_out.bias[1] = value
    return codec


class BreaksAt:
    """A codec whose decoder makes one NaN in the second frame of a latent frame."""

    spatial_factor, temporal_factor, latent_channels = 8, 4, CHANNELS

    def __init__(self, latent_frame: int):
        self.codec, self.latent_frame = codec_with("tiny", 0.0), latent_frame

    def decoder(self):
        return _BreakingDecoder(self.codec.decoder(), self.latent_frame)


class _BreakingDecoder:
    def __init__(self, decoder, latent_frame):
        self.decoder, self.latent_frame, self.start = decoder, latent_frame, 0

    def decode(self, latents):
        pixels = self.decoder.decode(latents)
        frame = 1 + 4 * (self.latent_frame - 1) + 1 - self.start
        if 0 <= frame < pixels.shape[1]:
            pixels[0, frame, 1, 2, 3] = float("nan")
        self.start += pixels.shape[1]
        return pixels


def stream(model, codec, latent_frames: int = 6, ahead: int = 0, **options):
    embeds = torch.zeros(1, model.config.text_len, model.config.text_dim)
    num_frames = 1 + codec.temporal_factor * (latent_frames - 1)
    size = {"height": 32, "width": 48, "num_frames": num_frames}
    config = options.pop("config", RolloutConfig(window=3))
    return Pipeline(model, codec).stream(prompt_embeds=embeds, **size, config=config, ahead=ahead, **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", CODECS)
def test_one_bad_bias_of_a_codec_stops_every_runtime(model, name, value):
    codec = codec_with(name, value)
    for ahead in (0, 1):
        with pytest.raises(NonFiniteError, match="decoder of the codec produced NaN or infinity at latent frame 0$"):
            next(stream(model, codec, ahead=ahead))
    latents = torch.zeros(1, 2, CHANNELS, 4, 6)
    with pytest.raises(NonFiniteError, match="latent frame 0$"):
        next(decode_stream(codec, [Latents(latents, 0)]))
    with pytest.raises(NonFiniteError, match="latent frame 2$"):
        next(decode_stream(codec, [Latents(latents, 2)], prefix=latents))


@pytest.mark.parametrize("name", CODECS)
def test_finite_codecs_pass(model, name):
    assert sum(frames.pixels.shape[1] for frames in stream(model, codec_with(name, 0.5), 3)) > 2


@pytest.mark.parametrize("ahead", [0, 1, 3])
@pytest.mark.parametrize("latent_frame", [1, 3, 5])
def test_the_first_latent_frame_is_named_and_nothing_follows(model, latent_frame, ahead):
    made = stream(model, BreaksAt(latent_frame), ahead=ahead)
    delivered = []
    with pytest.raises(NonFiniteError, match=f"latent frame {latent_frame}$"):
        delivered.extend(frames.start for frames in made)
    assert len(delivered) == latent_frame and made.rollout.closed
    if not made.rollout.finished:
        with pytest.raises(InputError, match="was closed"):
            next(made)


def test_the_latent_frame_within_a_block_is_named(model):
    config = RolloutConfig(steps=(1000,), frames_per_block=3)
    with pytest.raises(NonFiniteError, match="latent frame 4$"):
        list(stream(model, BreaksAt(4), config=config))


@pytest.mark.parametrize("ahead", [1, 3])
def test_no_block_follows_latents_that_are_not_finite(model, ahead):
    made = stream(model, codec_with("world", 0.0), ahead=ahead, latent_frames=9)
    next(made)
    bias = model.head.head.bias
    before = bias.data.clone()
    try:
        bias.data.fill_(float("nan"))
        with pytest.raises(NonFiniteError, match="the model produced"):
            list(made)
    finally:
        bias.data.copy_(before)
    with pytest.raises(InputError, match="was closed|broke off"):
        next(made)
