"""`cfpp bench`: the latency of a student beside its baselines, in the metrics that docs/benchmark.md defines."""

import argparse
import sys
from itertools import islice
from typing import Any

from cfpp_rt.bench import harness
from cfpp_rt.bench.latency import chrome_trace, cold_start, compare, load, metrics, workload
from cfpp_rt.device.peak import peak_matmul_flops
from cfpp_rt.errors import InputError
from cfpp_rt.io.atomic import require_writable

# Options of --clients and their defaults; None while parsing, to tell those that were given.
_MANY_CLIENTS = {"rate": None, "arrival_seed": 0, "serving": "turns", "deadline_fps": 16.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "examples:\n"
        "  cfpp bench --random-weights --model world --json results.jsonl\n"
        "  cfpp bench --checkpoint framewise-2step.pt --base Wan2.1-T2V-1.3B\n"
        "  cfpp bench --random-weights --model world --clients 4 --rate 0.5\n"
        "  cfpp bench --compare before.jsonl after.jsonl --tolerance frame_ms_p50=0.05"
    )
    workload.add_arguments(parser)
    how = parser.add_argument_group("measurement")
    how.add_argument(
        "--contenders",
        dest="backends",
        metavar="LIST",
        default="ours,eager,compiled",
        help="backends to compare. "
        + "; ".join(f"{name}: {text}" for name, text in workload.BACKENDS.items())
        + " (default: %(default)s)",
    )
    how.add_argument("--repeats", type=int, default=5, help="requests to each backend, interleaved (default: 5)")
    how.add_argument("--no-cold-start", action="store_true", help="leave out cold_start_s and peak_memory_mib")
    many = parser.add_argument_group("many clients")
    many.add_argument(
        "--clients",
        type=int,
        metavar="N",
        help="do not compare backends; serve N requests of this runtime on one device",
    )
    many.add_argument("--rate", type=float, metavar="R", help="R arrivals per second, Poisson (default: all at once)")
    many.add_argument("--arrival-seed", type=int, help="seed of the arrival times (default: 0)")
    many.add_argument("--serving", choices=load.SERVING, help="order of service (default: turns)")
    many.add_argument("--deadline-fps", type=float, help="frame rate of playback (default: 16)")
    out = parser.add_argument_group("output")
    out.add_argument("--json", metavar="FILE", help="append the rows as JSON lines")
    out.add_argument(
        "--trace", metavar="FILE", help="do not compare backends; write a trace of one request, .json, for Perfetto"
    )
    out.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="measure nothing; print the metrics that are worse in file B than in file A (then exit code 1)",
    )
    out.add_argument(
        "--tolerance", nargs="+", default=[], metavar="METRIC=SHARE", help="with --compare (default: 0.1, tails 0.25)"
    )


def run(arguments: argparse.Namespace) -> None:
    _refuse_ignored(arguments)
    if arguments.compare:
        before, after = arguments.compare
        _compare(before, after, arguments.tolerance)
        return
    if arguments.json is not None:
        require_writable(arguments.json, "--json", append=True)
    if arguments.trace is not None:
        chrome_trace.require_trace_path(arguments.trace)
    if arguments.clients is not None:
        _many_clients(arguments)
    elif arguments.trace is not None:
        events = chrome_trace.record(workload.build(arguments), arguments.trace)
        print(f"{arguments.trace}: {events} events; open it at https://ui.perfetto.dev")
    else:
        _latency(arguments)


def _latency(arguments: argparse.Namespace) -> None:
    backends = arguments.backends.split(",")
    unknown = [name for name in backends if name not in workload.BACKENDS]
    if unknown:
        raise InputError(f"--contenders must be of {', '.join(workload.BACKENDS)}, got {', '.join(unknown)}")
    if not 1 <= arguments.repeats <= 10_000:
        raise InputError(f"--repeats must be in 1..10000, got {arguments.repeats}")
    measured = workload.build(arguments)
    only_ours = {"ours", "ungraphed"}.issuperset(backends)
    if arguments.linear_dtype is not None and not only_ours:
        raise InputError("--linear-dtype applies to ours alone: add --contenders ours")
    if measured.config.kv_dtype is not None and not only_ours:
        raise InputError("--kv-dtype applies to ours alone: add --contenders ours")
    peak = peak_matmul_flops(measured.device, measured.pipeline.model.dtype) / 1e12
    times = metrics.run_interleaved(measured, backends, arguments.repeats, log=_log)
    results = {name: metrics.summarize(measured, requests, peak) for name, requests in times.items()}
    if not arguments.no_cold_start:
        for name, result in results.items():
            result |= cold_start.measure(name, workload.command_line(arguments))
    curves = {name: metrics.window_fill(measured, requests, peak) for name, requests in times.items()}
    row_facts = {**measured.facts, "repeats": arguments.repeats, "roof_tflops": peak}
    print(_title(measured.facts))
    requests_each = f"requests to each backend: {arguments.repeats}, interleaved"
    print(f"peak: one large matrix product reaches {peak:.3g} TFLOP/s; {requests_each}")
    print(metrics.table(results))
    _print_curves(curves)
    rows = [{"bench": "latency", "contender": name, **row_facts, **result} for name, result in results.items()]
    rows += [
        {"bench": "window_fill", "contender": name, **row_facts, **point}
        for name, curve in curves.items()
        for point in curve
    ]
    harness.record(rows, arguments.json, measured.device)


