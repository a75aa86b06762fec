"""`cfpp bench --compare A B`: find the metrics of file B that are worse than in file A by more than their tolerance."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cfpp_rt.bench.latency import load, metrics
from cfpp_rt.errors import InputError

Row = Mapping[str, Any]

# Every metric that can be compared: True if less of it is better.
LESS_IS_BETTER = {
    **{name: less for known in (metrics.METRICS, load.METRICS) for name, (_, less) in known.items()},
    "block_ms": True,
}
TOLERANCE = 0.1  # of metrics that are not listed below; tails and process start vary more
TOLERANCES = {"frame_ms_p99": 0.25, "cold_start_s": 0.25, "ttff_ms_p99": 0.25, "late_percent": 0.25}
# Keys that may differ between two runs of the same measurement.
_ENVIRONMENT = {"date", "commit", "command", "python", "torch", "driver_and_clocks", "cuda", "repeats", "roof_tflops"}
_ENVIRONMENT |= {"threads", "cpu", "gpu"}
_MACHINE = ("cpu", "gpu", "threads", "torch")


def read_rows(path: str | Path) -> list[Row]:
    """Read the rows of a JSON-lines file. Raises InputError, which names the file and line."""
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


def parse_tolerances(texts: Sequence[str]) -> dict[str, float]:
    """Parse tolerances METRIC=SHARE, such as frame_ms_p50=0.05 for 5 %. Raises InputError."""
    tolerances = {}
    for option in texts:
        name, _, text = option.partition("=")
        try:
            share = float(text)
        except ValueError:
            share = -1.0
        if name not in LESS_IS_BETTER or not 0 <= share < float("inf"):
            raise InputError(
                f"--tolerance must be METRIC=SHARE with METRIC of {', '.join(LESS_IS_BETTER)}, got {option!r}"
            )
        tolerances[name] = share
    return tolerances


def compare(before: Sequence[Row], after: Sequence[Row], tolerances: Mapping[str, float] | None = None) -> list[str]:
    """Return one line per regression: a metric that is missing, or worse by more than its tolerance.

    A tolerance is a share of the value before. Two rows are of the same measurement if they agree in everything but
    metrics and environment; of several the last counts. Raises InputError if the files share no measurement.
    """
    limits = {**TOLERANCES, **(tolerances or {})}
    old, new = ({_key(row): row for row in rows if LESS_IS_BETTER.keys() & row.keys()} for rows in (before, after))
    if not old.keys() & new.keys():
        raise InputError("the files have no row of the same measurement, so there is nothing to compare")
    lines = []
    for key, row in old.items():
        other = new.get(key, {})
        for name in LESS_IS_BETTER.keys() & row.keys():
            was, now = row[name], other.get(name)
            if now is None:
                lines.append(f"{_title(row)}: {name} was {was:.4g}, and is gone")
                continue
            worse = (now - was) if LESS_IS_BETTER[name] else (was - now)
            if worse > limits.get(name, TOLERANCE) * abs(was):
                change = f"{now / was:.2f} x" if was else "from 0"
                lines.append(f"{_title(row)}: {name} was {was:.4g}, is {now:.4g} ({change})")
    return sorted(lines)


def differing_machines(before: Sequence[Row], after: Sequence[Row]) -> str | None:
    """Return a line that names a difference of machine, threads or torch, which the times then compare as well."""
    for name in _MACHINE:
        old, new = ({str(row[name]) for row in rows if name in row} for rows in (before, after))
        if old != new:
            return (
                f"{name} differs: {', '.join(sorted(old)) or 'none'} before, {', '.join(sorted(new)) or 'none'} after"
            )
    return None


def _key(row: Row) -> str:
    return json.dumps(
        {k: v for k, v in row.items() if k not in LESS_IS_BETTER and k not in _ENVIRONMENT}, sort_keys=True
    )


def _title(row: Row) -> str:
    names = ("bench", "contender", "model", "dtype", "size", "visible_frames", "block_steps", "clients", "serving")
    return " ".join(str(row[name]) for name in names if row.get(name) is not None)
