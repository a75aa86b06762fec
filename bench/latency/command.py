"""`cfpp bench`: the latency of a student beside its baselines, in words that docs/benchmark.md defines."""

import argparse
import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any

from cfpp_rt.bench import harness
from cfpp_rt.bench.latency import chrome_trace, cold_start, compare, load, metrics, workload
from cfpp_rt.errors import InputError


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
    how = parser.add_argument_group("how it is measured")
    how.add_argument(
        "--contenders",
        metavar="LIST",
        default="ours,eager,compiled",
        help="; ".join(f"{name}: {what}" for name, what in workload.CONTENDERS.items()) + " (default: %(default)s)",
    )
    how.add_argument("--repeats", type=int, default=5, help="requests to each, in turns (default: 5)")
    how.add_argument("--no-cold-start", action="store_true", help="leave out cold_start_s and peak_memory_mib")
    many = parser.add_argument_group("many clients")
    many.add_argument("--clients", type=int, metavar="N", help="instead: N requests to ours that share the device")
    many.add_argument("--rate", type=float, metavar="R", help="R arrivals per second, Poisson (default: all at once)")
    many.add_argument("--arrival-seed", type=int, default=0, help="of the arrival times (default: 0)")
    many.add_argument("--serving", choices=load.SERVING, default="turns", help="(default: turns)")
    many.add_argument("--deadline-fps", type=float, default=16.0, help="rate of playback (default: 16)")
    out = parser.add_argument_group("output")
    out.add_argument("--json", metavar="FILE", help="append the rows as JSON lines")
    out.add_argument("--trace", metavar="FILE", help="instead: a trace of one request, .json, for Perfetto")
    out.add_argument(
        "--compare", nargs=2, metavar=("A", "B"), help="instead: what is worse in B than in A; exit code 1"
    )
    out.add_argument(
        "--tolerance", nargs="+", default=[], metavar="METRIC=SHARE", help="with --compare (default: 0.1, tails 0.25)"
    )


def run(arguments: argparse.Namespace) -> None:
    if arguments.compare:
        before, after = arguments.compare
        _compare(before, after, arguments.tolerance)
        return
    if arguments.json is not None and not Path(arguments.json).resolve().parent.is_dir():
        raise InputError(f"--json must be a file in a folder that is there, got {arguments.json}")
    if arguments.clients is not None:
        _many_clients(arguments)
    elif arguments.trace is not None:
        events = chrome_trace.record(workload.build(arguments), arguments.trace)
        print(f"{arguments.trace}: {events} events; open it at https://ui.perfetto.dev")
    else:
        _latency(arguments)


def _latency(arguments: argparse.Namespace) -> None:
    contenders = arguments.contenders.split(",")
    unknown = [name for name in contenders if name not in workload.CONTENDERS]
    if unknown:
        raise InputError(f"--contenders must be of {', '.join(workload.CONTENDERS)}, got {', '.join(unknown)}")
    if not 1 <= arguments.repeats <= 10_000:
        raise InputError(f"--repeats must be in 1..10000, got {arguments.repeats}")
    what = workload.build(arguments)
    alone = {"ours", "ungraphed"}.issuperset(contenders)
    if arguments.linear_dtype is not None and not alone:
        raise InputError("--linear-dtype is of ours alone: add --contenders ours")
    if what.rollout.kv_dtype is not None and not alone:
        raise InputError("--kv-dtype is of ours alone: add --contenders ours")
    roof = harness.matrix_roof(what.device, what.pipeline.model.dtype)
    times = metrics.in_turns(what, contenders, arguments.repeats, say=_say)
    found = {name: metrics.words(what, requests_, roof) for name, requests_ in times.items()}
    if not arguments.no_cold_start:
        for name, result in found.items():
            result |= cold_start.measure(name, workload.as_words(arguments))
    curves = {name: metrics.window_fill(what, requests_, roof) for name, requests_ in times.items()}
    words = {**what.words, "repeats": arguments.repeats, "roof_tflops": roof}
    print(_title(what.words))
    print(f"one large matrix product reaches {roof:.3g} TFLOP/s; {arguments.repeats} requests to each, in turns")
    print(metrics.table(found))
    _print_curves(curves)
    rows = [{"bench": "latency", "contender": name, **words, **result} for name, result in found.items()]
    rows += [
        {"bench": "window_fill", "contender": name, **words, **point}
        for name, curve in curves.items()
        for point in curve
    ]
    _record(rows, arguments.json, what)


