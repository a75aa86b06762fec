"""Run tests, sanitizer and benchmarks of ops, passes and a student's latency on this GPU, in a few minutes.

A short table of the results comes last. docs/gpu.md names the benchmarks that this command does not include.

Results go to bench/results/<gpu>/<script>.jsonl, or below --out. The checks share the GPU; then each benchmark has it
alone. Every step has a time limit and runs whatever happened before it; the exit status is 1 if one failed. `make gpu`
builds first, then calls this.

    python -m cfpp_rt.bench.gpu [--out DIR] [--only NAME ...]
"""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from cfpp_rt.bench import harness

ROOT = Path(__file__).resolve().parent.parent
LABELS = ("op", "shape", "dtype", "queries", "tokens", "keys", "visible_frames", "heads", "steps")
CHECKS = ("doctor", "tests", "memcheck", "racecheck")
SANITIZED = ["tests/ops", "-m", "gpu", "-k", "two and groups and not libraries"]  # few tests that cover every kernel


def rows_file(out: Path, bench: str) -> Path:
    """Return the file that a running benchmark writes: <script>.jsonl among the logs, moved to `out` at the end."""
    return out / "logs" / f"{bench.rpartition('.')[2]}.jsonl"


def steps(out: Path) -> dict[str, tuple[int, list[str]]]:
    """Return the time limit in seconds and the command of every step, by name."""
    python = sys.executable

    def bench(name: str, *arguments: str) -> list[str]:
        rows = str(rows_file(out, name))
        return [python, "-m", f"cfpp_rt.bench.{name}", "--device", "cuda", *arguments, "--json", rows]

    workers = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    commands: dict[str, tuple[int, list[str]]] = {
        "doctor": (60, [str(Path(python).with_name("cfpp")), "doctor"]),
        "tests": (240, [python, "-m", "pytest", "-q", "-m", "gpu", *workers]),
        "kv_update": (60, bench("ops.kv_update")),
        "kv_dequantize": (60, bench("ops.kv_dequantize")),
        "pointwise": (90, bench("ops.pointwise")),
        "block_attention": (150, bench("ops.block_attention")),
        "call_overhead": (30, bench("ops.call_overhead")),
        "latency": (
            240,
            [
                *(str(Path(python).with_name("cfpp")), "bench", "--random-weights", "--model", "wan-1.3b"),
                *("--decode", "tiny", "--repeats", "3", "--device", "cuda", "--json", str(rows_file(out, "latency"))),
            ],
        ),
        "decode": (60, bench("model.decode")),
        "rollout": (150, bench("model.rollout", "--model", "wan-1.3b")),
        "graphs": (120, bench("model.graphs")),
    }
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer:
        for tool in ("memcheck", "racecheck"):
            command = [sanitizer, "--tool", tool, "--error-exitcode", "9", python, "-m", "pytest", "-q", *SANITIZED]
            commands[tool] = (120, command)
    else:
        print("compute-sanitizer is not installed: memcheck and racecheck are left out")
    return commands


def run(name: str, limit: int, command: list[str], log: Path) -> tuple[str, float]:
    """Run one step with its output in `log`; return its outcome ("ok" or why not) and the seconds it took."""
    begin = time.perf_counter()
    with log.open("w", encoding="utf-8") as file:
        try:
            done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=limit)
            outcome = "ok" if done.returncode == 0 else f"failed ({done.returncode})"
        except subprocess.TimeoutExpired:
            outcome = f"stopped after {limit} s"
    print(f"== {name}: {outcome}, {time.perf_counter() - begin:.0f} s", flush=True)
    if outcome != "ok":
        print("\n".join(log.read_text(encoding="utf-8").splitlines()[-25:]), flush=True)
    return outcome, time.perf_counter() - begin


def table(out: Path) -> None:
    """Print the main metrics of every row of our own kernels, one line each."""
    for path in sorted(out.glob("*.jsonl")):
        for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            if row.get("contender") not in (None, "graphed" if row["bench"] == "graphs" else "kernel"):
                continue
            label = " ".join(str(row[key]) for key in LABELS if row.get(key) is not None)
            figures = [
                f"{row[key]:.3g} {unit}"
                for key, unit in (
                    ("ms", "ms"),
                    ("frame_ms", "ms"),
                    ("host_ms", "ms on the host"),
                    ("capture_s", "s to capture"),
                    ("tflops", "TFLOP/s"),
                    ("gb_per_s", "GB/s"),
                    ("percent_of_roof", "% of peak"),
                    ("times_best_library", "x best library"),
                )
                if isinstance(row.get(key), float)
            ]
            print(f"{row['bench']:<16}{label:<44}{'  '.join(figures)}")


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--out", type=Path, help="folder for the results (default: bench/results/<gpu>)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run only these steps")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("cfpp: make gpu needs an NVIDIA GPU that torch can use; there is none")
    slug = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    out = (arguments.out or ROOT / "bench" / "results" / slug).resolve()
    logs = out / "logs"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    remaining = {name: step for name, step in steps(out).items() if not arguments.only or name in arguments.only}
    checks = {name: remaining.pop(name) for name in CHECKS if name in remaining}
    with ThreadPoolExecutor() as pool:
        running = {name: pool.submit(run, name, *step, log=logs / f"{name}.log") for name, step in checks.items()}
        outcomes = {name: future.result() for name, future in running.items()}
    outcomes |= {name: run(name, *step, log=logs / f"{name}.log") for name, step in remaining.items()}
    for rows in logs.glob("*.jsonl"):  # rows of this run replace older rows
        rows.replace(out / rows.name)
    table(out)
    print("  ".join(f"{name} {outcome} {seconds:.0f}s" for name, (outcome, seconds) in outcomes.items()))
    if any(outcome != "ok" for outcome, _ in outcomes.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
