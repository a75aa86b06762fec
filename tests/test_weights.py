"""Every public layout loads to the same tensors; anything else is refused with its name, key and shapes."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from cfpp_rt.config import MODELS, ModelConfig
from cfpp_rt.errors import CheckpointError, InputError
from cfpp_rt.export.convert import convert
from cfpp_rt.model.transformer import CausalWanTransformer
from cfpp_rt.model.weights import infer_config, load_model, read_weights

FSDP = "model._fsdp_wrapped_module."


def prefixed(weights, prefix):
    return {prefix + name: tensor for name, tensor in weights.items()}


def block_wrapped(weights):
    """Names as FSDP and checkpoint wrapping of every block, and torch.compile, leave them."""
    return {
        f"model._orig_mod.{n.replace('blocks.0.', 'blocks.0._checkpoint_wrapped_module.')}": t
        for n, t in weights.items()
    }


@pytest.mark.parametrize(
    "content",
    [
        lambda w: {"generator_ema": prefixed(w, FSDP)},
        lambda w: {"generator": prefixed(w, "model.")},
        lambda w: {
            "generator": prefixed({k: t * 0 for k, t in w.items()}, "model."),
            "generator_ema": prefixed(w, FSDP),
        },
        lambda w: {"generator": block_wrapped(w)},
        lambda w: prefixed(w, FSDP),
        lambda w: w,
    ],
    ids=["ema-fsdp", "generator", "ema-preferred", "compiled", "bare-fsdp", "bare"],
)
def test_pt_containers(tmp_path, weights, config, content):
    torch.save(content(weights), tmp_path / "student.pt")
    state, _ = read_weights(tmp_path / "student.pt", config=config)
    assert state.keys() == weights.keys() and all(torch.equal(state[k], weights[k]) for k in weights)


def test_key_chooses_the_entry(tmp_path, weights, config):
    zero = {k: t * 0 for k, t in weights.items()}
    torch.save({"generator": zero, "generator_ema": weights}, tmp_path / "a.pt")
    state, _ = read_weights(tmp_path / "a.pt", config=config, key="generator")
    assert not state["head.head.weight"].any()
    with pytest.raises(CheckpointError, match="wanted key 'critic', found generator, generator_ema"):
        read_weights(tmp_path / "a.pt", config=config, key="critic")


def test_wan_directory_whole_and_in_shards(tmp_path, weights, config):
    names = sorted(weights)
    for folder, parts in (("whole", [names]), ("shards", [names[:30], names[30:]])):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps({"_class_name": "WanModel", **config.to_dict()}))
        index = {}
        for i, part in enumerate(parts):
            single = len(parts) == 1
            file = "diffusion_pytorch_model" + (".safetensors" if single else f"-0000{i}-of-00002.safetensors")
            save_file({n: weights[n] for n in part}, tmp_path / folder / file)
            index |= dict.fromkeys(part, file)
        if len(parts) > 1:
            target = tmp_path / folder / "diffusion_pytorch_model.safetensors.index.json"
            target.write_text(json.dumps({"weight_map": index}))
        state, found = read_weights(tmp_path / folder)
        assert found == config and all(torch.equal(state[n], weights[n]) for n in names)


def test_diffusers_layout_computes_the_same(tmp_path, weights, config):
    """The names are diffusers' own: its model with these weights gives the same velocity as ours."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.WanTransformer3DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
    )
    theirs.save_pretrained(tmp_path / "transformer")
    settings = json.loads((tmp_path / "transformer" / "config.json").read_text())
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({**settings, "text_len": config.text_len}))
    state, found = read_weights(tmp_path)
    assert found == config and state.keys() == weights.keys()
    latents = torch.randn(1, 2, 16, 4, 6)
    embeds = torch.randn(1, config.text_len, config.text_dim)
    with torch.no_grad():
        expected = theirs(latents.transpose(1, 2), torch.tensor([500]), embeds).sample.transpose(1, 2)
    from tests import plain_model

    ours = plain_model.velocity(
        state,
        config,
        latents,
        torch.full((2,), 500.0),
        [0, 1],
        torch.ones(2, 2, dtype=torch.bool),
        embeds,
        torch.float32,
    )
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


def test_convert_round_trip(tmp_path, weights, config):
    torch.save({"generator_ema": prefixed(weights, FSDP)}, tmp_path / "student.pt")
    target = tmp_path / "student.safetensors"
    parameters, _ = convert(tmp_path / "student.pt", target, dtype=torch.bfloat16, config=config)
    assert parameters == sum(t.numel() for t in weights.values())
    state, found = read_weights(target)
    assert found == config, "the config lies beside the weights"
    assert all(torch.equal(state[n], weights[n].bfloat16()) for n in weights)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["student.json", "student.pt", "student.safetensors"]


