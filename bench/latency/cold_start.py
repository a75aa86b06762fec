"""A process of its own for `cold_start_s` and `peak_memory_mib`: one request to one contender, from nothing.

Prints one line when the first pictures are there and one JSON line, with the peak memory, when all are.

    python -m cfpp_rt.bench.latency.cold_start CONTENDER --random-weights [arguments of cfpp bench]
"""

import argparse
import json
import subprocess
import sys
import time

from cfpp_rt.errors import InputError

_FIRST = "first pictures"


def measure(contender: str, words: list[str]) -> dict[str, float]:
    """cold_start_s: from the start of a fresh process to its first pictures; peak_memory_mib: of the whole request.

    words: of the command line, as for `workload.add_arguments`. Raises InputError where the process fails.
    """
    command = [sys.executable, "-m", "cfpp_rt.bench.latency.cold_start", contender, *words]
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        elapsed = time.perf_counter() - begin
        rest, errors = process.communicate()
    if process.returncode or line.strip() != _FIRST:
        last = (errors.strip().splitlines() or ["it said nothing"])[-1]
        raise InputError(f"cold start of {contender}: the process ended with {process.returncode}: {last}")
    return {"cold_start_s": elapsed, "peak_memory_mib": json.loads(rest)["peak_memory_mib"]}


def main() -> None:
    from cfpp_rt.bench.latency import workload
    from cfpp_rt.device.timing import peak_memory_mib

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contender", choices=workload.CONTENDERS)
    workload.add_arguments(parser)
    arguments = parser.parse_args()
    stream = workload.build(arguments).stream(arguments.contender)
    next(stream)
    print(_FIRST, flush=True)
    for _ in stream:
        pass
    print(json.dumps({"peak_memory_mib": peak_memory_mib(stream.timings.device)}))


if __name__ == "__main__":
    main()
