"""Measure `cold_start_s` and `peak_memory_mib`: one request to one backend in a fresh process.

The process prints one line when its first frames are in host memory, and one JSON line with the peak memory at the end.

    python -m cfpp_rt.bench.latency.cold_start BACKEND --random-weights [arguments of cfpp bench]
"""

import json
import subprocess
import sys
import time

from cfpp_rt.errors import InputError

_FIRST = "first frames"


def measure(backend: str, command_line: list[str]) -> dict[str, float]:
    """Run one request in a fresh process and return its metrics.

    cold_start_s: seconds from the start of the process to its first frames.
    peak_memory_mib: largest memory of the process over the request.

    command_line: options of `workload.add_arguments`. Raises InputError if the process fails.
    """
    command = [sys.executable, "-m", "cfpp_rt.bench.latency.cold_start", backend, *command_line]
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        elapsed = time.perf_counter() - begin
        rest, errors = process.communicate()
    if process.returncode or line.strip() != _FIRST:
        last = (errors.strip().splitlines() or ["it printed nothing"])[-1]
        raise InputError(f"cold start of {backend}: the process ended with {process.returncode}: {last}")
    return {"cold_start_s": elapsed, "peak_memory_mib": json.loads(rest)["peak_memory_mib"]}


def main() -> None:
    from cfpp_rt.bench import harness
    from cfpp_rt.bench.latency import workload
    from cfpp_rt.device.timing import peak_memory_mib

    parser = harness.parser(__doc__)
    parser.add_argument("backend", choices=workload.BACKENDS)
    workload.add_arguments(parser)
    arguments = parser.parse_args()
    stream = workload.build(arguments).stream(arguments.backend)
    next(stream)
    print(_FIRST, flush=True)
    for _ in stream:
        pass
    print(json.dumps({"peak_memory_mib": peak_memory_mib(stream.timings.device)}))


if __name__ == "__main__":
    main()
