"""Engines are really built here, ahead of time, without a GPU; and what goes wrong in a builder is one line."""

import subprocess
import sys

import pytest

from cfpp_rt.errors import InputError
from cfpp_rt.export.trt import build, build_worker, parser
from cfpp_rt.export.trt.build import build_engine
from cfpp_rt.export.trt.build_worker import Job
from tests.export.graphs import cached_attention, contract
from tests.export.needs import needs_tensorrt

pytestmark = needs_tensorrt


def job(folder, *, dtype="float16", target="sm89", external=False, **options):
    fault = options.pop("fault", "")
    graph = cached_attention(folder / "graph.onnx", dtype=dtype, fault=fault, external=external)
    return Job(str(graph), str(folder / "graph.engine"), "tensorrt-rtx", target, contract(dtype), **options)


@pytest.mark.parametrize("target", ["sm80", "sm86", "sm89", "sm120"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_an_engine_is_built_ahead_of_time(tmp_path, dtype, target):
    wanted = job(tmp_path, dtype=dtype, target=target, external=target == "sm89")
    built = build_engine(wanted)
    engine = (tmp_path / "graph.engine").read_bytes()
    assert engine[:4] == b"vtrt" and built.bytes == len(engine) > 100_000
    assert f"accelerators={{{target} }}".encode() in engine, "compiled for the architecture that was requested"
    assert len(built.network["sites"]) == 2 and built.peak_mib > 50 and built.build_s > 0 and built.activation_mib
    assert built.library == "tensorrt-rtx" and built.target == target


def test_two_builds_are_the_same_bytes(tmp_path):
    made = []
    for _ in range(2):
        build_engine(job(tmp_path))
        made.append((tmp_path / "graph.engine").read_bytes())
    assert made[0] == made[1]


@pytest.mark.parametrize(
    "options,message",
    [
        ({"fault": "no length"}, "sees the whole cache"),
        ({"target": "sm90"}, "no target for data centre GPUs"),
        ({"target": "sm75", "dtype": "bfloat16"}, "cannot compute in a dtype of the graph: export in float16"),
        ({"weights": "refittable"}, "refittable and stripped weights need a GPU driver.*--weights embedded"),
        ({"weights": "stripped"}, "refittable and stripped weights need a GPU driver"),
        ({"target": "current"}, "need a GPU driver; choose --targets sm89"),
    ],
)
def test_a_refused_build_is_one_line_and_no_file(tmp_path, options, message):
    if "driver" in message and subprocess.run(["sh", "-c", "nvidia-smi -L"], capture_output=True).returncode == 0:
        pytest.skip("this machine has a driver")
    with pytest.raises(InputError, match=message) as caught:
        build_engine(job(tmp_path, **options))
    assert "\n" not in str(caught.value) and not (tmp_path / "graph.engine").exists()


def test_weights_that_lie_beside_the_graph_must_be_there(tmp_path):
    wanted = job(tmp_path, external=True)
    (tmp_path / "graph.onnx.data").unlink()
    with pytest.raises(InputError, match="graph.onnx"):
        build_engine(wanted)


def test_a_log_that_admits_an_ignored_input_stops_the_build(tmp_path, monkeypatch):
    """In the process itself: parsed without lengths and with the proof switched off, only the log knows."""

    monkeypatch.setattr(parser, "_restore_lengths", lambda *arguments: [])
    monkeypatch.setattr(build_worker, "check_network", lambda *arguments: None)
    with pytest.raises(InputError, match="would ignore a part of the graph: .*length"):
        build_worker.compile_engine(job(tmp_path))
    assert not (tmp_path / "graph.engine").exists()


@pytest.mark.parametrize(
    "body,limit_s,message",
    [
        ("import os; os.kill(os.getpid(), 11)", 60, r"the builder crashed \(exit code 139, signal 11"),
        ("import os; os.kill(os.getpid(), 9)", 60, "was killed at .* for want of memory"),
        ("import time; time.sleep(60)", 1, r"stopped after 1 s .*raise --time-limit"),
        ("print('went wrong'); raise SystemExit(5)", 60, r"ended with exit code 5 \(went wrong\)"),
        ("print('refused: no room'); raise SystemExit(2)", 60, "engine for sm89: no room"),
    ],
)
def test_a_builder_that_crashes_or_hangs_is_one_line(tmp_path, monkeypatch, body, limit_s, message):
    start = subprocess.Popen
    monkeypatch.setattr(
        build.subprocess, "Popen", lambda command, **options: start([sys.executable, "-c", body], **options)
    )
    with pytest.raises(InputError, match=message):
        build_engine(job(tmp_path), time_limit_s=limit_s)


def test_a_job_with_wrong_options_is_refused(tmp_path):
    with pytest.raises(InputError, match="weights must be embedded, refittable, stripped, got 'none'"):
        job(tmp_path, weights="none")
