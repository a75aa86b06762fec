"""Plot results of `cfpp bench --json`: time per frame of each backend, and latency against visible frames.

    python -m cfpp_rt.bench.latency.plot bench/results/<machine>/latency.jsonl docs/latency [--model world]

writes docs/latency.png and docs/latency.svg. Of several rows of the same measurement the last one counts.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cfpp_rt.bench import harness
from cfpp_rt.bench.latency.compare import Row, read_rows
from cfpp_rt.errors import InputError, MissingExtraError
from cfpp_rt.io.atomic import write_atomically

COLOURS = {"ours": "#1f4e79", "eager": "#c0762e", "compiled": "#7a9a52"}


def choose(rows: Sequence[Row], model: str | None) -> tuple[dict[str, Row], dict[str, list[Row]]]:
    """Return the newest run of a model: by backend its latency row, and its window-fill rows by visible frames.

    Raises InputError if there is none.
    """
    latency = [row for row in rows if row.get("bench") == "latency" and model in (None, row["model"])]
    if not latency:
        raise InputError(f"no latency rows of {model or 'any model'}: write some with cfpp bench --json")
    newest = latency[-1]
    run = [row for row in rows if all(row.get(name) == newest.get(name) for name in ("command", "date", "model"))]
    bars = {row["contender"]: row for row in run if row["bench"] == "latency"}
    curves: dict[str, list[Row]] = {name: [] for name in bars}
    for row in run:
        usual = row.get("block_steps") == len(newest["steps"])  # a first block with more steps is another measurement
        if row["bench"] == "window_fill" and usual:
            curves[row["contender"]].append(row)
    return bars, {name: sorted(curve, key=lambda row: row["visible_frames"]) for name, curve in curves.items()}


def draw(bars: dict[str, Row], curves: dict[str, list[Row]], target: Path) -> list[Path]:
    """Write target.png and target.svg and return their paths."""
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtraError("matplotlib", "bench", "plotting") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams |= {"font.size": 9, "svg.hashsalt": "cfpp", "axes.titlesize": 10, "axes.titlelocation": "left"}
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), constrained_layout=True)
    names = list(bars)
    for position, name in enumerate(names):
        row = bars[name]
        median = row["frame_ms_p50"]
        left.barh(position, median, height=0.6, color=COLOURS[name])
        left.hlines(position, median, row["frame_ms_p90"], color="#333333", linewidth=1)
        left.text(row["frame_ms_p90"], position, f"  {median:.3g} ms", va="center")
    left.set(yticks=range(len(names)), yticklabels=names, xlabel="ms per frame: median, line to the 90th percentile")
    left.set(title="Steady state", xlim=(0, 1.3 * max(row["frame_ms_p90"] for row in bars.values())))
    left.invert_yaxis()
    left.tick_params(axis="y", length=0)
    for name, curve in curves.items():
        visible, ms = ([row[key] for row in curve] for key in ("visible_frames", "block_ms"))
        right.plot(visible, ms, "o-", color=COLOURS[name], markersize=3.5, label=name)
    ticks = sorted({row["visible_frames"] for curve in curves.values() for row in curve})
    right.set(xlabel="visible latent frames", ylabel="ms of one block's passes", title="While the window fills")
    right.set(ylim=(0, 1.25 * max((row["block_ms"] for curve in curves.values() for row in curve), default=1.0)))
    right.set_xticks(ticks if len(ticks) <= 12 else ticks[:: len(ticks) // 7])
    right.legend(frameon=False, loc="lower right")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x" if axis is left else "y", color="#dddddd")
        axis.set_axisbelow(True)
    figure.suptitle(_caption(next(iter(bars.values()))), fontsize=8, color="#555555", x=0.01, ha="left")
    written = []
    for suffix, options in ((".png", {"dpi": 150}), (".svg", {"metadata": {"Date": None}})):
        path = target.with_name(target.name + suffix)
        with write_atomically(path) as temporary:
            figure.savefig(temporary, **options)
        written.append(path)
    plt.close(figure)
    return written


def _caption(row: Row) -> str:
    machine = row.get("gpu") or f"{row['cpu']}, {row['threads']} thread{'' if row['threads'] == 1 else 's'}"
    facts: list[Any] = [row["model"], row["dtype"], f"{row['size']}, batch {row['batch']}", f"refresh {row['refresh']}"]
    return "   ".join(map(str, [*facts, f"decode {row['decode']}", machine, f"torch {row['torch']}", row["commit"]]))


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("results", help="file written by cfpp bench --json")
    parser.add_argument("target", help="path of the plots, without suffix")
    parser.add_argument("--model", help="model whose newest run is drawn (default: the newest run of all)")
    arguments = parser.parse_args()
    bars, curves = choose(read_rows(arguments.results), arguments.model)
    for path in draw(bars, curves, Path(arguments.target)):
        print(path)


if __name__ == "__main__":
    main()
