"""The streaming decoder of the Wan VAE against that of diffusers: equal bits on the CPU, the error elsewhere."""

import importlib.util
import warnings

import pytest
import torch
from torch import Tensor

from cfpp_rt.codec.base import StreamingDecoder
from cfpp_rt.device.capture import Capture
from cfpp_rt.errors import InputError
from tests.closeness import assert_no_worse_than

pytest.importorskip("diffusers")
from diffusers import AutoencoderKLWan

from cfpp_rt.codec.wan import WanVAE
from cfpp_rt.codec.wan_decoder import ClipNetwork, ClipNetworkPool
from cfpp_rt.codec.wan_layers import LayerFactory, Layout, Size
from cfpp_rt.random_weights import random_vae

CPU = torch.device("cpu")
CHANNELS_LAST = Layout(channels_last=True, border=0, late_bias=True)  # as on CUDA


def make_latents(batch: int, frames: int, height: int = 3, width: int = 5, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, frames, 16, height, width, generator=generator)


def in_parts(decoder: StreamingDecoder, latents: Tensor) -> Tensor:
    """Decode latent by latent. (A pointwise convolution processes all latents of a call: other calls, other bits.)"""
    return torch.cat([decoder.decode(latent) for latent in latents.split(1, dim=1)], dim=1)


def library(codec: WanVAE, latents: Tensor) -> Tensor:
    return in_parts(codec.library_decoder(), latents)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("batch", "sizes"), [(1, [1, 1, 2]), (2, [2, 1])])
def test_the_bits_are_those_of_diffusers(dtype: torch.dtype, batch: int, sizes: list[int]):
    codec = random_vae(1, dtype, CPU, base_dim=8)
    latents = make_latents(batch, sum(sizes))
    theirs, ours = codec.library_decoder(), codec.decoder()
    for part in latents.split(sizes, dim=1):
        wanted, made = theirs.decode(part), ours.decode(part)
        assert made.dtype == torch.float32 and torch.equal(made, wanted)


def test_the_bits_are_those_of_diffusers_where_convolutions_take_other_kernels():
    """Wider and larger, where padding by the convolution would change bits."""
    codec = random_vae(2, torch.bfloat16, CPU, base_dim=32)
    latents = make_latents(1, 2, 4, 8)
    assert torch.equal(in_parts(codec.decoder(), latents), library(codec, latents))


@pytest.mark.parametrize(
    "config",
    [
        {"num_res_blocks": 1},
        {"dim_mult": [1, 2, 2, 4]},
        {"temperal_downsample": [True, False, True]},
        {"temperal_downsample": [True, True, False], "z_dim": 8, "latents_mean": [0.5] * 8, "latents_std": [2.0] * 8},
    ],
    ids=str,
)
def test_other_configs_of_the_same_shape(config: dict):
    torch.manual_seed(3)
    codec = WanVAE(AutoencoderKLWan(base_dim=8, **config))
    latents = make_latents(1, 3, 2, 3)[:, :, : codec.latent_channels]
    assert torch.equal(in_parts(codec.decoder(), latents), library(codec, latents))


def test_clips_can_be_interleaved():
    codec = random_vae(1, torch.float32, CPU, base_dim=8)
    clips = [make_latents(1, 3, 2, 3, seed=seed) for seed in range(2)]
    decoders = [codec.decoder() for _ in clips]
    parts = [[d.decode(c[:, f : f + 1]) for d, c in zip(decoders, clips, strict=True)] for f in range(3)]
    for clip, made in zip(clips, zip(*parts, strict=True), strict=True):
        assert torch.equal(torch.cat(made, dim=1), library(codec, clip))


def test_memory_is_reused_by_later_clips():
    codec = random_vae(1, torch.float32, CPU, base_dim=8)
    latents = make_latents(1, 2, 2, 3)
    wanted = library(codec, latents)
    first, second = codec.decoder(), codec.decoder()
    first.decode(make_latents(1, 3, 2, 3, seed=1))
    second.decode(latents[:, :1])
    networks = list(codec.networks.networks)
    assert len(networks) == 2
    del first
    with torch.inference_mode():
        for conv in networks[0]._layers.causal:
            conv.input_view(conv.buffer.shape[2] - 2).fill_(
                float("nan")
            )  # what the clip before left behind must not be read
    third = codec.decoder()
    assert torch.equal(in_parts(third, latents), wanted) and third._network is networks[0]
    assert torch.equal(second.decode(latents[:, 1:]), wanted[:, 1:])
    del third
    other = codec.decoder()
    other.decode(make_latents(1, 1, 3, 3))
    assert codec.networks.networks == [networks[1], other._network]  # another size: what is free goes first
    del second, other
    codec.release()
    assert codec.networks.networks == []


def test_a_clip_keeps_its_size():
    decoder = random_vae(1, torch.float32, CPU, base_dim=8).decoder()
    decoder.decode(make_latents(1, 1, 2, 3))
    with pytest.raises(InputError, match=r"latents must keep B, h, w = \(1, 2, 3\) within a clip, got \(1, 3, 2\)"):
        decoder.decode(make_latents(1, 1, 3, 2))


def test_the_memory_of_a_clip_at_480x832():
    """The figure in the docstring of `WanVAE.decoder`, for the published network in half precision."""
    with torch.device("meta"):
        vae = torch.nn.ModuleList([AutoencoderKLWan()]).to(torch.bfloat16)[0]
        networks = ClipNetworkPool(vae)
        network = ClipNetwork(vae.decoder, networks._conv_weights, (1, 60, 104), CHANNELS_LAST)
    assert network.num_bytes == pytest.approx(5.3e9, rel=0.01)


