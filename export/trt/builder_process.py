"""Builds engines, each in a process with a time limit whose memory is watched and whose crash is reported as one."""

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cfpp_rt.errors import InputError
from cfpp_rt.export.trt.build_worker import Job

DEFAULT_TIME_LIMIT_S = 1800.0


@dataclasses.dataclass(frozen=True)
class Built:
    """One built engine. parse_s, build_s: seconds. peak_mib: largest resident memory of the process. bytes: file size.

    activation_mib: GPU memory of a pass besides weights, inputs and outputs, as the builder says. network: the
    `NetworkReport` as a mapping. warnings: what the library warned of, each once.
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


def build_engine(job: Job, *, time_limit_s: float = DEFAULT_TIME_LIMIT_S) -> Built:
    """Build `job.engine`; the file is there and whole when this returns.

    Raises InputError in one line for a graph that is refused, a build that fails, a builder that crashes, runs out of
    memory, or takes longer than `time_limit_s` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="cfpp-build-") as folder:
        job = dataclasses.replace(job, result=str(Path(folder, "result.json")))
        Path(folder, "job.json").write_text(json.dumps(dataclasses.asdict(job)), encoding="utf-8")
        command = [sys.executable, "-m", "cfpp_rt.export.trt.build_worker", str(Path(folder, "job.json"))]
        with Path(folder, "output").open("w+", encoding="utf-8", errors="replace") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
            code, peak_mib = _watch(process, time_limit_s)
            output.seek(0)
            said = output.read()
        if code != 0:
            Path(job.engine).unlink(missing_ok=True)
            raise InputError(_failure(job, code, said, peak_mib, time_limit_s))
        result = json.loads(Path(job.result).read_text(encoding="utf-8"))
    return Built(target=job.target, bytes=Path(job.engine).stat().st_size, peak_mib=peak_mib, **result)


def _watch(process: "subprocess.Popen[bytes]", time_limit_s: float) -> tuple[int | None, float]:
    """Exit code (None: stopped at the limit) and the largest resident memory seen, MiB."""
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
    """High-water mark of a process's resident memory; 0 where it has ended or the system has no /proc."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0.0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) / 1024 if found else 0.0


def _failure(job: Job, code: int | None, said: str, peak_mib: float, time_limit_s: float) -> str:
    what = f"engine for {job.target}"
    if code is None:
        return f"{what}: the build was stopped after {time_limit_s:.0f} s ({peak_mib:.0f} MiB): raise --time-limit"
    refusals = [line.removeprefix("refused: ") for line in said.splitlines() if line.startswith("refused: ")]
    if code == 2 and refusals:
        return f"{what}: {refusals[-1]}"
    last = next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "no message")
    if code == -9:
        return f"{what}: the build was killed at {peak_mib:.0f} MiB, most likely for want of memory ({last})"
    if code < 0:
        return f"{what}: the builder crashed (exit code {128 - code}, signal {-code}, {peak_mib:.0f} MiB; {last})"
    return f"{what}: the build ended with exit code {code} ({last})"
