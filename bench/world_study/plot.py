"""Plot the figure of docs/distillation.md: drift of the agent against the number of steps, for every student.

python -m cfpp_rt.bench.world_study.plot bench/results/amd-epyc-2core/world_study.jsonl docs/world_study
"""

from cfpp_rt.bench import harness
from cfpp_rt.bench.latency.compare import read_rows
from cfpp_rt.bench.world_study.table import groups, spread

_PANELS = {"error_300_px": "error after 300 frames, pixels", "clean": "share of clean frames"}
_LAYOUTS = {"frame": "frame-wise", "chunk": "chunk-wise"}
_COLOURS = {"ar": "#7f7f7f", "ode": "#c55a11", "cd": "#1f4e79"}
_STEPS = (1, 2, 4)


def draw(path: str, out: str) -> None:
    """Write out.png and out.svg.

    Dashed: before dmd. Bars: minimum to maximum over seeds. Dotted: the teacher with many steps.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    evaluations = groups(read_rows(path))
    panels = {
        key: label
        for key, label in _PANELS.items()
        if all(key in r for g in evaluations.values() for rs in g.values() for r in rs)
    }
    figure, axes = plt.subplots(
        len(panels), len(_LAYOUTS), figsize=(9, 3.2 * len(panels)), sharey="row", squeeze=False, constrained_layout=True
    )
    for row, (key, label) in enumerate(panels.items()):
        for axis, (layout, heading) in zip(axes[row], _LAYOUTS.items(), strict=True):
            students = {student for kind, student, _ in evaluations if kind == layout}
            for position, student in enumerate(sorted(students, key=lambda name: (name.count("+"), name))):
                steps = [n for n in _STEPS if (layout, student, n) in evaluations]
                means, low, high = zip(*(spread(evaluations[layout, student, n], key) for n in steps), strict=True)
                bars = [
                    [m - a for m, a in zip(means, low, strict=True)],
                    [b - m for m, b in zip(means, high, strict=True)],
                ]
                colour, style = _COLOURS[student.split("+")[0]], "-" if "+" in student else "--"
                at = [
                    n * (1 + 0.03 * (position - len(students) / 2)) for n in steps
                ]  # side by side, so that bars do not overlap
                name = student.replace("+", ", then ")
                axis.errorbar(at, means, bars, fmt=f"o{style}", color=colour, label=name, capsize=2, markersize=4)
            many = [n for kind, student, n in evaluations if (kind, student) == (layout, "ar") and n not in _STEPS]
            for n in many:
                mean = spread(evaluations[layout, "ar", n], key)[0]
                axis.axhline(mean, color="#7f7f7f", linestyle=":", label=f"ar, {n} steps")
            axis.set(xscale="log", xticks=_STEPS, title=heading if row == 0 else "")
            axis.set_xlabel("sampling steps" if row == len(panels) - 1 else "")
            axis.set_xticklabels([str(n) for n in _STEPS])
            axis.minorticks_off()
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(axis="y", color="#dddddd")
        axes[row][0].set_ylabel(label)
        axes[row][0].set_ylim(bottom=0)
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, frameon=False, loc="outside lower center", ncols=len(names), fontsize=8)
    for suffix in ("png", "svg"):
        figure.savefig(f"{out}.{suffix}", dpi=150)


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("rows", help="study.jsonl, written by world_study.run")
    parser.add_argument("out", help="path of the figures, without suffix")
    arguments = parser.parse_args()
    draw(arguments.rows, arguments.out)


if __name__ == "__main__":
    main()