def _refuse_ignored(arguments: argparse.Namespace) -> None:
    """Raise InputError for an option without the one that it belongs to; fill in the defaults of the others."""
    for name, default in _MANY_CLIENTS.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)
        elif arguments.clients is None or arguments.compare:
            raise InputError(f"--{name.replace('_', '-')} needs --clients, got none")
    if arguments.tolerance and not arguments.compare:
        raise InputError("--tolerance needs --compare, got none")


def _many_clients(arguments: argparse.Namespace) -> None:
    if not 1 <= arguments.clients <= 10_000:
        raise InputError(f"--clients must be in 1..10000, got {arguments.clients}")
    for name in ("rate", "deadline_fps"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < 1e6:
            raise InputError(f"--{name.replace('_', '-')} must be a number > 0, got {value}")
    if arguments.arrival_seed < 0:
        raise InputError(f"--arrival-seed must be >= 0, got {arguments.arrival_seed}")
    measured = workload.build(arguments)
    for _ in islice(measured.stream("ours"), 3):  # warm-up
        pass
    times = load.arrivals(arguments.clients, arguments.rate, arguments.arrival_seed)
    clients = load.serve(lambda number: measured.stream("ours", number), times, arguments.serving)
    result = load.summary(clients, arguments.deadline_fps)
    arriving = "all at once" if arguments.rate is None else f"{arguments.rate:g} arrivals per second"
    print(_title(measured.facts))
    print(f"{arguments.clients} clients, {arriving}, {arguments.serving}: {load.SERVING[arguments.serving]}")
    print(f"{'client':>8}{'arrival s':>11}{'queue ms':>10}{'ttff ms':>9}{'done s':>9}{'late':>7}")
    for number, client in enumerate(clients):
        late = f"{len(client.late(arguments.deadline_fps))}/{client.num_frames}"
        columns = f"{client.arrival:>11.2f}{1000 * client.queue_s:>10.0f}{1000 * client.ttff_s:>9.0f}"
        print(f"{number:>8}{columns}{client.deliveries[-1][0]:>9.2f}{late:>7}")
    for metric, (explanation, _) in load.METRICS.items():
        print(f"  {metric:<22}{result[metric]:>10,.1f}  {explanation}")
    requested = {"clients": arguments.clients, "rate": arguments.rate, "arrival_seed": arguments.arrival_seed}
    requested |= {"serving": arguments.serving, "deadline_fps": arguments.deadline_fps}
    row = {"bench": "requests", **measured.facts, **requested, **result}
    harness.record([row], arguments.json, measured.device)


def _compare(before: str, after: str, tolerances: list[str]) -> None:
    old, new = compare.read_rows(before), compare.read_rows(after)
    lines = compare.compare(old, new, compare.parse_tolerances(tolerances))
    if (difference := compare.differing_machines(old, new)) is not None:
        _log(difference)
    print("\n".join(lines) if lines else "nothing is worse")
    if lines:
        sys.stdout.flush()
        raise SystemExit(1)


def _title(facts: dict[str, Any]) -> str:
    steps = ",".join(map(str, facts["steps"]))
    window = "all frames" if facts["window"] is None else f"window {facts['window']}"
    return (
        f"{facts['model']} ({facts['weights']} weights) {facts['dtype']}, {facts['student']}: steps {steps}, {window}, "
        f"refresh {facts['refresh']}; {facts['frames']} frames of {facts['size']}, batch {facts['batch']}, "
        f"decode {facts['decode']}"
    )


def _print_curves(curves: dict[str, list[dict[str, Any]]]) -> None:
    print("window fill: ms of one block's passes, by visible latent frames and sampling steps")
    print(f"{'visible':>8}{'steps':>7}" + "".join(f"{name:>12}" for name in curves))
    points: dict[tuple[int, int], dict[str, float]] = {}
    for name, curve in curves.items():
        for point in curve:
            points.setdefault((point["visible_frames"], point["block_steps"]), {})[name] = point["block_ms"]
    for (visible, steps), values in sorted(points.items()):
        cells = "".join(f"{values[name]:>12,.2f}" if name in values else f"{'-':>12}" for name in curves)
        print(f"{visible:>8}{steps:>7}{cells}")


def _log(text: str) -> None:
    print(text, file=sys.stderr)
