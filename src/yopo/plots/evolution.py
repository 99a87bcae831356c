"""The plot of a search for a symbolic metric, beside the random search that it has to beat."""

from collections.abc import Sequence
from math import isfinite
from typing import Any

from yopo.errors import InvalidArgumentError
from yopo.plots.canvas import ACCENT, DENSE, PRUNED, Target, drawn, set_logarithmic
from yopo.symbolic.history import Candidate, Evolution, best_so_far

_SPREAD, _HIGHEST = 4.0, 10.0
"""From how many times the least fitness on the axis is logarithmic, and where it ends."""


def plot_evolution(path: Target, evolution: Evolution, *, title: str = "") -> None:
    """Draw the fitness of each expression that was evaluated, and the best so far of each search.

    Expressions that are more than ten times as bad as the best are triangles at the upper edge, as
    the axis would show nothing but their differences. Left of the thin line are those that were
    drawn at random to begin with.

    Args:
        path: Where to.
        evolution: What was found.
        title: What stands above.

    Raises:
        InvalidArgumentError: If no fitness is finite.
        YopoError: If matplotlib is not installed.
    """
    both = (*evolution.history, *evolution.random)
    values = [candidate.fitness for candidate in both if isfinite(candidate.fitness)]
    if not values:
        raise InvalidArgumentError("`evolution` has no finite fitness: there is nothing to draw.")
    least, most = min(values), max(values)
    highest = min(_HIGHEST * least, most) if least > 0 else most
    with drawn(path, 7.0, 4.5, title) as figure:
        axes = figure.subplots()
        _draw_each(axes, evolution.history, highest)
        for candidates, label, colour, line in (
            (evolution.random, "random search, best so far", DENSE, "--"),
            (evolution.history, "evolution, best so far", ACCENT, "-"),
        ):
            # Cut off here and not by the axis, whose labels are made for all that is drawn.
            best = [min(value, highest) for value in best_so_far(candidates)]
            style = {"color": colour, "linestyle": line, "drawstyle": "steps-post", "zorder": 3}
            if best:
                axes.plot(range(1, len(best) + 1), best, label=label, **style)
        first = sum(candidate.iteration == 0 for candidate in evolution.history)
        if first < len(evolution.history):
            axes.axvline(first + 0.5, color=DENSE, linewidth=0.8, alpha=0.6, zorder=1)
        if least > 0 and most > _SPREAD * least:
            set_logarithmic(axes)
        if most > highest:
            axes.set_ylim(least / 1.1, highest)
        axes.set(xlabel="expressions evaluated", ylabel="fitness (lower is better)")
        last = max(len(evolution.history), len(evolution.random))
        margin = 0.5 + 0.01 * last
        axes.set_xlim(1 - margin, last + margin)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        figure.legend(loc="outside lower center", ncols=2)


def _draw_each(axes: Any, candidates: Sequence[Candidate], highest: float) -> None:
    """Draw a dot for each expression, and a triangle at the edge for those that are too bad."""
    style = {"color": PRUNED, "linestyle": "", "alpha": 0.5, "markeredgewidth": 0}
    style["markersize"] = 5.0 if len(candidates) <= 100 else 3.5
    shown = [candidate for candidate in candidates if candidate.fitness <= highest]
    places = [candidate.number + 1 for candidate in shown]
    values = [candidate.fitness for candidate in shown]
    axes.plot(places, values, marker="o", label="one expression", **style)
    places = [candidate.number + 1 for candidate in candidates if candidate.fitness > highest]
    if places:
        at_edge = {"transform": axes.get_xaxis_transform(), "clip_on": False}
        told = f"more than {highest:.3g}, or infinite"
        axes.plot(places, [1.0] * len(places), marker="^", label=told, **at_edge, **style)
