import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cfpp_rt.codec.streaming import decode_stream, to_uint8
from cfpp_rt.codec.wan_names import infer_config, to_diffusers
from cfpp_rt.core.frame_counts import first_frame
from cfpp_rt.errors import CheckpointError, InputError
from cfpp_rt.values import Latents

pytest.importorskip("diffusers")
from cfpp_rt.codec.wan import WanVAE

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def vectors():
    return load_file(DATA / "codec_vectors.safetensors")


@pytest.fixture(scope="module")
def state():
    """A small VAE in the names of `Wan2.1_VAE.pth`."""
    return {name: tensor.float() for name, tensor in load_file(DATA / "vae_weights.safetensors").items()}


@pytest.fixture(scope="module")
def wan_folder(tmp_path_factory, state):
    folder = tmp_path_factory.mktemp("wan")
    torch.save(state, folder / "Wan2.1_VAE.pth")
    return folder


@pytest.fixture(scope="module")
def codec(wan_folder):
    return WanVAE.from_pretrained(wan_folder)


@pytest.fixture(scope="module")
def pixels(vectors):
    """[1, 13, 3, 48, 64]."""
    return vectors["vae.pixels"].transpose(1, 2)


def difference(a, b) -> float:
    assert a.shape == b.shape and a.dtype == b.dtype == torch.float32
    return (a - b).abs().max().item()


def test_decode_agrees_with_the_reference(codec, vectors):
    assert difference(codec.decode(vectors["vae.latent"]), vectors["vae.frames"]) < 1e-4


def test_encode_agrees_with_the_reference(codec, vectors, pixels):
    assert difference(codec.encode(pixels), vectors["vae.encoded"]) < 1e-4


@pytest.mark.parametrize("sizes", [[1, 1, 1, 1], [1, 3], [2, 2]])
def test_streaming_decode_equals_decoding_the_clip_at_once(codec, vectors, sizes):
    decoder = codec.decoder()
    parts = [decoder.decode(latent) for latent in vectors["vae.latent"].split(sizes, dim=1)]
    assert [part.shape[1] for part in parts] == [4 * sizes[0] - 3] + [4 * size for size in sizes[1:]]
    streamed = torch.cat(parts, dim=1)
    assert difference(streamed, vectors["vae.frames"]) < 1e-4
    assert torch.equal(streamed, codec.decode(vectors["vae.latent"]))


@pytest.mark.parametrize("sizes", [[1, 4, 4, 4], [5, 8]])
def test_streaming_encode_equals_encoding_the_clip_at_once(codec, vectors, pixels, sizes):
    encoder = codec.encoder()
    streamed = torch.cat([encoder.encode(part) for part in pixels.split(sizes, dim=1)], dim=1)
    assert difference(streamed, vectors["vae.encoded"]) < 1e-4
    assert torch.equal(streamed, codec.encode(pixels))


def test_clips_do_not_share_state(codec, vectors, pixels):
    latents = vectors["vae.latent"]
    first, second = codec.decoder(), codec.decoder()
    made = [(first.decode(part), second.decode(part)) for part in latents.split(1, dim=1)]
    codec.encode(pixels[:, :5])
    for decoder_parts in zip(*made, strict=True):
        assert torch.equal(torch.cat(decoder_parts, dim=1), codec.decode(latents))


def test_no_gradients_and_half_precision(wan_folder, vectors, pixels):
    codec = WanVAE.from_pretrained(wan_folder, dtype=torch.bfloat16)
    assert codec.dtype == torch.bfloat16
    decoded = codec.decode(vectors["vae.latent"].requires_grad_())
    assert not decoded.requires_grad and difference(decoded, vectors["vae.frames"]) < 0.25
    assert difference(codec.encode(pixels), vectors["vae.encoded"]) < 0.1


