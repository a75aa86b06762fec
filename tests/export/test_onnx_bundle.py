"""The exporter and its bundles: valid, deterministic, complete or not at all; damage is found and named in one line."""

import json
import shutil
import subprocess
import sys
import tracemalloc

import pytest
import torch

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from cfpp_rt.cli.main import main
from cfpp_rt.config import RolloutConfig
from cfpp_rt.errors import InputError
from cfpp_rt.export.bundle import CARD, WEIGHTS, Card, open_bundle
from cfpp_rt.export.export_bundle import export_onnx, make_card
from cfpp_rt.model.transformer import random_model
from tests.test_actions import ACTING
from tests.test_cli import fault

RUN = RolloutConfig(steps=(1000, 500), window=3)


def export(folder, dtype=torch.float32, run=RUN, **options):
    model = random_model(ACTING, seed=0, dtype=dtype)
    return export_onnx(model, run, folder, **{"latent_size": (4, 4), "latent_frames": None, **options})


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle") / "acting"
    export(folder)
    return folder


@pytest.fixture
def copied(bundle, tmp_path):
    return shutil.copytree(bundle, tmp_path / "copy")


def test_the_same_student_gives_the_same_bytes(bundle, tmp_path):
    export(tmp_path / "again")
    names = sorted(path.name for path in bundle.iterdir())
    assert names == [CARD, "embed_time.onnx", "fused.onnx", "refresh.onnx", "step.onnx", WEIGHTS]
    for name in names:
        assert (bundle / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_graphs_are_what_the_contract_says(tmp_path, dtype):
    """One Attention per layer, one TensorScatter per cache, opset 24, no custom operators: in every dtype."""
    card = export(tmp_path / "b", dtype)
    attentions = {"step": 2, "refresh": 1, "fused": 2, "embed_time": 0}
    for name, spec in card.graphs.items():
        model = onnx.load(tmp_path / "b" / f"{name}.onnx", load_external_data=False)
        kinds = [node.op_type for node in model.graph.node]
        assert {(entry.domain, entry.version) for entry in model.opset_import} == {("", 24)}
        assert not model.functions and {node.domain for node in model.graph.node} == {""}
        assert kinds.count("Attention") == attentions[name] and kinds.count("TensorScatter") == len(spec.aliases)
        assert [value.name for value in model.graph.input] == [tensor.name for tensor in spec.inputs]
        assert [value.name for value in model.graph.output] == [tensor.name for tensor in spec.outputs]


def test_the_card_tells_all_that_the_exporter_knew(bundle):
    values = json.loads((bundle / CARD).read_text())
    card = Card.from_dict(values)
    assert card.sizes.model == ACTING and card.config == RUN and card.sizes.slots == 3
    assert [card.timesteps[step.timestep] for step in card.steps] == pytest.approx([1000.0, 833.333], abs=1e-2)
    assert [step.sigma for step in card.steps] == pytest.approx([1.0, 0.83333], abs=1e-4)
    assert values["about"]["versions"].keys() == {"cfpp_rt", "onnx", "opset"}


@pytest.mark.parametrize(
    "run,options,message",
    [
        (RUN.replace(kv_dtype="float8_e4m3"), {}, "kv_dtype must be None"),
        (RolloutConfig(frames_per_block=2, window=3), {}, "whole blocks of 2 frames.*got window=3"),
        (RolloutConfig(), {}, "window must be given for a rollout without end"),
        (RolloutConfig(frames_per_block=3), {"latent_frames": 4}, "latent_frames must be a multiple >= 3"),
        (RUN, {"latent_size": (5, 4)}, "multiple of the patch"),
        (RUN, {"batch": 0}, "batch must be an integer >= 1"),
    ],
)
def test_what_the_graphs_do_not_cover_is_refused(tmp_path, run, options, message):
    with pytest.raises(InputError, match=message):
        export(tmp_path / "b", run=run, **options)
    assert not list(tmp_path.iterdir())


def test_a_bundle_is_never_written_over(copied):
    with pytest.raises(InputError, match="exists already"):
        export(copied)


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(InputError, match="needs 6[0-9] MiB, a margin included, the disk has 1 MiB free"):
        export(tmp_path / "b")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch):
    def full(weights, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cfpp_rt.export.graph_builder.WeightFile._write", full)
    with pytest.raises(InputError, match="no space left on the disk"):
        export(tmp_path / "b")
    assert not list(tmp_path.iterdir())


def change_card(folder, **changes):
    values = json.loads((folder / CARD).read_text())
    values.update(changes)
    (folder / CARD).write_text(json.dumps(values))


def test_a_wrong_card_is_named(copied, tmp_path):
    with pytest.raises(InputError, match="no bundle, it has no card.json"):
        open_bundle(tmp_path)
    complete = (copied / CARD).read_text()
    for text, message in (
        (complete[:100], "truncated or no card"),
        ("[]", "must be the card of a"),
        (complete.replace("ONNX bundle", "other"), "must be the card of a"),
        (complete.replace('"format_version": 2', '"format_version": 9'), "format_version must be 2, got 9"),
        (
            complete.replace('"linear_dtype": null', '"linear_dtype": "int4"'),
            "linear_dtype must be None or float8_e4m3, got 'int4'",
        ),
        (complete.replace('"rollout"', '"rolled"'), "does not fit together: lacks 'rollout'"),
        (complete.replace('"dim": 128', '"dim": 127'), "does not fit together: dim must be"),
        (complete.replace('"context": 2', '"context": 7'), "timesteps must be"),
        (complete.replace('"sigma": 1.0', '"sigma": NaN'), "sigma of a step must be in 0..1"),
        (complete.replace('"sigma": 1.0', '"sigma": "one"'), "does not fit together: could not convert"),
        (complete.replace('"temporal_factor": 1', '"temporal_factor": 0'), "temporal_factor must be >= 1, got 0"),
        (complete.replace('"fused.onnx"', '"../fused.onnx"'), "files must list fused.onnx"),
    ):
        assert text != complete, message
        (copied / CARD).write_text(text)
        with pytest.raises(InputError, match=message):
            open_bundle(copied)


def test_a_card_of_other_sizes_does_not_load(copied):
    from cfpp_rt.export.bundle_rollout import BundleRollout
    from cfpp_rt.export.onnx_runner import OnnxRunner

    sizes = json.loads((copied / CARD).read_text())["sizes"]
    change_card(copied, sizes={**sizes, "latent_size": [4, 8]})
    with pytest.raises(InputError, match="step.onnx: inputs must be those of the contract: wanted .'latents'"):
        BundleRollout(OnnxRunner(copied), latent_frames=2)


def test_damage_is_found(copied):
    weights = bytearray((copied / WEIGHTS).read_bytes())
    weights[1000] ^= 1
    for data, message in (
        (bytes(weights), "is not what was exported .sha256 differs"),
        (bytes(weights[:-1]), f"must have {len(weights)} bytes, got {len(weights) - 1}: truncated"),
    ):
        (copied / WEIGHTS).write_bytes(data)
        with pytest.raises(InputError, match=message):
            open_bundle(copied)
    (copied / "step.onnx").unlink()
    with pytest.raises(InputError, match="the file is missing|sha256 differs|truncated"):
        open_bundle(copied)


def test_bfloat16_says_what_runs_here(tmp_path):
    from cfpp_rt.export.bundle_rollout import BundleRollout
    from cfpp_rt.export.onnx_runner import OnnxRunner

    export(tmp_path / "b", torch.bfloat16)
    with pytest.raises(InputError, match="no bfloat16 on the CPU: export with --dtype float32 or float16"):
        BundleRollout(OnnxRunner(tmp_path / "b"), latent_frames=2)


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named_with_its_command(bundle, tmp_path, package):
    made = tmp_path / "made"
    export_line = f"['export', 'onnx', '--random-weights', '--size', '32x32', '--frames', '5', '-o', {str(made)!r}]"
    verify_line = f"['export', 'verify', {str(bundle)!r}, '--random-weights']"
    code = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] == {package!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "from cfpp_rt.cli.main import main\n"
        f"sys.exit(main({export_line if package == 'onnx' else verify_line}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    wanted = "pip install 'cfpp-rt[onnx]'" if package == "onnx" else "another student"
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and wanted in done.stderr, done.stderr
    assert not made.exists()


def test_export_and_verify_by_command(tmp_path, capsys):
    source = ["--random-weights", "--size", "32x48", "--frames", "25", "--window", "4", "--sinks", "1"]
    folder, report = tmp_path / "bundle", tmp_path / "report.json"
    assert main(["export", "onnx", *source, "-o", str(folder)]) == 0
    assert "5 graphs in float32, 4 frame slots of 6 tokens" in capsys.readouterr().out
    assert main(["export", "verify", str(folder), *source, "--report", str(report)]) == 0
    assert "agrees with PyTorch" in capsys.readouterr().out
    values = json.loads(report.read_text())
    assert values["passed"] and values["rollout"]["frames"] == 21 and values["rollout"]["ring_wraps"]
    line = fault(capsys, ["export", "verify", str(folder), *source, "--tolerance", "1e-9", "--quiet"])
    assert "does not agree with PyTorch" in line


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["onnx", "--size", "32x32", "-o", "x"], "a checkpoint is needed"),
        (["onnx", "--random-weights", "--size", "30x32", "-o", "x"], "--size must be HEIGHTxWIDTH"),
        (["onnx", "--random-weights", "--steps", "fast", "-o", "x"], "--steps must be integers"),
        (["onnx", "nowhere.pt", "-o", "x"], "nowhere.pt: no such file"),
        (["verify", "nowhere"], "nowhere: no bundle"),
        (["verify", "nowhere", "--tolerance", "-1"], "--tolerance must be in 0..1"),
        ([], "ACTION"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in fault(capsys, ["export", *arguments])
    assert not list(tmp_path.iterdir())


def test_make_card_keeps_the_first_block_and_the_context(model):
    run = RolloutConfig(steps=(1000,), first_steps=(1000, 500), context_noise=100)
    card = make_card(model, run, latent_size=(8, 12), latent_frames=5)
    assert card.timesteps[card.context] == 100.0 and card.timesteps[card.given] == 0.0
    assert len(card.steps) == 1 and len(card.first_steps) == 2 and card.sizes.slots == card.latent_frames == 5


def test_a_card_with_a_ring_of_a_billion_is_refused_at_once(copied):
    values = json.loads((copied / CARD).read_text())
    values["sizes"]["ring"] = 10**9
    (copied / CARD).write_text(json.dumps(values))
    tracemalloc.start()
    with pytest.raises(InputError, match="card does not fit together: sinks and ring must be at most 1048576"):
        open_bundle(copied)
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()
