"""Print the tables of docs/distillation.md, in Markdown, from the rows of the world's study.

python -m cfpp_rt.bench.world_study.table bench/results/amd-epyc-2core/world_study.jsonl
"""

import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from cfpp_rt.bench import harness
from cfpp_rt.bench.latency.compare import Row, read_rows

COLUMNS = {  # figure, heading, digits
    "follow": ("frames that follow", 3),
    "follow_moving": ("of those that move", 3),
    "error_16_px": ("error, px: frame 16", 2),
    "error_64_px": ("64", 2),
    "error_300_px": ("300", 2),
    "clean": ("clean", 3),
    "colour": ("colour drift", 3),
}
_LAYOUTS = {"frame": "frame-wise", "chunk": "chunk-wise"}
_ORDER = ("ar", "ode", "cd", "ar+dmd", "ode+dmd", "cd+dmd")

Key = tuple[str, str, int]  # layout, student without its seed, number of steps


def split(name: str) -> tuple[str, str, str]:
    """Split a name such as `frame-cd+dmd-s1` into layout, student and seed; a teacher has no seed."""
    layout, student, seed = re.fullmatch(r"(\w+)-([\w+]+?)(?:-s(\d+))?", name).groups(default="")  # type: ignore[union-attr]
    return layout, student, seed


def groups(rows: Sequence[Row]) -> dict[Key, dict[str, list[Row]]]:
    """Return the evaluations by layout, student and number of steps, then by training seed."""
    evaluations: dict[Key, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["bench"] == "world_eval":
            layout, student, seed = split(row["student"])
            evaluations[layout, student, len(row["steps"])][seed].append(row)
    order = sorted(evaluations, key=lambda key: (list(_LAYOUTS).index(key[0]), _ORDER.index(key[1]), key[2]))
    return {key: evaluations[key] for key in order}


def spread(by_seed: dict[str, list[Row]], figure: str) -> tuple[float, float, float]:
    """Return mean, minimum and maximum of a metric over training seeds, each the mean of its evaluations.

    With one training seed they are over its evaluations.
    """
    values = [statistics.mean(row[figure] for row in rows) for rows in by_seed.values()]
    if len(values) == 1:
        values = [row[figure] for rows in by_seed.values() for row in rows]
    return statistics.mean(values), min(values), max(values)


def table(rows: Sequence[Row]) -> str:
    """Return one line per student, layout and number of steps: mean, and half the range."""
    evaluations = groups(rows)
    lines = ["| student | blocks | steps | seeds | " + " | ".join(heading for heading, _ in COLUMNS.values()) + " |"]
    lines.append("| --- " * (4 + len(COLUMNS)) + "|")
    for (layout, student, steps), by_seed in evaluations.items():
        cells = [student.replace("+", ", then "), _LAYOUTS[layout], str(steps), str(len(by_seed))]
        for figure, (_, digits) in COLUMNS.items():
            if all(figure in row for rows in by_seed.values() for row in rows):
                mean, low, high = spread(by_seed, figure)
                cells.append(f"{mean:.{digits}f} ± {(high - low) / 2:.{digits}f}")
            else:
                cells.append("")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def costs(rows: Sequence[Row]) -> str:
    """Return the costs of stage 2 besides the student's own passes."""
    lines = ["| stage 2 | blocks | clips of the student | other network evaluations | stored bytes |"]
    lines.append("| --- " * 5 + "|")
    for row in rows:
        if row["bench"] == "world_stage2":
            figures = (f"{row[key]:,}" for key in ("student_clips", "network_evaluations", "stored_bytes"))
            lines.append(f"| {row['stage']} | {_LAYOUTS[row['layout']]} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def paces(rows: Sequence[Row]) -> str:
    """Return the speed of one player alone, medians."""
    speeds: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["bench"] == "world_pace":
            speeds[row["layout"], len(row["steps"])].append(dict(row))
    lines = ["| blocks | steps | first frame, ms | frames per second |", "| --- " * 4 + "|"]
    for (layout, steps), measured in speeds.items():
        first, fps = (statistics.median(row[key] for row in measured) for key in ("first_ms", "fps"))
        lines.append(f"| {_LAYOUTS[layout]} | {steps} | {first:.1f} | {fps:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("rows", help="study.jsonl, written by world_study.run")
    rows = read_rows(parser.parse_args().rows)
    print("\n\n".join((table(rows), costs(rows), paces(rows))))


if __name__ == "__main__":
    main()