def test_convert_leaves_nothing_half_written(tmp_path, weights, config):
    state = dict(weights)
    state.pop("head.head.bias")
    torch.save(state, tmp_path / "student.pt")
    with pytest.raises(CheckpointError):
        convert(tmp_path / "student.pt", tmp_path / "out.safetensors", config=config)
    assert [p.name for p in tmp_path.iterdir()] == ["student.pt"]
    with pytest.raises(InputError, match="must end in .safetensors, got out.pt"):
        convert(tmp_path / "student.pt", tmp_path / "out.pt", config=config)


def test_wrong_names_and_shapes_are_named(tmp_path, weights, config):
    def refuse(state, message):
        save_file(state, tmp_path / "bad.safetensors")
        with pytest.raises(CheckpointError, match=message):
            read_weights(tmp_path / "bad.safetensors", config=config)

    missing = {k: t for k, t in weights.items() if k != "blocks.1.ffn.0.bias"}
    refuse(missing, r"bad\.safetensors.*blocks\.1\.ffn\.0\.bias")
    refuse({**weights, "blocks.9.extra": torch.zeros(1)}, r"blocks\.9\.extra")
    refuse({**weights, "head.head.bias": torch.zeros(65)}, r"head\.head\.bias.*64.*65")


def test_ambiguous_and_odd_tensors_are_refused(tmp_path, weights, config):
    def refuse(state, message):
        torch.save(state, tmp_path / "bad.pt")
        with pytest.raises(CheckpointError, match=message):
            read_weights(tmp_path / "bad.pt", config=config)

    refuse({**weights, "model.head.modulation": weights["head.modulation"]}, "several tensors have the same name")
    refuse({**weights, "head.head.bias": torch.zeros(64, dtype=torch.bool)}, "not a dense float: head.head.bias")
    refuse({**weights, "head.head.bias": torch.zeros(64).to_sparse()}, "not a dense float: head.head.bias")
    refuse({0: torch.zeros(1)}, "wanted a state dict")


def test_a_dict_of_something_else_is_refused(tmp_path):
    torch.save({"optimizer": {"step": 3}}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="other.pt: wanted a state dict"):
        read_weights(tmp_path / "other.pt")
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="not a causal Wan transformer"):
        read_weights(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="diffusion_pytorch_model.safetensors: no such file"):
        read_weights(tmp_path)


def test_sizes_are_read_off_the_tensors(weights, config):
    found = infer_config(weights, "here")
    assert found == ModelConfig(**{**config.to_dict(), "patch_size": config.patch_size, "text_len": 512})


@pytest.mark.parametrize(
    "name,tensors,parameters",
    [
        ("wan-1.3b", 825, 1_418_996_800),
        ("wan-1.3b-camera", 885, 1_489_821_760),
        ("wan-14b", 1095, 14_288_491_584),
    ],
)
def test_presets_have_the_published_sizes(name, tensors, parameters):
    with torch.device("meta"):
        shapes = [p.numel() for p in CausalWanTransformer(MODELS[name]).parameters()]
    assert (len(shapes), sum(shapes)) == (tensors, parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_load_model_takes_the_dtype(tmp_path, weights, config, dtype):
    save_file(weights, tmp_path / "m.safetensors")
    model = load_model(tmp_path / "m.safetensors", config=config, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype} and not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert load_file(tmp_path / "m.safetensors")["head.head.bias"].dtype == torch.float32


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"dim": 0}, "dim must be an integer >= 1, got 0"),
        ({"dim": 100, "num_heads": 3}, "dim must be num_heads=3 times an even head size"),
        ({"patch_size": (2, 2, 2)}, "patch_size must be"),
        ({"qk_norm": False}, "qk_norm"),
        ({"camera": 1}, "camera must be true or false, got 1"),
        ({"camera": True, "dim": 60, "num_heads": 6}, "camera needs a head size that is a multiple of 4, got 10"),
    ],
)
def test_bad_sizes_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        ModelConfig(**changes)


def test_a_broken_config_file_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="config.json"):
        ModelConfig.from_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text('{"dim": "wide"}')
    with pytest.raises(InputError, match="dim must be an integer"):
        ModelConfig.from_json(tmp_path / "config.json")
