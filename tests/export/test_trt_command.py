"""`cfpp export tensorrt` as a user meets it: one command from student to engines, and no engine of a wrong graph."""

import json
import re
from pathlib import Path

import pytest
import torch

from cfpp_rt.cli.main import main
from cfpp_rt.export import commands, parity
from cfpp_rt.export.trt import build
from cfpp_rt.export.trt.bundle import open_engine_bundle
from cfpp_rt.export.trt.library import load_library
from cfpp_rt.export.trt.messages import FAULTS
from tests.export.needs import needs_tensorrt

pytestmark = needs_tensorrt
pytest.importorskip("onnxruntime", reason="pip install 'cfpp-rt[onnx]'")
DOCS = Path(__file__).parents[2] / "docs" / "tensorrt.md"


def command(output, *extra):
    student = ("--random-weights", "--size", "32x48", "--parity-size", "32x48", "--window", "3", "--frames", "17")
    return ["export", "tensorrt", *student, "--targets", "sm89", "--output", str(output), *extra]


def fault(capsys, arguments):
    """Run a command that must fail: exit code 2, one line on stderr. Returns the line."""
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1 and "Traceback" not in err, err
    return err


@pytest.mark.slow
def test_a_student_to_engines(tmp_path, capsys):
    assert main(command(tmp_path / "engines", "--graphs", "step", "fused", "--keep-onnx", str(tmp_path / "onnx"))) == 0
    said = capsys.readouterr().out
    assert "rollout" in said and "sm89 fused: " in said and "engines for sm89" in said
    opened = open_engine_bundle(
        tmp_path / "engines", architecture="sm89", library="tensorrt-rtx", version=load_library("tensorrt-rtx").version
    )
    assert set(opened.engines) == {"step", "fused"}
    assert opened.card.sizes.dtype == "bfloat16" and opened.card.sizes.latent_size == (4, 6)
    result = opened.values["parity"]
    assert result["passed"] and result["dtype"] == "float32" and result["rollout"]["ring_wraps"]
    assert result["worst"]["max_error"] <= 1e-4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engines", "onnx"]
    assert json.loads((tmp_path / "onnx" / "card.json").read_text())["sizes"] == opened.values["student"]["sizes"]


def test_a_graph_that_disagrees_is_never_built(tmp_path, capsys, monkeypatch):
    """One weight of the exported graphs is not the model's: the comparison sees it, and no builder starts."""
    export = parity.export_onnx

    def spoil(model, *arguments, **options):
        kept = model.blocks[1].self_attn.v.weight[0].clone()
        with torch.no_grad():
            model.blocks[1].self_attn.v.weight[0] += 0.05
            export(model, *arguments, **options)
            model.blocks[1].self_attn.v.weight[0] = kept

    monkeypatch.setattr(parity, "export_onnx", spoil)
    monkeypatch.setattr(build, "build_engine", lambda *arguments, **options: pytest.fail("an engine was built"))
    assert "does not agree with PyTorch" in fault(capsys, command(tmp_path / "engines"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options,wanted",
    [(["--size", "32x48"], (4, 6)), (["--size", "480x832"], (8, 12)), (["--parity-size", "16x16"], (2, 2))],
)
def test_the_comparison_is_at_the_size_that_the_student_knows_or_smaller(tmp_path, monkeypatch, options, wanted):
    """Away from the size that it was trained at, a rollout magnifies rounding: the world's failed its gate at 64x96."""

    class Stop(Exception):
        pass

    def compare(*student, latent_size, **rest):
        assert latent_size == wanted
        raise Stop

    monkeypatch.setattr(commands, "require_parity", compare)
    with pytest.raises(Stop):
        main(["export", "tensorrt", "--random-weights", *options, "--targets", "sm89", "-o", str(tmp_path / "engines")])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "extra,message",
    [
        (["--targets", "sm90"], "no target for data centre GPUs after sm80"),
        (["--targets", "sm89", "sm89"], "different architectures"),
        (["--output", str(Path(__file__).parent)], "--output must be a new folder"),
        (["--keep-onnx", str(Path(__file__).parent)], "--keep-onnx must be a new folder"),
        (["--output", "/nowhere/engines"], "got /nowhere/engines, in a folder that does not exist"),
        (["--linear-dtype", "float8_e4m3", "--targets", "sm86"], "targets must be sm89 or newer for linears in float8"),
        (["--parity-size", "30x48"], "--parity-size must be HEIGHTxWIDTH in multiples of 8, got 30x48"),
        (["--graphs", "leap"], "graphs must be some of embed_time"),
        (["--timing-cache", "tactics"], "timing_cache must be None with tensorrt-rtx"),
        (["--time-limit", "0"], "--time-limit must be a number > 0, got 0"),
        (["--tiny-vae", "x.pth"], "--tiny-vae is of no use here"),
    ],
)
def test_what_cannot_be_built_is_refused_before_any_work(tmp_path, capsys, monkeypatch, extra, message):
    monkeypatch.setattr(parity, "verify", lambda *arguments, **options: pytest.fail("the comparison was started"))
    assert message in fault(capsys, command(tmp_path / "engines", *extra))
    assert not list(tmp_path.iterdir())


def test_the_page_explains_every_known_fault():
    page = " ".join(DOCS.read_text(encoding="utf-8").split())
    for meaning in FAULTS.values():
        assert meaning in page, meaning
    assert re.search(r"TensorRT-RTX 1\.7\.1", page)
