"""All graphs of a small student become engines of three architectures, of the structure that was meant."""

import dataclasses

import pytest
import torch

from cfpp_rt.config import ModelConfig
from cfpp_rt.errors import InputError
from cfpp_rt.export.contract import PASSES, Sizes, network_graphs
from cfpp_rt.export.trt.bundle import open_bundle
from cfpp_rt.export.trt.library import load_library
from cfpp_rt.export.trt.make import make_bundle
from cfpp_rt.export.trt.network import parse, weight_bytes
from cfpp_rt.export.trt.prove import prove
from cfpp_rt.model.transformer import random_model
from tests.export.needs import needs_tensorrt

pytestmark = needs_tensorrt

TINY = ModelConfig(dim=64, ffn_dim=128, num_heads=2, num_layers=2, freq_dim=16, text_dim=32, text_len=8)
WORLD = dataclasses.replace(TINY, text_len=0, num_actions=5)


def export(folder, config, dtype, **sizes):
    """The graphs of a random model; returns their contract."""
    import onnx

    from cfpp_rt.export.graphs import build_graph
    from cfpp_rt.export.onnx_graph import WeightFile

    folder.mkdir()
    usual = {"batch": 1, "latent_size": (4, 6), "block": 1, "sinks": 1, "ring": 3}
    sizes = Sizes(config, **{**usual, **sizes}, timesteps=2, dtype=dtype)
    model = random_model(config, seed=0, dtype=getattr(torch, dtype))
    specs = network_graphs(sizes)
    with WeightFile(folder / "weights.bin", dtype) as weights:
        for name, spec in specs.items():
            times = torch.tensor([1000.0, 0.0], dtype=torch.float64)
            onnx.save(build_graph(model, sizes, spec, weights, times), folder / f"{name}.onnx")
    return specs


@pytest.mark.slow
def test_engines_of_a_student_for_three_architectures(tmp_path):
    specs = export(tmp_path / "graphs", TINY, "bfloat16")
    targets = ("sm80", "sm89", "sm120")
    card = make_bundle(tmp_path / "graphs", tmp_path / "bundle", specs, {}, targets=targets, library="tensorrt-rtx")
    for target in targets:
        opened = open_bundle(
            tmp_path / "bundle", architecture=target, library="tensorrt-rtx", version=card["library_version"]
        )
        assert set(opened.engines) == {"embed_time", "embed_text", *PASSES}
        for name, path in opened.engines.items():
            engine = path.read_bytes()
            assert f"accelerators={{{target} }}".encode() in engine
            assert len(engine) > weight_bytes(tmp_path / "graphs" / f"{name}.onnx"), "the weights are inside"
        facts = opened.card["engines"][target]
        assert [facts[name]["self_attentions"] for name in PASSES] == [2, 1, 2]
        assert [facts[name]["cross_attentions"] for name in PASSES] == [2, 1, 2]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "config,sizes", [(TINY, {}), (WORLD, {"sinks": 0}), (TINY, {"batch": 2}), (TINY, {"block": 3, "sinks": 3})]
)
def test_every_pass_is_proven(tmp_path, config, sizes, dtype):
    """Text and actions, batches and blocks: one fused attention per site, each cache updated once and in place."""
    library = load_library("tensorrt-rtx")
    specs = export(tmp_path / "graphs", config, dtype, **sizes)
    for name in PASSES:
        report = prove(library, parse(library, tmp_path / "graphs" / f"{name}.onnx"), specs[name])
        layers = 1 if name == "refresh" else 2  # its last layer stops at keys and values
        assert [site.key_cache for site in report.sites] == [f"keys.{layer}" for layer in range(layers)]
        assert [site.value_cache for site in report.sites] == [f"values.{layer}" for layer in range(layers)]
        assert {site.validity for site in report.sites} == {"visible" if name == "fused" else "valid"}
        assert report.cross_attentions == (layers if config.text_len else 0)


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_without_its_validity_is_refused(tmp_path, name):
    """The planted fault of a whole student: one attention of the exported graph forgets its length or mask."""
    import onnx

    specs = export(tmp_path / "graphs", TINY, "float16")
    path = tmp_path / "graphs" / f"{name}.onnx"
    graph = onnx.load(path, load_external_data=False)
    victim = next(node for node in graph.graph.node if node.op_type == "Attention" and "self_attn" in node.name)
    del victim.input[3:]
    onnx.save(graph, path)
    library = load_library("tensorrt-rtx")
    with pytest.raises(InputError, match="attention blocks.0.self_attn.* sees the whole cache"):
        prove(library, parse(library, path), specs[name])