def test_works_across_inference_mode():
    """Memory made in inference mode serves a clip outside it, and the pixels are ordinary tensors."""
    codec = random_vae(1, torch.float32, CPU, base_dim=8)
    latents = make_latents(1, 2, 2, 3)
    with torch.inference_mode():
        wanted = codec.decode(latents)
    made = codec.decode(latents)
    assert torch.equal(made, wanted) and not made.is_inference()


def in_layout(codec: WanVAE, latents: Tensor, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    monkeypatch.setattr(Layout, "of", lambda device: layout)
    return in_parts(WanVAE(codec.vae).decoder(), latents)


@pytest.mark.parametrize("base_dim", [8, 12])  # 16 bytes at a time, and one value at a time
@pytest.mark.parametrize("batch", [1, 2])
def test_the_layout_of_cuda_is_right(monkeypatch, base_dim: int, batch: int):
    codec = random_vae(1, torch.float32, CPU, base_dim=base_dim)
    latents = make_latents(batch, 3, 2, 3)
    wide = random_vae(1, torch.float64, CPU, base_dim=base_dim)
    made = in_layout(codec, latents, CHANNELS_LAST, monkeypatch)
    assert_no_worse_than(made, library(codec, latents), library(wide, latents).double(), floor=1e-6, name="pixels")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs the kernel itself")
def test_the_kernel_of_cuda_writes_where_the_convolutions_read(monkeypatch):
    from cfpp_rt.ops.rms_silu_triton import rms_silu_ as kernel

    codec = random_vae(1, torch.float32, CPU, base_dim=8)
    latents = make_latents(2, 2, 2, 3)
    wanted = in_layout(codec, latents, CHANNELS_LAST, monkeypatch)
    monkeypatch.setattr("cfpp_rt.codec.wan_layers.rms_silu_", kernel)
    assert (in_layout(codec, latents, CHANNELS_LAST, monkeypatch) - wanted).abs().max() < 1e-4


def test_channels_last_buffers_are_what_the_kernels_need():
    codec = random_vae(1, torch.float32, CPU, base_dim=8)
    networks = ClipNetworkPool(codec.vae)
    layers = LayerFactory(networks._conv_weights, CHANNELS_LAST)
    conv = layers.causal_conv(codec.vae.decoder.conv_in, Size(2, 1, 4, 6))
    assert conv.buffer.is_contiguous(memory_format=torch.channels_last_3d)
    assert conv.input_view(1)[:1].is_contiguous(memory_format=torch.channels_last_3d)


def with_capture(codec: WanVAE, capture: Capture) -> WanVAE:
    made = WanVAE(codec.vae)
    made._networks = ClipNetworkPool(codec.vae, lambda device: capture)
    return made


def test_data_left_by_capture_is_not_read():
    """Capture runs the network on the buffers that the clip will use."""

    def capture(run):
        for _ in range(3):
            run()
        return run

    codec = random_vae(1, torch.float32, CPU, base_dim=8)
    latents = make_latents(1, 3, 2, 3)
    decoder = with_capture(codec, capture).decoder()
    assert torch.equal(in_parts(decoder, latents), library(codec, latents)) and decoder._network.captured


def test_a_capture_that_fails_warns_once_and_decoding_goes_on():
    def capture(run):
        run()
        raise RuntimeError("operation not permitted\nmore")

    codec = random_vae(1, torch.float32, CPU, base_dim=8)
    latents = make_latents(1, 2, 2, 3)
    refused = with_capture(codec, capture)
    with pytest.warns(
        RuntimeWarning, match="without CUDA graphs: capture failed: RuntimeError: operation not permitted$"
    ):
        made = in_parts(refused.decoder(), latents)
    other = refused.decoder()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.decode(make_latents(1, 1, 3, 3))
    assert torch.equal(made, library(codec, latents)) and not other._network.captured


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu_it_is_as_good_as_the_library(dtype: torch.dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # else it depends on the shape who uses it
    codec = random_vae(1, dtype, torch.device("cuda"), base_dim=32)
    wide = random_vae(1, torch.float64, CPU, base_dim=32)
    for parameter, source in zip(wide.vae.parameters(), codec.vae.parameters(), strict=True):
        parameter.copy_(source)  # the oracle has the rounded weights
    for batch in (1, 2):
        latents = make_latents(batch, 3)
        decoder = codec.decoder()
        made = in_parts(decoder, latents).cpu()
        assert decoder._network.captured
        assert_no_worse_than(
            made, library(codec, latents).cpu(), library(wide, latents).double(), floor=1e-6, name="pixels"
        )


@pytest.mark.gpu
def test_on_a_gpu_cuda_graphs_give_the_same_bits_for_interleaved_clips():
    codec = random_vae(1, torch.bfloat16, torch.device("cuda"), base_dim=32)
    eager = WanVAE(codec.vae, cuda_graphs=False)
    clips = [make_latents(1, 4, seed=seed) for seed in range(2)]
    wanted = [in_parts(eager.decoder(), clip) for clip in clips]
    for _ in range(2):  # the second time with the memory and the graphs of the first
        decoders = [codec.decoder() for _ in clips]
        parts = [[d.decode(c[:, f : f + 1]) for d, c in zip(decoders, clips, strict=True)] for f in range(4)]
        for clip, made in zip(wanted, zip(*parts, strict=True), strict=True):
            assert torch.equal(torch.cat(made, dim=1), clip)
        assert all(decoder._network.captured for decoder in decoders)
        del decoders
    assert len(codec.networks.networks) == 2