def test_other_layouts(tmp_path, codec, state, vectors):
    """The diffusers model directory, its VAE folder, and single files in both kinds of names."""
    codec.vae.save_pretrained(tmp_path / "model" / "vae")
    save_file(state, tmp_path / "original.safetensors")
    paths = [tmp_path / "model", tmp_path / "model" / "vae", tmp_path / "original.safetensors"]
    paths.append(tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors")
    wanted = codec.decode(vectors["vae.latent"][:, :2])
    for path in paths:
        assert torch.equal(WanVAE.from_pretrained(path).decode(vectors["vae.latent"][:, :2]), wanted)


def test_config_from_shapes(state):
    meta = json.loads((DATA / "codec_meta.json").read_text())["vae"]
    assert infer_config(state, Path("file")) == {
        "base_dim": meta["dim"],
        "z_dim": meta["z_dim"],
        "dim_mult": meta["dim_mult"],
        "num_res_blocks": meta["num_res_blocks"],
        "temperal_downsample": meta["temporal_downsample"],
    }


def test_names_agree_with_diffusers_own_table(state):
    convert = pytest.importorskip("diffusers.loaders.single_file_utils").convert_wan_vae_to_diffusers
    theirs, ours = convert(dict(state)), to_diffusers(state)
    assert ours.keys() == theirs.keys() and all(ours[name] is theirs[name] for name in ours)


def test_wrong_files(tmp_path, state):
    def load(changes, drop=()):
        torch.save({n: t for n, t in {**state, **changes}.items() if n not in drop}, tmp_path / "Wan2.1_VAE.pth")
        return WanVAE.from_pretrained(tmp_path)

    with pytest.raises(CheckpointError, match="has neither Wan2.1_VAE.pth nor"):
        WanVAE.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="Wan2.1_VAE.pth: missing: encoder.norm_out.gamma"):
        load({}, drop=["encoder.head.0.gamma"])
    with pytest.raises(CheckpointError, match="not a Wan2.1 VAE: it has no conv2.weight"):
        load({}, drop=["conv2.weight"])
    with pytest.raises(CheckpointError, match="unexpected: extra"):
        load({"extra": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"conv_in.bias must be \[32\], got \[3\]"):
        load({"decoder.conv1.bias": torch.zeros(3)})
    with pytest.raises(CheckpointError, match="a VAE of another model"):  # without upsampling over time
        load({}, drop=[f"encoder.downsamples.{n}.time_conv.weight" for n in (5, 8)])


def test_wrong_inputs(codec, vectors, pixels):
    with pytest.raises(
        InputError, match=r"latents must be float \[B, n, 16, h, w\], got torch.float32 \[4, 16, 6, 8\]"
    ):
        codec.decode(vectors["vae.latent"][0])
    for bad in (pixels[:, :4], pixels[:, :0], pixels[..., :60], pixels.to(torch.uint8)):
        with pytest.raises(InputError):
            codec.encode(bad)
    encoder = codec.encoder()
    encoder.encode(pixels[:, :1])
    with pytest.raises(InputError, match=r"must have 4 \* k frames, got 1"):
        encoder.encode(pixels[:, :1])


def test_to_uint8_truncates_and_clamps():
    values = torch.tensor([-2.0, -1.0, 0.0, 0.9999, 1.0, 3.0])
    pixels = to_uint8(values.view(1, 1, 1, 1, 6).expand(1, 2, 3, 1, 6))
    assert pixels.shape == (1, 2, 1, 6, 3) and pixels.dtype == torch.uint8 and pixels.is_contiguous()
    assert pixels[0, 1, 0, :, 2].tolist() == [0, 0, 127, 254, 255, 255]


def test_decode_stream(codec, vectors):
    latents = vectors["vae.latent"]
    blocks = [Latents(latents[:, :1], 0), Latents(latents[:, 1:3], 1), Latents(latents[:, 3:], 3)]
    frames = list(decode_stream(codec, iter(blocks)))
    assert [(f.start, f.pixels.shape[1]) for f in frames] == [(0, 1), (1, 8), (9, 4)]
    assert [first_frame(n, 4) for n in range(4)] == [0, 1, 5, 9]
    joined = torch.cat([f.pixels for f in frames], dim=1)
    assert torch.equal(joined, to_uint8(codec.decode(latents)))

    resumed = list(decode_stream(codec, blocks[1:], prefix=latents[:, :1]))
    assert [f.start for f in resumed] == [1, 9]
    assert torch.equal(torch.cat([f.pixels for f in resumed], dim=1), joined[:, 1:])
    with pytest.raises(InputError, match="wanted latent frame 1, got 3"):
        list(decode_stream(codec, [blocks[0], blocks[2]]))


def test_decode_stream_is_lazy(codec, vectors):
    taken = []

    def blocks():
        for start in range(4):
            taken.append(start)
            yield Latents(vectors["vae.latent"][:, start : start + 1], start)

    stream = decode_stream(codec, blocks())
    next(stream)
    assert taken == [0]
