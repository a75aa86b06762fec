"""The parity gate: sound bundles pass, planted faults are caught and named."""

import json
import shutil

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import helper, numpy_helper

from cfpp_rt.config import RolloutConfig
from cfpp_rt.errors import InputError
from cfpp_rt.export.bundle import CARD, open_bundle
from cfpp_rt.export.export_bundle import export_onnx
from cfpp_rt.export.parity import require_passed, verify
from cfpp_rt.io.digest import sha256_of
from cfpp_rt.model.transformer import random_model
from cfpp_rt.model.weights import build_model
from cfpp_rt.world.sprites import SIZE
from cfpp_rt.world.student import SHIPPED, load_world_pipeline
from tests.test_actions import ACTING

RUN = RolloutConfig(steps=(1000, 500), window=4, sinks=1)


@pytest.fixture(scope="module")
def acting(tmp_path_factory):
    model = random_model(ACTING, seed=0, dtype=torch.float32)
    folder = tmp_path_factory.mktemp("verify") / "bundle"
    export_onnx(model, RUN, folder, latent_size=(4, 4), latent_frames=None)
    return model, folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "run", [RUN, RolloutConfig(), RolloutConfig(frames_per_block=3, window=9, sinks=3)], ids=["ring", "all", "chunks"]
)
def test_a_sound_bundle_passes(weights, config, meta, tmp_path, dtype, run):
    model = build_model(weights, config, dtype=dtype, device="cpu")
    export_onnx(model, run, tmp_path / "b", latent_size=tuple(meta["latent_hw"]), latent_frames=21)
    report = verify(open_bundle(tmp_path / "b"), model, threads=1)
    assert report["passed"], report["worst"]
    assert report["rollout"]["frames"] == 21 and report["rollout"]["ring_wraps"] == (run.window is not None)
    assert {entry["graph"] for entry in report["tensors"]} == {*report["graphs"], "rollout"}


@pytest.mark.parametrize("dtype,linear_dtype", [("float16", None), ("float32", "float8_e4m3")])
def test_the_shipped_student_of_the_world_passes(tmp_path, dtype, linear_dtype):
    """Trained weights, whose attention is sharp: float16 has to be measured by an attention that rounds as coarsely."""
    student = load_world_pipeline(SHIPPED, dtype=getattr(torch, dtype), fuse=False)
    size, codec = (SIZE // 8, SIZE // 8), student.codec
    options = {"latent_size": size, "latent_frames": None, "codec": codec, "linear_dtype": linear_dtype}
    export_onnx(student.model, student.config, tmp_path / "b", **options)
    report = verify(open_bundle(tmp_path / "b"), student.model, codec=codec, latent_frames=6, threads=1)
    require_passed(report)
    assert report["rollout"]["ring_wraps"] and report["rollout"]["psnr_db"] > 40


def tampered(folder, target, graph, change):
    """A copy of a bundle of which one graph is changed, with a card that fits."""
    shutil.copytree(folder, target)
    path = target / f"{graph}.onnx"
    model = onnx.load(path, load_external_data=False)
    change(model.graph)
    path.write_bytes(model.SerializeToString())
    card = json.loads((target / CARD).read_text())
    card["files"][path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    (target / CARD).write_text(json.dumps(card))
    return open_bundle(target)


def of_kind(graph, kind):
    return [node for node in graph.node if node.op_type == kind]


def insert_before(graph, reader, position, kind, constant):
    """Put a node between the input at `position` of `reader` and its source; constant: its second operand."""
    graph.initializer.append(numpy_helper.from_array(constant, "planted"))
    made = helper.make_node(kind, [reader.input[position], "planted"], ["planted.out"])
    reader.input[position] = "planted.out"
    graph.node.insert(list(graph.node).index(reader), made)


def nan_in_the_cache(graph):
    insert_before(graph, of_kind(graph, "TensorScatter")[1], 1, "Add", np.array(np.nan, np.float32))


def one_slot_before(graph):
    insert_before(graph, of_kind(graph, "TensorScatter")[0], 2, "Sub", np.array([4], np.int64))


def behind_the_end(graph):
    insert_before(graph, of_kind(graph, "TensorScatter")[0], 2, "Add", np.array([4], np.int64))


def length_without_influence(graph):
    """What a runtime does that knows no lengths: the input is there, Attention does not hear of it."""
    for node in of_kind(graph, "Attention"):
        del node.input[3:]


def action_without_influence(graph):
    node = of_kind(graph, "Gather")[1]
    insert_before(graph, node, 1, "Mul", np.array(0, np.int64))


def rotation_the_other_way(graph):
    of_kind(graph, "RotaryEmbedding")[0].attribute[0].i = 0


def another_cache(graph):
    of_kind(graph, "TensorScatter")[0].input[0] = "values.0"


@pytest.mark.parametrize(
    "graph,change,message",
    [
        ("step", length_without_influence, "step.onnx: input valid is dropped: no output depends on it"),
        ("refresh", length_without_influence, "refresh.onnx: input valid is dropped"),
        ("fused", another_cache, "fused.onnx: input keys.0 is dropped"),
    ],
)
def test_faults_of_structure_are_refused(acting, tmp_path, graph, change, message):
    model, folder = acting
    with pytest.raises(InputError, match=message):
        verify(tampered(folder, tmp_path / "b", graph, change), model, threads=1)


@pytest.mark.parametrize(
    "graph,change,message",
    [
        ("step", nan_in_the_cache, "of step is off by inf"),
        ("fused", nan_in_the_cache, "of fused is off by inf"),
        ("step", one_slot_before, "keys.0.updated of step"),
        ("refresh", behind_the_end, "refresh: onnxruntime failed:.*TensorScatter"),
        ("fused", rotation_the_other_way, "keys.0.updated of fused"),
        ("embed_time", action_without_influence, "modulation of embed_time"),
    ],
)
def test_faults_of_numbers_are_caught_and_named(acting, tmp_path, graph, change, message):
    model, folder = acting
    bundle = tampered(folder, tmp_path / "b", graph, change)
    with pytest.raises(InputError, match=message):
        require_passed(verify(bundle, model, threads=1))


def test_another_student_is_refused(acting, config, weights):
    _, folder = acting
    with pytest.raises(InputError, match="another student"):
        verify(open_bundle(folder), build_model(weights, config, dtype=torch.float32, device="cpu"))


def test_other_weights_are_found(acting):
    _, folder = acting
    with pytest.raises(InputError, match="does not agree with PyTorch"):
        require_passed(verify(open_bundle(folder), random_model(ACTING, seed=1, dtype=torch.float32), threads=1))


def test_bfloat16_is_checked_in_structure_alone(tmp_path):
    model = random_model(ACTING, seed=0, dtype=torch.bfloat16)
    export_onnx(model, RUN, tmp_path / "b", latent_size=(4, 4), latent_frames=None)
    said = []
    report = verify(open_bundle(tmp_path / "b"), model, log=said.append)
    assert report["numerics"] == "not run" and "numbers are not" in said[0]
