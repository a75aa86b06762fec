"""All graphs of a small student become engines of three architectures, of the structure that was meant."""

import shutil

import pytest

from cfpp_rt.errors import InputError
from cfpp_rt.export.contract import PASSES
from cfpp_rt.export.trt.build import build_engine, build_engine_bundle
from cfpp_rt.export.trt.bundle import open_engine_bundle
from cfpp_rt.export.trt.check_network import check_network
from cfpp_rt.export.trt.library import load_library
from cfpp_rt.export.trt.parser import parse, weight_bytes
from tests.export.needs import needs_tensorrt
from tests.export.students import ROLLING, TINY, WORLD, exported

pytestmark = needs_tensorrt


@pytest.mark.slow
def test_engines_of_a_student_for_three_architectures(tmp_path):
    source = exported(tmp_path / "graphs", dtype="bfloat16")
    targets, said = ("sm80", "sm89", "sm120"), []
    build_engine_bundle(
        source, tmp_path / "bundle", {"max": 0.0}, targets=targets, library="tensorrt-rtx", log=said.append
    )
    version = load_library("tensorrt-rtx").version
    for target in targets:
        opened = open_engine_bundle(tmp_path / "bundle", architecture=target, library="tensorrt-rtx", version=version)
        assert opened.card == source.card and opened.values["parity"] == {"max": 0.0}
        assert set(opened.engines) == {"embed_time", "embed_text", *PASSES}
        for name, path in opened.engines.items():
            engine = path.read_bytes()
            assert f"accelerators={{{target} }}".encode() in engine
            assert len(engine) > weight_bytes(source.path(name)), "the weights are inside"
        facts = opened.values["engines"][target]
        assert [facts[name]["self_attentions"] for name in PASSES] == [2, 1, 2]
        assert [facts[name]["cross_attentions"] for name in PASSES] == [2, 1, 2]
        assert "valid length set on 2 attentions, from valid" in facts["step"]["notes"]
    assert len(said) == 15 and said[0].startswith("sm80 embed_text: ")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "config,rollout,batch",
    [
        (TINY, ROLLING, 1),
        (WORLD, ROLLING.replace(sinks=0), 1),
        (TINY, ROLLING, 2),
        (TINY, ROLLING.replace(frames_per_block=3, window=6, sinks=3), 1),
    ],
)
def test_every_pass_is_proven(tmp_path, config, rollout, batch, dtype):
    """Text and actions, batches and blocks: one fused attention per site, each cache updated once and in place."""
    library = load_library("tensorrt-rtx")
    source = exported(tmp_path / "graphs", config, rollout, dtype, batch=batch)
    for name in PASSES:
        report = check_network(library, parse(library, source.path(name)), source.card.graphs[name])
        layers = 1 if name == "refresh" else 2  # its last layer stops at keys and values
        assert [site.key_cache for site in report.sites] == [f"keys.{layer}" for layer in range(layers)]
        assert [site.value_cache for site in report.sites] == [f"values.{layer}" for layer in range(layers)]
        assert {site.validity for site in report.sites} == {"visible" if name == "fused" else "valid"}
        assert report.cross_attentions == (layers if config.text_len else 0)


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_that_forgets_what_is_valid_is_refused(tmp_path, name):
    """A fault planted in a real student: one attention of the exported graph loses its length or mask."""
    import onnx

    source = exported(tmp_path / "graphs")
    graph = onnx.load(source.path(name), load_external_data=False)
    victim = next(node for node in graph.graph.node if node.op_type == "Attention" and "self_attn" in node.name)
    del victim.input[3:]
    onnx.save(graph, source.path(name))
    library = load_library("tensorrt-rtx")
    with pytest.raises(InputError, match="attention blocks.0.self_attn.* sees the whole cache"):
        check_network(library, parse(library, source.path(name)), source.card.graphs[name])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("student") / "graphs")


@pytest.mark.parametrize(
    "options,message",
    [
        ({"targets": ("sm89", "sm90")}, "no target for data centre GPUs"),
        ({"targets": ()}, "different architectures, got none"),
        ({"targets": ("sm89", "sm89")}, "different architectures, got sm89, sm89"),
        ({"graphs": ("step", "leap")}, "graphs must be some of embed_time, .*, fused, got leap"),
        ({"time_limit_s": 0.0}, "stopped after 0 s"),
        ({"library": "tensorrt", "targets": ("sm89",)}, "tensorrt"),
    ],
)
def test_a_bundle_that_cannot_be_made_leaves_nothing(tmp_path, source, options, message):
    with pytest.raises((InputError, ImportError), match=message):
        build_engine_bundle(
            source, tmp_path / "bundle", {}, **{"targets": ("sm89",), "library": "tensorrt-rtx", **options}
        )
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line(tmp_path, source, monkeypatch):
    class Full:
        free = 2**20

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: Full)
        with pytest.raises(InputError, match="the disk has 1 MiB free"):
            build_engine_bundle(source, tmp_path / "bundle", {}, targets=("sm89",), library="tensorrt-rtx")
    assert not list(tmp_path.iterdir())


def test_a_failed_engine_takes_the_others_with_it(tmp_path, source, monkeypatch):
    def fail_at_last(job, **options):
        if job.engine.endswith("fused.engine"):
            raise InputError("engine for sm89: the builder crashed")
        return build_engine(job, **options)

    monkeypatch.setattr("cfpp_rt.export.trt.build.build_engine", fail_at_last)
    with pytest.raises(InputError, match="crashed"):
        build_engine_bundle(
            source, tmp_path / "x", {}, targets=("sm89",), graphs=("embed_time", "fused"), library="tensorrt-rtx"
        )
    assert not list(tmp_path.iterdir())
