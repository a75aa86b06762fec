"""Shared parts of the benchmarks: the measured peak, rows, the files of `make gpu`, commands in the documentation."""

import re
from pathlib import Path

import pytest
import torch

from cfpp_rt.bench import gpu, harness
from cfpp_rt.device.peak import peak_matmul_flops

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def test_peak_is_the_rate_of_the_given_product():
    small, large = (peak_matmul_flops(CPU, torch.float32, (n, n, n)) for n in (8, 512))
    assert 0 < small < large < 1e14, "calls of small products are mostly overhead"


def test_bandwidth_row_has_the_keys_of_stored_rows():
    times = harness.Times.of([2.0] * 10)
    row = harness.bandwidth_row(times, num_bytes=10**9, peak=1000.0)
    assert row["gb_per_s"] == pytest.approx(500) and row["percent_of_roof"] == pytest.approx(50)
    assert set(row) == {"ms", "p10_ms", "p90_ms", "gb_per_s", "roof_gb_per_s", "percent_of_roof"}


def test_interleaved_calls_alternate():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    assert set(harness.measure_interleaved(calls, CPU, rounds=3)) == {"a", "b"}
    assert order == ["a", "b"] * 5, "two rounds of warm-up and three timed ones"


def test_rows_of_make_gpu_are_named_after_the_script(tmp_path):
    commands = {name: command for name, (_, command) in gpu.steps(tmp_path).items() if "--json" in command}
    files = {name: Path(command[command.index("--json") + 1]) for name, command in commands.items()}
    assert all(path == tmp_path / "logs" / f"{name}.jsonl" for name, path in files.items())
    assert {"kv_update", "block_attention", "latency", "graphs"} <= files.keys()


def test_documented_benchmarks_exist():
    texts = [*(ROOT / "docs").glob("*.md"), ROOT / "Makefile", *(ROOT / "bench").rglob("*.py")]
    named = {name for path in texts for name in re.findall(r"-m cfpp_rt\.bench\.([\w.]*\w)", path.read_text())}
    assert len(named) > 20
    for name in named:
        path = ROOT / "bench" / name.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").is_file(), name
