"""The figure of docs/distillation.md: how far the agent drifts, against the number of steps, for every student.

python -m cfpp_rt.bench.plot_world bench/results/amd-epyc-2core/world_eval.jsonl docs/world_eval
"""

import argparse
import statistics
from collections import defaultdict
from typing import Any

from cfpp_rt.bench.compare import read_rows

_PANELS = {"error_px": "mean position error, pixels", "clean": "share of clean pictures"}
_COLOURS = ("#1f4e79", "#c55a11", "#548235", "#7f7f7f")


def groups(path: str) -> dict[str, dict[int, list[dict[str, Any]]]]:
    """Rows by student and number of steps."""
    found: dict[str, dict[int, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in read_rows(path):
        found[row["student"]][len(row["steps"])].append(row)
    return found


def draw(path: str, out: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    students = groups(path)
    starts = sorted({name.split("+")[0] for name in students})
    figure, axes = plt.subplots(1, len(_PANELS), figsize=(10, 3.6), constrained_layout=True)
    for axis, (key, label) in zip(axes, _PANELS.items(), strict=True):
        for name, by_steps in students.items():
            steps = sorted(by_steps)
            values = [[row[key] for row in by_steps[n]] for n in steps]
            means = [statistics.mean(each) for each in values]
            spread = [[m - min(v) for m, v in zip(means, values, strict=True)]]
            spread.append([max(v) - m for m, v in zip(means, values, strict=True)])
            colour = _COLOURS[starts.index(name.split("+")[0]) % len(_COLOURS)]
            style = "-" if "+" in name else "--"
            axis.errorbar(steps, means, spread, fmt=f"o{style}", color=colour, label=name, capsize=3, markersize=4)
        axis.set(xscale="log", xlabel="sampling steps", ylabel=label, xticks=(1, 2, 4), ylim=(0, None))
        axis.set_xticklabels(["1", "2", "4"])
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#dddddd")
    axes[-1].legend(frameon=False, loc="lower right")
    for suffix in ("png", "svg"):
        figure.savefig(f"{out}.{suffix}", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", help="JSON lines of cfpp world-eval")
    parser.add_argument("out", help="where to draw, without suffix")
    arguments = parser.parse_args()
    draw(arguments.rows, arguments.out)


if __name__ == "__main__":
    main()
