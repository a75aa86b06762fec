"""What every benchmark shares: the circumstances of a number, the timer, the measured memory roof, JSON lines."""

import dataclasses
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

ROOF_BYTES = 256 * 2**20  # far beyond any last-level cache
_HEAD_START = 1_000_000  # clocks, about half a millisecond: longer than the host takes to enqueue a call


@dataclasses.dataclass(frozen=True)
class Times:
    """Durations of single calls, in ms."""

    median_ms: float
    p10_ms: float
    p90_ms: float

    @classmethod
    def of(cls, durations: Sequence[float]) -> "Times":
        deciles = statistics.quantiles(durations, n=10)
        return cls(statistics.median(durations), deciles[0], deciles[-1])


def _command_output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _commit() -> str:
    """Commit of the sources, with "+changes" where the working tree differs; "unknown" outside a checkout."""
    root = str(Path(__file__).resolve().parent)
    commit = _command_output("git", "-C", root, "rev-parse", "--short=12", "HEAD")
    changes = _command_output("git", "-C", root, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+changes" if commit and changes else commit or "unknown"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def environment(device: torch.device) -> dict[str, Any]:
    """Under which circumstances a number is taken; part of every row."""
    facts: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device.type,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
        "command": shlex.join([*_program(), *sys.argv[1:]]),
    }
    if device.type == "cuda":
        query = ("nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader")
        index = torch.cuda.current_device() if device.index is None else device.index
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["driver_and_clocks"] = _command_output(*query, f"--id={index}")
        facts["cuda"] = torch.version.cuda
    return facts


def _program() -> list[str]:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return ["python", "-m", spec.name] if spec is not None else [Path(sys.argv[0]).name]


def synchronize(device: torch.device) -> None:
    """Wait for the device's queue, so that the host's clock means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    call: Callable[[], object], device: torch.device, warmup: int = 5, repeats: int = 50, min_seconds: float = 0.5
) -> Times:
    """Time `call`, `repeats` times at least and for `min_seconds` at least: CUDA events on a GPU, else the clock."""
    for _ in range(warmup):
        call()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < repeats or time.perf_counter() - begin < min_seconds:
        times.append(_time_on_gpu(call) if device.type == "cuda" else _time_on_host(call))
    return Times.of(times)


def measure_in_turns(
    calls: Mapping[str, Callable[[], object]], device: torch.device, rounds: int = 30, cold_cache: bool = False
) -> dict[str, Times]:
    """Time several calls one after the other, round by round, so that a drifting clock meets all of them alike.

    cold_cache: before every timed call, overwrite a buffer larger than any last-level cache.
    """
    flushed = torch.empty(ROOF_BYTES, dtype=torch.uint8, device=device) if cold_cache else None
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 2):
        for name, call in calls.items():
            if flushed is not None:
                flushed.zero_()
            duration = _time_on_gpu(call) if device.type == "cuda" else _time_on_host(call)
            if turn >= 2:  # the first two warm up
                times[name].append(duration)
    return {name: Times.of(durations) for name, durations in times.items()}


def matrix_roof(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s that one large matrix product reaches here."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    times = measure(lambda: torch.mm(a, b, out=out), device, warmup=2, repeats=10)
    return 2 * size**3 / times.median_ms / 1e9


def _time_on_host(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - begin)


def _time_on_gpu(call: Callable[[], object]) -> float:
    """Of the device alone: it is kept busy until the host has enqueued the call, whose launches then wait in a row."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_HEAD_START)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def memory_roof(device: torch.device) -> float:
    """GB/s that copying one large buffer into another reaches here, bytes read and written both counted."""
    source = torch.ones(ROOF_BYTES, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    times = measure(lambda: target.copy_(source), device, warmup=2, repeats=10)
    return 2 * ROOF_BYTES / times.median_ms / 1e6


def record(rows: Sequence[dict[str, Any]], path: str | None, device: torch.device) -> None:
    """Print the circumstances; with a path, append each row with them as one JSON line."""
    facts = environment(device)
    print(json.dumps(facts))
    if path is not None:
        append(rows, path, facts)


def append(rows: Sequence[dict[str, Any]], path: str, facts: dict[str, Any]) -> None:
    """Each row, with the circumstances, as one JSON line at the end of a file."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({**row, **facts}) + "\n" for row in rows)
