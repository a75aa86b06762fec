from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cfpp_rt.codec.taehv import TAEHV
from cfpp_rt.errors import CheckpointError, InputError

VECTORS = Path(__file__).parent / "data" / "taehv_vectors.safetensors"


@pytest.fixture(scope="module")
def vectors():
    return load_file(VECTORS)


@pytest.fixture(scope="module")
def state(vectors):
    return {name.removeprefix("weights."): t.float() for name, t in vectors.items() if name.startswith("weights.")}


@pytest.fixture(scope="module")
def codec(state):
    return TAEHV.from_state_dict(dict(state))


def difference(a, b) -> float:
    assert a.shape == b.shape and a.dtype == b.dtype == torch.float32
    return (a - b).abs().max().item()


def in_parts(step, values, sizes):
    return torch.cat([step(part) for part in values.split(sizes, dim=1)], dim=1)


def test_agrees_with_the_public_implementation(codec, vectors):
    assert difference(codec.decode(vectors["latents"]), vectors["frames"]) < 1e-5
    assert difference(codec.encode(vectors["pixels"]), vectors["encoded"]) < 1e-5


@pytest.mark.parametrize("sizes", [[1, 1, 1], [2, 1], [1, 2]])
def test_streaming_equals_the_clip_at_once(codec, vectors, sizes):
    decoded = in_parts(codec.decoder().decode, vectors["latents"], sizes)
    assert difference(decoded, vectors["frames"]) < 1e-5
    frames = [4 * n for n in sizes]
    frames[0] -= 3
    assert difference(in_parts(codec.encoder().encode, vectors["pixels"], frames), vectors["encoded"]) < 1e-5


def test_the_past_matters_and_clips_are_independent(codec, vectors):
    latents = vectors["latents"]
    first, second = codec.decoder(), codec.decoder()
    first.decode(latents[:, :1])
    second.decode(latents[:, 1:2])
    assert difference(first.decode(latents[:, 1:2]), codec.decode(latents[:, :2])[:, 1:]) < 1e-5
    assert difference(second.decode(latents[:, 2:3]), codec.decode(latents)[:, 5:]) > 1e-3


def test_rows_are_independent(codec, vectors):
    latents = torch.cat([vectors["latents"], vectors["latents"].flip(1)])
    both = codec.decode(latents)
    assert difference(both[:1], vectors["frames"]) < 1e-5
    assert difference(both[1:], codec.decode(latents[1:])) < 1e-5


def test_names_and_shapes_of_the_public_file():
    """The names and shapes of `taew2_1.pth`: 23 layers of a decoder, 18 of an encoder."""
    with torch.device("meta"):
        names = {n.removeprefix("networks."): tuple(t.shape) for n, t in TAEHV().state_dict().items()}
    wanted = {"decoder.1.weight": (256, 16, 3, 3), "decoder.1.bias": (256,)}
    wanted |= {"decoder.22.weight": (3, 64, 3, 3), "decoder.22.bias": (3,)}
    wanted |= {"encoder.0.weight": (64, 3, 3, 3), "encoder.0.bias": (64,)}
    wanted |= {"encoder.17.weight": (16, 64, 3, 3), "encoder.17.bias": (16,)}

    def memory_blocks(prefix, first, width):
        for index in range(first, first + 3):
            for conv, width_in in ((0, 2 * width), (2, width), (4, width)):
                wanted[f"{prefix}.{index}.conv.{conv}.weight"] = (width, width_in, 3, 3)
                wanted[f"{prefix}.{index}.conv.{conv}.bias"] = (width,)

    for first, width, grown, out in ((3, 256, 256, 128), (9, 128, 256, 64), (15, 64, 128, 64)):
        memory_blocks("decoder", first, width)
        wanted[f"decoder.{first + 4}.conv.weight"] = (grown, width, 1, 1)
        wanted[f"decoder.{first + 5}.weight"] = (out, width, 3, 3)
    for first, joined in ((2, 128), (7, 128), (12, 64)):
        wanted[f"encoder.{first}.conv.weight"] = (64, joined, 1, 1)
        wanted[f"encoder.{first + 1}.weight"] = (64, 64, 3, 3)
        memory_blocks("encoder", first + 2, 64)
    assert names == wanted


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_from_pretrained(tmp_path, state, vectors, suffix):
    path = tmp_path / f"taew2_1{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    assert difference(TAEHV.from_pretrained(path).decode(vectors["latents"]), vectors["frames"]) < 1e-5
    half = TAEHV.from_pretrained(path, dtype=torch.bfloat16).decode(vectors["latents"])
    assert difference(half, vectors["frames"]) < 0.02


def test_weights_for_more_frames_keep_the_last(state, codec):
    name = "decoder.7.conv.weight"
    more = {**state, name: torch.cat([torch.randn_like(state[name]), state[name]])}
    assert torch.equal(TAEHV.from_state_dict(more).state_dict()[f"networks.{name}"], state[name])


def test_wrong_files_and_inputs(state, codec, vectors):
    with pytest.raises(CheckpointError, match="taehv.pth: not the tiny autoencoder of Wan2.1: no decoder.1.weight"):
        TAEHV.from_state_dict({"a": torch.zeros(1)}, "taehv.pth")
    patched = {**state, "decoder.22.weight": torch.zeros(12, 5, 3, 3), "decoder.22.bias": torch.zeros(12)}
    with pytest.raises(CheckpointError, match="decoder.22.weight must be"):
        TAEHV.from_state_dict(patched, "taew2_2.pth")
    with pytest.raises(InputError, match=r"latents must be float \[B, n, 16, h, w\]"):
        codec.decode(vectors["latents"].transpose(1, 2))
    with pytest.raises(InputError, match=r"1 \+ 4 \* k frames, got 4"):
        codec.encode(vectors["pixels"][:, :4])
    decoder = codec.decoder()
    decoder.decode(vectors["latents"])
    with pytest.raises(InputError, match="must not change within a clip"):
        decoder.decode(vectors["latents"][..., :2])
