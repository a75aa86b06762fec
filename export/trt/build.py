"""Builds an engine bundle from an ONNX bundle: one engine per graph and architecture, each in a process of its own.

A builder may crash, hang or run out of memory. A separate process with a time limit turns that into one line of error.
"""

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cfpp_rt.errors import InputError
from cfpp_rt.export.bundle import Bundle
from cfpp_rt.export.contract import PASSES, network_graphs
from cfpp_rt.export.trt.build_worker import Job
from cfpp_rt.export.trt.bundle import write_engine_card
from cfpp_rt.export.trt.cuda import Device
from cfpp_rt.export.trt.library import CURRENT, Library, load_library
from cfpp_rt.export.trt.parser import weight_bytes
from cfpp_rt.io.atomic import new_folder

EMBEDDINGS = ("embed_time", "embed_text")
DEFAULT_TARGETS = ("sm80", "sm86", "sm89", "sm120")
DEFAULT_TIME_LIMIT_S = 1800.0
_WITHOUT_FLOAT8 = ("sm75", "sm80", "sm86")


def build_engine_bundle(
    source: Bundle,
    folder: str | Path,
    parity: Mapping[str, Any],
    *,
    targets: Sequence[str] = DEFAULT_TARGETS,
    graphs: Sequence[str] | None = None,
    library: str = "auto",
    weights: str = "embedded",
    timing_cache: str | None = None,
    time_limit_s: float = DEFAULT_TIME_LIMIT_S,
    log: Callable[[str], None] = lambda line: None,
) -> None:
    """Build the network's graphs of an opened ONNX bundle for every target into a new folder.

    parity: the result of the comparison with PyTorch, for the card.
    targets: "sm89" etc., or "current".
    graphs: names of the graphs to build; None = all of the network. A codec's graphs stay with ONNX Runtime.
    library, weights, timing_cache, time_limit_s: see `load_library`, `Job` and `build_engine`.
    log: receives one line per engine.

    Nothing is left behind unless every engine is built. Raises InputError as `build_engine` does, and for a target that
    cannot be built here, a folder that exists or a disk too small.
    """
    loaded = require_buildable(library, targets, graphs, timing_cache, linear_dtype=source.card.linear_dtype)
    known = network_graphs(source.card.sizes)
    names = [name for name in known if graphs is None or name in graphs]
    architectures = [Device().architecture if target == CURRENT else target for target in targets]
    if not names or len(set(architectures)) != len(architectures):
        raise InputError(
            f"graphs and targets must be some of {', '.join(known)} for different architectures,"
            f" got {', '.join(names) or 'no graph'} for {', '.join(architectures)}"
        )
    sizes = {name: 0 if weights == "stripped" else weight_bytes(source.path(name)) for name in names}
    builds: dict[str, dict[str, Any]] = {}
    with new_folder(folder, len(targets) * sum(sizes.values())) as made:
        for target, architecture in zip(targets, architectures, strict=True):
            (made / architecture).mkdir()
            builds[architecture] = {}
            for name in sorted(names, key=lambda name: sizes[name]):  # small graphs first: a refusal comes early
                engine = str(made / architecture / f"{name}.engine")
                job = Job(str(source.path(name)), engine, loaded.name, target, known[name], weights, timing_cache)
                result = build_engine(job, time_limit_s=time_limit_s)
                builds[architecture][name] = _summarize(result)
                log(
                    f"{architecture} {name}: {result.bytes / 2**20:.1f} MiB in {result.parse_s + result.build_s:.1f} s,"
                    f" {result.peak_mib:.0f} MiB at most"
                )
        values = {
            "cfpp_rt": version("cfpp-rt"),
            "library": loaded.name,
            "library_version": loaded.version,
            "weights": weights,
            "parity": dict(parity),
            "student": source.card.to_dict(),
            "contract": {name: dataclasses.asdict(known[name]) for name in names},
        }
        write_engine_card(made, values, builds)


def require_buildable(
    library: str,
    targets: Sequence[str],
    graphs: Sequence[str] | None,
    timing_cache: str | None,
    *,
    linear_dtype: str | None = None,
) -> Library:
    """Load the library; raise InputError for requests that it refuses whatever the graphs contain."""
    loaded = load_library(library)
    if not targets or len(set(targets)) != len(targets):
        raise InputError(f"targets must be different architectures, got {', '.join(targets) or 'none'}")
    for target in targets:
        loaded.require_target(target)
    without_float8 = [target for target in targets if target in _WITHOUT_FLOAT8]
    if linear_dtype is not None and without_float8:
        raise InputError(
            f"targets must be sm89 or newer for linears in {linear_dtype}, got {', '.join(without_float8)}"
        )
    if CURRENT in targets:
        Device().close()  # raises without a GPU and its driver
    unknown = [name for name in graphs or () if name not in (*EMBEDDINGS, *PASSES)]
    if unknown or graphs == []:
        raise InputError(
            f"graphs must be some of {', '.join((*EMBEDDINGS, *PASSES))}, got {', '.join(unknown) or 'none'}"
        )
    if timing_cache is not None and loaded.name == "tensorrt-rtx":
        raise InputError("timing_cache must be None with tensorrt-rtx: it measures nothing while it builds")
    return loaded