def _many_clients(arguments: argparse.Namespace) -> None:
    if not 1 <= arguments.clients <= 10_000:
        raise InputError(f"--clients must be in 1..10000, got {arguments.clients}")
    for name in ("rate", "deadline_fps"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < 1e6:
            raise InputError(f"--{name.replace('_', '-')} must be a number > 0, got {value}")
    if arguments.arrival_seed < 0:
        raise InputError(f"--arrival-seed must be >= 0, got {arguments.arrival_seed}")
    what = workload.build(arguments)
    for _ in islice(what.stream("ours"), 3):  # warm-up
        pass
    moments = load.arrivals(arguments.clients, arguments.rate, arguments.arrival_seed)
    clients = load.serve(lambda number: what.stream("ours", number), moments, arguments.serving)
    result = load.summary(clients, arguments.deadline_fps)
    come = "all at once" if arguments.rate is None else f"{arguments.rate:g} arrivals per second"
    print(_title(what.words))
    print(f"{arguments.clients} clients, {come}, {arguments.serving}: {load.SERVING[arguments.serving]}")
    print(f"{'client':>8}{'arrival s':>11}{'queue ms':>10}{'ttff ms':>9}{'done s':>9}{'late':>7}")
    for number, client in enumerate(clients):
        late = f"{len(client.late(arguments.deadline_fps))}/{client.pictures}"
        times = f"{client.arrival:>11.2f}{1000 * client.queue_s:>10.0f}{1000 * client.ttff_s:>9.0f}"
        print(f"{number:>8}{times}{client.deliveries[-1][0]:>9.2f}{late:>7}")
    for word, (meaning, _) in load.WORDS.items():
        print(f"  {word:<22}{result[word]:>10,.1f}  {meaning}")
    asked = {"clients": arguments.clients, "rate": arguments.rate, "arrival_seed": arguments.arrival_seed}
    asked |= {"serving": arguments.serving, "deadline_fps": arguments.deadline_fps}
    _record([{"bench": "requests", **what.words, **asked, **result}], arguments.json, what)


def _compare(before: str, after: str, tolerances: list[str]) -> None:
    old, new = compare.read_rows(before), compare.read_rows(after)
    lines = compare.compare(old, new, compare.parse_tolerances(tolerances))
    if (difference := compare.differing_machines(old, new)) is not None:
        _say(difference)
    print("\n".join(lines) if lines else "nothing is worse")
    if lines:
        sys.stdout.flush()
        raise SystemExit(1)


def _title(words: dict[str, Any]) -> str:
    steps = ",".join(map(str, words["steps"]))
    window = "all frames" if words["window"] is None else f"window {words['window']}"
    return (
        f"{words['model']} ({words['weights']} weights) {words['dtype']}, {words['student']}: steps {steps}, {window}, "
        f"refresh {words['refresh']}; {words['frames']} pictures of {words['size']}, batch {words['batch']}, "
        f"decode {words['decode']}"
    )


def _print_curves(curves: dict[str, list[dict[str, Any]]]) -> None:
    print("window fill: ms of one block's passes, by latent frames seen and denoising steps")
    print(f"{'seen':>8}{'steps':>7}" + "".join(f"{name:>12}" for name in curves))
    points: dict[tuple[int, int], dict[str, float]] = {}
    for name, curve in curves.items():
        for point in curve:
            points.setdefault((point["visible_frames"], point["block_steps"]), {})[name] = point["block_ms"]
    for (visible, steps), values in sorted(points.items()):
        cells = "".join(f"{values[name]:>12,.2f}" if name in values else f"{'-':>12}" for name in curves)
        print(f"{visible:>8}{steps:>7}{cells}")


def _record(rows: list[dict[str, Any]], path: str | None, what: workload.Subject) -> None:
    facts = harness.environment(what.device)
    print(json.dumps(facts))
    if path is not None:
        harness.append(rows, path, facts)


def _say(text: str) -> None:
    print(text, file=sys.stderr)
