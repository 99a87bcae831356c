"""How the cost of training grows: seconds and peak memory against what it depends on.

    python benchmarks/scaling.py

Trains on OPT models with random weights, of which one size at a time grows by doubling: layers,
d_ff, d_model and episodes of `PolicyPruner.prunenet()`, and samples per episode of
`PolicyPruner(reward="spectral")`. Each point runs as often as `--repeats` says, in a process of its
own, warmed up on a tiny model; the least seconds and the most memory count. Exponents are the
slopes of straight lines through the logarithms, by least squares over all points, nothing
subtracted; beside them stands the slope between the two largest.

Writes docs/results/scaling.json, .md and .png.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np

import common
from fit import RATIO, Child, our_child
from yopo.report import format_table

BASE = {"layers": 4, "rows": 2048, "width": 512, "episodes": 8}
"""What does not grow; rows is d_ff, width d_model."""

Sweep = dict[str, Any]
SWEEPS: dict[str, Sweep] = {
    "layers": {"values": (4, 8, 16, 32, 64), "time": (1, 1), "memory": (0, 1)},
    "d_ff": {
        "key": "rows",
        "values": (2048, 4096, 8192, 16384, 32768),
        "fixed": {"layers": 2},
        "time": (0, 1),
        "memory": (0, 1),
    },
    "d_model": {
        "key": "width",
        "values": (256, 512, 1024, 2048),
        "fixed": {"layers": 2, "rows": 4096, "episodes": 4},
        "time": (2, 3),
        "memory": (1, 2),
    },
    "episodes": {"values": (8, 16, 32, 64, 128), "time": (1, 1), "memory": (0, 0)},
    "samples": {
        "values": (4, 8, 16, 32, 64),
        "fixed": {"layers": 2, "episodes": 4},
        "time": (1, 1),
        "memory": (0, 1),
    },
}
"""Each variable: the values, what else differs from the base, and the exponents expected."""

WHY = {
    "layers": (
        "every layer is drawn from once an episode; of each the Gram matrix of the whole is kept, "
        "beside a scorer that does not grow"
    ),
    "d_ff": (
        "scoring and Gram matrices grow with the rows, eigenvalues do not; the scorer has a row of "
        "numbers for each"
    ),
    "d_model": (
        "scoring grows with it, a Gram matrix with its square, eigenvalues with its cube; memory "
        "with the scorer, and with the square"
    ),
    "episodes": "each is as much work as another; nothing of them is kept but figures",
    "samples": (
        "each is a matrix of its own; how many are in memory together is for the library to choose"
    ),
}
"""Why the exponents are expected."""

COSTS = {"time": ("seconds", "time of fit"), "memory": ("MiB", "peak above the loaded model")}
"""What is measured, its unit, and the heading of its plots."""


def main() -> None:
    """Measure all points, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    common.quiet()
    with our_child() as child:
        machine = child.ask(
            {"side": "rates", "device": "cpu", "threads": arguments.threads, "numbers": 1000}
        )["machine"]
        rows = [
            {"variable": name, "machine": machine, **point}
            for name in SWEEPS
            for point in measure(child, name, arguments.threads, arguments.repeats)
        ]
    common.keep_result("scaling", rows)
    (common.RESULTS / "scaling.md").write_text(page(rows), encoding="utf-8")
    plot(common.RESULTS / "scaling.png", rows)
    print(page(rows))


def measure(child: Child, name: str, threads: int, repeats: int) -> list[dict[str, Any]]:
    """Return a point for each value of a variable."""
    sweep = SWEEPS[name]
    points = []
    for value in sweep["values"]:
        sizes = BASE | sweep.get("fixed", {}) | {sweep.get("key", name): value}
        job = {
            "side": "yopo",
            "shape": {"family": "opt", "vocabulary": 64, **sizes},
            "device": "cpu",
            "threads": threads,
            "ratio": RATIO,
            "episodes": sizes["episodes"],
            "samples": sizes.get("samples"),
            "warm": True,
        }
        answers = [child.ask(job) for _ in range(repeats)]
        for answer in answers:
            if "error" in answer:
                raise RuntimeError(f"{name} = {value}: {answer['error']}")
        points.append(
            {
                "value": value,
                "time": min(answer["seconds"] for answer in answers),
                "memory": max(answer["mebibytes"] for answer in answers),
            }
        )
        print(name, points[-1], flush=True)
    return points


