"""`cfpp bench` from the command line: metrics, rows, trace, errors."""

import json

import pytest
import torch

from cfpp_rt.bench.latency import metrics
from cfpp_rt.bench.latency.workload import SMALL, WORLD, WORLD_ROLLOUT
from cfpp_rt.bench.roofline import block_flops, cached_pass_flops
from cfpp_rt.cli.main import main
from cfpp_rt.config import RolloutConfig

SMALLEST = ["bench", "--random-weights", "--model", "world", "--frames", "8"]


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_and_rows(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    extra = ["--contenders", "ours,eager", "--repeats", "2", "--no-cold-start", "--json", str(path)]
    assert main([*SMALLEST, *extra]) == 0
    out = capsys.readouterr().out
    found = rows(path)
    for name in ("ours", "eager"):
        row = next(row for row in found if row["bench"] == "latency" and row["contender"] == name)
        wanted = {"ttff_ms", "frame_ms_p50", "frame_ms_p90", "frame_ms_p99", "fps", "diffuse_ms", "decode_ms"}
        assert wanted | {"percent_of_roof"} <= row.keys() and wanted <= metrics.METRICS.keys()
        assert row["frame_ms_p50"] <= row["frame_ms_p90"] <= row["frame_ms_p99"]
        assert ("refresh_ms" in row) == (name == "eager"), "ours fuses the refresh into the next block's first step"
        assert 0 < row["percent_of_roof"] < 110
        assert row["steps"] == [1000, 500] and row["window"] == 3 and row["decode"] == "world" and row["threads"] == 1
        assert {"cpu", "torch", "commit", "command", "date"} <= row.keys()
        curve = [r["visible_frames"] for r in found if r["bench"] == "window_fill" and r["contender"] == name]
        assert curve == [1, 2, 3]
    for text in ("ttff_ms", "percent_of_roof", "window fill", "eager takes"):
        assert text in out


def test_cold_start_runs_in_a_fresh_process(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert main([*SMALLEST, "--contenders", "ours", "--repeats", "1", "--json", str(path)]) == 0
    row = rows(path)[0]
    assert row["cold_start_s"] > row["ttff_ms"] / 1000, "importing torch alone takes longer than a request"
    assert 50 < row["peak_memory_mib"] < 4000


@pytest.mark.parametrize(
    "extra",
    [["--decode", "none"], ["--decode", "tiny"], ["--decode", "wan"], ["--refresh", "separate", "--batch", "2"]],
)
def test_codecs_and_refresh_modes(extra, tmp_path):
    if "wan" in extra:
        pytest.importorskip("diffusers")
    path = tmp_path / "rows.jsonl"
    request = ["bench", "--random-weights", "--model", "small", "--size", "32x32", "--frames", "13", "--repeats", "1"]
    assert main([*request, "--contenders", "ours", "--no-cold-start", "--json", str(path), *extra]) == 0
    row = rows(path)[0]
    assert row["first_steps"] == [1000, 750, 500, 250] and row["fps"] > 0
    assert ("refresh_ms" in row) == ("separate" in extra)


def test_trace_names_stages_passes_and_layers(tmp_path, capsys):
    path = tmp_path / "trace.json"
    assert main([*SMALLEST, "--trace", str(path)]) == 0
    spans = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("cat") == "user_annotation"]
    count = {name: sum(span["name"] == name for span in spans) for name in ("diffuse", "decode", "pass", "layer 3")}
    assert count == {"diffuse": 8, "decode": 8, "pass": 16, "layer 3": 16}
    assert all(span["dur"] >= 0 for span in spans)
    outer, inner = (next(span for span in spans if span["name"] == name) for name in ("diffuse", "pass"))
    assert outer["ts"] <= inner["ts"] and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"]


def test_many_clients(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    assert main([*SMALLEST, "--clients", "3", "--rate", "200", "--json", str(path)]) == 0
    (row,) = rows(path)
    assert row["bench"] == "requests" and row["clients"] == 3 and row["serving"] == "turns"
    assert row["served_fps"] > 0 and 0 <= row["late_percent"] <= 100
    assert "late_percent" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--model", "world"], "--checkpoint is needed"),
        (["--random-weights", "--checkpoint", "x"], "and not both"),
        (["--random-weights", "--frames", "80"], "--frames must be 1 + 4"),
        (["--random-weights", "--contenders", "ours,theirs"], "got theirs"),
        (["--random-weights", "--repeats", "0"], "--repeats"),
        (["--random-weights", "--threads", "0"], "--threads"),
        (["--random-weights", "--json", "/nowhere/at/all.jsonl"], "--json"),
        (["--random-weights", "--trace", "trace.txt"], "must end in .json"),
        (["--random-weights", "--clients", "0"], "--clients"),
        (["--random-weights", "--clients", "2", "--rate", "0"], "--rate"),
        (["--random-weights", "--kv-dtype", "float8_e4m3"], "--contenders ours"),
        (["--random-weights", "--linear-dtype", "int8"], "--linear-dtype applies to ours alone: add --contenders ours"),
        (["--random-weights", "--linear-dtype", "float8_e4m3", "--device", "cpu"], "on a GPU of capability 8.9"),
    ],
)
def test_errors_are_one_line(arguments, message, capsys):
    assert main(["bench", "--decode", "none", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_arithmetic_of_a_block():
    """FLOPs counted by hand for the world with a full window: two passes, and the clean pass without its last layer."""
    d, f, layers, tokens, visible = 128, 512, 4, 36, 3 * 36
    linear, attention = 2 * tokens * (4 * d * d + 2 * d * f), 4 * tokens * visible * d
    wanted = 2 * layers * (linear + attention) + (layers - 1) * (linear + attention) + 4 * tokens * d * d
    assert block_flops(WORLD, WORLD_ROLLOUT, tokens, 3, steps=2) == wanted
    skip = WORLD_ROLLOUT.replace(refresh="skip")
    assert block_flops(WORLD, skip, tokens, 3, steps=2) == 2 * layers * (linear + attention)
    assert block_flops(SMALL, RolloutConfig(), 6, 1, steps=4) == 4 * sum(cached_pass_flops(SMALL, 6, 6))