@dataclasses.dataclass(frozen=True)
class BuildResult:
    """One built engine.

    bytes: size of the file.
    parse_s, build_s: seconds.
    peak_mib: largest resident memory of the builder's process.
    activation_mib: GPU memory of a pass besides weights, inputs and outputs, as reported by the builder; None where it
        reports none.
    network: the `NetworkReport` as a mapping.
    warnings: warnings of the library, each once.
    """

    target: str
    library: str
    version: str
    bytes: int
    parse_s: float
    build_s: float
    peak_mib: float
    activation_mib: float | None
    network: dict[str, Any]
    warnings: list[str]


def build_engine(job: Job, *, time_limit_s: float = DEFAULT_TIME_LIMIT_S) -> BuildResult:
    """Build `job.engine`; when this returns, the file is complete.

    Raises InputError in one line for a graph that is refused, a build that fails, a builder that crashes, runs out of
    memory, or takes longer than `time_limit_s` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="cfpp-build-") as folder:
        job = dataclasses.replace(job, result=str(Path(folder, "result.json")))
        Path(folder, "job.json").write_text(json.dumps(dataclasses.asdict(job)), encoding="utf-8")
        command = [sys.executable, "-m", "cfpp_rt.export.trt.build_worker", str(Path(folder, "job.json"))]
        with Path(folder, "output").open("w+", encoding="utf-8", errors="replace") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
            code, peak_mib = _watch(process, time_limit_s)
            file.seek(0)
            output = file.read()
        if code != 0:
            Path(job.engine).unlink(missing_ok=True)
            raise InputError(_explain_failure(job, code, output, peak_mib, time_limit_s))
        result = json.loads(Path(job.result).read_text(encoding="utf-8"))
    return BuildResult(target=job.target, bytes=Path(job.engine).stat().st_size, peak_mib=peak_mib, **result)


def _watch(process: "subprocess.Popen[bytes]", time_limit_s: float) -> tuple[int | None, float]:
    """Return the exit code (None: stopped at the time limit) and the largest resident memory in MiB."""
    deadline, peak = time.monotonic() + time_limit_s, 0.0
    try:
        while True:
            peak = max(peak, _peak_mib(process.pid))
            try:
                return process.wait(timeout=0.05), peak
            except subprocess.TimeoutExpired:
                if time.monotonic() > deadline:
                    return None, peak
    finally:  # also when the command itself is interrupted: no builder stays behind
        process.kill()
        process.wait()


def _peak_mib(pid: int) -> float:
    """Return the high-water mark of a process's resident memory; 0 where it has ended or the system has no /proc."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0.0
    match = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(match[1]) / 1024 if match else 0.0


def _explain_failure(job: Job, code: int | None, output: str, peak_mib: float, time_limit_s: float) -> str:
    name = f"engine for {job.target}"
    if code is None:
        return f"{name}: the build was stopped after {time_limit_s:.0f} s ({peak_mib:.0f} MiB): raise --time-limit"
    refusals = [line.removeprefix("refused: ") for line in output.splitlines() if line.startswith("refused: ")]
    if code == 2 and refusals:
        return f"{name}: {refusals[-1]}"
    last = next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "no message")
    if code == -9:
        return f"{name}: the build was killed at {peak_mib:.0f} MiB, most likely for want of memory ({last})"
    if code < 0:
        return f"{name}: the builder crashed (exit code {128 - code}, signal {-code}, {peak_mib:.0f} MiB; {last})"
    return f"{name}: the build ended with exit code {code} ({last})"


def _summarize(result: BuildResult) -> dict[str, Any]:
    """Return the card's entry about one engine."""
    return {
        "build_s": round(result.parse_s + result.build_s, 2),
        "peak_mib": round(result.peak_mib),
        "activation_mib": None if result.activation_mib is None else round(result.activation_mib, 1),
        "float8_linears": result.network["float8_linears"],
        "self_attentions": len(result.network["sites"]),
        "cross_attentions": result.network["cross_attentions"],
        "notes": list(result.network["notes"]),
        "warnings": result.warnings,
    }