def fitted(values: list[float], costs: list[float]) -> tuple[float, float]:
    """Return exponent and factor of the power law `factor · value ** exponent` nearest to costs."""
    exponent, constant = np.polyfit(np.log(values), np.log(costs), 1)
    return float(exponent), math.exp(constant)


def page(rows: list[dict[str, Any]]) -> str:
    """Return the page: the exponents, and the points."""
    exponents = [["cost", "against", "exponent", "between the last two", "expected"]]
    points = [["variable", "value", "seconds", "MiB"]]
    for name in dict.fromkeys(row["variable"] for row in rows):
        values = [row["value"] for row in rows if row["variable"] == name]
        for cost in COSTS:
            costs = _costs(rows, name, cost)
            last = fitted(values[-2:], costs[-2:])[0]
            shown = [f"{fitted(values, costs)[0]:.2f}", f"{last:.2f}", _expected(name, cost)]
            exponents.append([cost, name, *shown])
        points += [
            [name, f"{row['value']}", f"{row['time']:.3f}", f"{row['memory']:.1f}"]
            for row in rows
            if row["variable"] == name
        ]
    base = ", ".join(f"{key} {value}" for key, value in BASE.items())
    fixed = "; ".join(
        f"with {name}: " + ", ".join(f"{key} {value}" for key, value in sweep["fixed"].items())
        for name, sweep in SWEEPS.items()
        if "fixed" in sweep
    )
    return "\n".join(
        [
            "# How the cost of training grows",
            "",
            "![Seconds and memory against each variable](scaling.png)",
            "",
            " ".join(__doc__.split("\n\n")[2].split()),
            "",
            f"What does not grow: {base} (rows are d_ff, width d_model); {fixed}. The ratio is "
            f"{RATIO}. Memory is the peak above the loaded model. Measured on "
            f"{rows[0]['machine']}.",
            "",
            format_table(exponents),
            "",
            "What is expected, and why:",
            "",
            *(f"* {name}: {why}." for name, why in WHY.items()),
            "",
            format_table(points),
            "",
        ]
    )


def plot(path: Path, rows: list[dict[str, Any]]) -> None:
    """Draw a line of plots for each variable, seconds on the left and memory on the right."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    names = list(dict.fromkeys(row["variable"] for row in rows))
    figure = Figure(figsize=(9.5, 2.7 * len(names)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.1)
    grid = figure.subplots(len(names), 2, squeeze=False)
    for axes, (_, heading) in zip(grid[0], COSTS.values(), strict=True):
        axes.set_title(heading)
    for line, name in zip(grid, names, strict=True):
        values = [row["value"] for row in rows if row["variable"] == name]
        for axes, (cost, (unit, _)) in zip(line, COSTS.items(), strict=True):
            costs = _costs(rows, name, cost)
            exponent, factor = fitted(values, costs)
            label = f"exponent {exponent:.2f}, expected {_expected(name, cost)}"
            color = "crimson" if cost == "time" else "tab:blue"
            axes.plot(values, [factor * value**exponent for value in values], "0.6", label=label)
            axes.plot(values, costs, "o", color=color)
            axes.set(xscale="log", yscale="log", xlabel=name, ylabel=unit)
            axes.set_ylim(min(costs) / 2, max(*costs, 4 * min(costs)) * 3)
            axes.set_xticks(values, [f"{value}" for value in values])
            axes.xaxis.set_minor_locator(NullLocator())
            wide = max(costs) > 100 * min(costs)
            axes.yaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False, loc="upper left")
    figure.align_ylabels()
    figure.savefig(path, dpi=120)


def _costs(rows: list[dict[str, Any]], name: str, cost: str) -> list[float]:
    """Return what the points of a variable cost; memory below what is told apart is that."""
    return [
        max(row[cost], 0.1 if cost == "memory" else 0.0) for row in rows if row["variable"] == name
    ]


def _expected(name: str, cost: str) -> str:
    least, most = SWEEPS[name][cost]
    return f"{least}" if least == most else f"{least} … {most}"


if __name__ == "__main__":
    main()
