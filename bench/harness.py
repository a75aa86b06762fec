"""Shared parts of the benchmarks: command line, environment of a run, timers, peak memory bandwidth, JSON lines."""

import argparse
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

from cfpp_rt.errors import InputError
from cfpp_rt.io.atomic import require_writable
from cfpp_rt.ops import backends

LATENT_480P = (60, 104)  # height and width of the latents of a frame of 480x832
COPY_BYTES = 256 * 2**20  # far larger than any last-level cache
_SLEEP_CYCLES = 1_000_000  # cycles, about 0.5 ms, that the GPU sleeps while the host enqueues the call


def parser(doc: str | None, *, device: bool = False, json: bool = False) -> argparse.ArgumentParser:
    """Return a parser that prints `doc` as its help, with the options --device and --json where they are wanted."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if device:
        made.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    if json:
        made.add_argument("--json", metavar="PATH", type=json_path, help="append the rows as JSON lines")
    return made


def json_path(text: str) -> str:
    """Return the path of --json, of which the folder is made; raise what argparse expects if it cannot be written."""
    try:
        Path(text).resolve().parent.mkdir(parents=True, exist_ok=True)
        require_writable(text, "--json", append=True)
    except (OSError, InputError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


@dataclasses.dataclass(frozen=True)
class Times:
    """Median and deciles of the durations of single calls, in ms."""

    median_ms: float
    p10_ms: float
    p90_ms: float

    @classmethod
    def of(cls, durations: Sequence[float]) -> "Times":
        deciles = statistics.quantiles(durations, n=10)
        return cls(statistics.median(durations), deciles[0], deciles[-1])

    def row(self) -> dict[str, float]:
        """Return the times under the keys that they have in rows of results."""
        return {"ms": self.median_ms, "p10_ms": self.p10_ms, "p90_ms": self.p90_ms}


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype as rows have it, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def _command_output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _commit() -> str:
    """Return the commit of the sources, with "+changes" if the working tree differs; "unknown" outside a checkout."""
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
    """Return the facts that every row carries: date, machine, threads, versions, commit and command."""
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
    """Wait until the device has finished its queue, so that the clock of the host measures its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    call: Callable[[], object], device: torch.device, warmup: int = 5, repeats: int = 50, min_seconds: float = 0.5
) -> Times:
    """Time at least `repeats` calls for at least `min_seconds`: by CUDA events on a GPU, else by the clock."""
    for _ in range(warmup):
        call()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < repeats or time.perf_counter() - begin < min_seconds:
        times.append(_time_call(call, device))
    return Times.of(times)


def measure_interleaved(
    calls: Mapping[str, Callable[[], object]], device: torch.device, rounds: int = 30, cold_cache: bool = False
) -> dict[str, Times]:
    """Time several calls interleaved, one of each per round, so that a drifting clock affects all of them alike.

    cold_cache: overwrite a buffer larger than any last-level cache before every timed call.
    """
    flushed = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device) if cold_cache else None
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 2):
        for name, call in calls.items():
            if flushed is not None:
                flushed.zero_()
            duration = _time_call(call, device)
            if number >= 2:  # the first two rounds warm up
                times[name].append(duration)
    return {name: Times.of(durations) for name, durations in times.items()}


def time_synchronized(call: Callable[[], object], device: torch.device) -> float:
    """Return the ms that the host waits for one call, the device's queue included."""
    synchronize(device)
    begin = time.perf_counter()
    call()
    synchronize(device)
    return 1000 * (time.perf_counter() - begin)


def _time_call(call: Callable[[], object], device: torch.device) -> float:
    return _time_on_gpu(call) if device.type == "cuda" else time_synchronized(call, device)


def _time_on_gpu(call: Callable[[], object]) -> float:
    """Return the ms that the device takes for one call.

    The device sleeps until the host has enqueued the call, so that launch latency is not measured.
    """
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_SLEEP_CYCLES)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def peak_bandwidth(device: torch.device) -> float:
    """Return the GB/s that a copy of one large buffer reaches here, counting both the bytes read and written."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    times = measure(lambda: target.copy_(source), device, warmup=2, repeats=10)
    return 2 * COPY_BYTES / times.median_ms / 1e6


def bandwidth_row(times: Times, num_bytes: int, peak: float) -> dict[str, float]:
    """Return the times of a call that reads and writes `num_bytes`, its GB/s, and their percent of `peak` (GB/s)."""
    rate = num_bytes / times.median_ms / 1e6
    return {**times.row(), "gb_per_s": rate, "roof_gb_per_s": peak, "percent_of_roof": 100 * rate / peak}


def op_backend(op: str, device: torch.device) -> tuple[str, float]:
    """Print and return the backend of a memory-bound op on a device, and the peak bandwidth in GB/s."""
    (backend, reason), peak = backends()[op][device.type], peak_bandwidth(device)
    print(f"backend {backend} ({reason}); peak: a large copy reaches {peak:.1f} GB/s")
    return backend, peak


def record(rows: Sequence[Mapping[str, Any]], path: str | None, device: torch.device) -> None:
    """Print the environment as one JSON line; with a path, append every row with it to that file."""
    facts = environment(device)
    print(json.dumps(facts))
    if path is not None:
        append(rows, path, facts)


def append(rows: Sequence[Mapping[str, Any]], path: str, facts: Mapping[str, Any]) -> None:
    """Append every row, with `facts`, as one JSON line at the end of a file."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({**row, **facts}) + "\n" for row in rows)
