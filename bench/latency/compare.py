"""`cfpp bench --compare A B`: what of B is worse than A by more than its tolerance. Two files of rows in, lines out."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cfpp_rt.bench.latency import load, metrics
from cfpp_rt.errors import InputError

Row = Mapping[str, Any]

# Every figure that can be compared, and whether less of it is better.
METRICS = {
    **{word: less for words in (metrics.WORDS, load.WORDS) for word, (_, less) in words.items()},
    "block_ms": True,
}
TOLERANCE = 0.1  # of a metric that is not named; tails and a process's start vary more
TOLERANCES = {"frame_ms_p99": 0.25, "cold_start_s": 0.25, "ttff_ms_p99": 0.25, "late_percent": 0.25}
# What may differ between two runs of the same thing.
_CIRCUMSTANCES = {"date", "commit", "command", "python", "torch", "driver_and_clocks", "cuda", "repeats", "roof_tflops"}
_CIRCUMSTANCES |= {"threads", "cpu", "gpu"}
_MACHINE = ("cpu", "gpu", "threads", "torch")


def read_rows(path: str | Path) -> list[Row]:
    """Rows of a JSON-lines file. Raises InputError naming the file and line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    rows: list[Row] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: wanted a JSON object ({error})") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: wanted a JSON object, got {type(row).__name__}")
        rows.append(row)
    return rows


def parse_tolerances(words: Sequence[str]) -> dict[str, float]:
    """METRIC=SHARE, as frame_ms_p50=0.05 for 5 %."""
    found = {}
    for word in words:
        name, _, text = word.partition("=")
        try:
            share = float(text)
        except ValueError:
            share = -1.0
        if name not in METRICS or not 0 <= share < float("inf"):
            raise InputError(f"--tolerance must be METRIC=SHARE with METRIC of {', '.join(METRICS)}, got {word!r}")
        found[name] = share
    return found


def compare(before: Sequence[Row], after: Sequence[Row], tolerances: Mapping[str, float] | None = None) -> list[str]:
    """One line per regression: a metric that is worse by more than its tolerance (a share of the value before), or that
    is gone.

    Rows belong together where they agree in all but metrics and circumstances; of several the last counts. Raises
    InputError where no row of `after` belongs to one of `before`.
    """
    limits = {**TOLERANCES, **(tolerances or {})}
    old, new = ({_key(row): row for row in rows if METRICS.keys() & row.keys()} for rows in (before, after))
    if not old.keys() & new.keys():
        raise InputError("the files have no row of the same measurement, so there is nothing to compare")
    lines = []
    for key, row in old.items():
        other = new.get(key, {})
        for name in METRICS.keys() & row.keys():
            was, now = row[name], other.get(name)
            if now is None:
                lines.append(f"{_title(row)}: {name} was {was:.4g}, and is gone")
                continue
            worse = (now - was) if METRICS[name] else (was - now)
            if worse > limits.get(name, TOLERANCE) * abs(was):
                change = f"{now / was:.2f} x" if was else "from 0"
                lines.append(f"{_title(row)}: {name} was {was:.4g}, is {now:.4g} ({change})")
    return sorted(lines)


def differing_machines(before: Sequence[Row], after: Sequence[Row]) -> str | None:
    """Say so where the two files are of different machines, threads or torch: times then compare these, too."""
    for name in _MACHINE:
        old, new = ({str(row[name]) for row in rows if name in row} for rows in (before, after))
        if old != new:
            return (
                f"{name} differs: {', '.join(sorted(old)) or 'none'} before, {', '.join(sorted(new)) or 'none'} after"
            )
    return None


def _key(row: Row) -> str:
    return json.dumps({k: v for k, v in row.items() if k not in METRICS and k not in _CIRCUMSTANCES}, sort_keys=True)


def _title(row: Row) -> str:
    names = ("bench", "contender", "model", "dtype", "size", "visible_frames", "block_steps", "clients", "serving")
    return " ".join(str(row[name]) for name in names if row.get(name) is not None)
