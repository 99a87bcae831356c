"""Plots of what was learned and measured."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from statistics import median, quantiles
from typing import Any

from yopo.plots.canvas import (
    ACCENT,
    COLOURS,
    DENSE,
    PRUNED,
    Target,
    check_any,
    drawn,
    set_logarithmic,
    shortened,
)
from yopo.reinforce import Episode
from yopo.speed.result import PHASES, Speed, SpeedReport


def plot_perplexities(
    path: Target,
    ratios: Sequence[float],
    perplexities: Mapping[str, Sequence[float]],
    *,
    dense: float,
    title: str = "",
) -> None:
    """Draw perplexity against ratio, a line for each method.

    Methods whose names begin with "calibrated" are dashed. The legend of many lines stands beside
    the plot, where it covers none.

    Raises:
        YopoError: If matplotlib is not installed.
    """
    crowded = len(perplexities) > 6
    with drawn(path, 9.0 if crowded else 7.0, 4.5, title) as figure:
        axes = figure.subplots()
        axes.axhline(dense, color=DENSE, linestyle=":", label="dense")
        colours, markers = cycle(COLOURS), cycle("os^vDPX<>")
        for name, values in perplexities.items():
            is_ours = name == "yopo"
            axes.plot(
                ratios,
                values,
                label=shortened(name, 40),
                color=ACCENT if is_ours else next(colours),
                marker=next(markers),
                linewidth=3.0 if is_ours else 1.8,
                linestyle="--" if name.startswith("calibrated") else "-",
                zorder=3 if is_ours else 2,
            )
        axes.set(xlabel="ratio (share of FFN rows removed)", ylabel="perplexity")
        set_logarithmic(axes)
        beside = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if crowded else {}
        axes.legend(**beside)


def plot_rewards(path: Target, history: Sequence[Episode], *, title: str = "") -> None:
    """Draw the reward by episode, and the KS distance where that is what was learned.

    Of several FFNs it is the median, the middle 80 % of them, and the range.

    Args:
        path: Where to.
        history: That of a pruner.
        title: What stands above.

    Raises:
        InvalidArgumentError: If nothing was learned.
        YopoError: If matplotlib is not installed.
    """
    check_any("history", history)
    has_ks = all(episode.ks for episode in history)
    with drawn(path, 7.0, 6.5 if has_ks else 4.0, title) as figure:
        grid = figure.subplots(2 if has_ks else 1, 1, sharex=True, squeeze=False)[:, 0]
        rewards = [episode.reward for episode in history]
        numbers = [episode.number + 1 for episode in history]
        _draw_spread(grid[0], numbers, rewards)
        grid[0].set_ylabel("reward")
        values = [value for reward in rewards for value in reward]
        if min(values) > 0 and max(values) > 50 * median(values):  # some spectra do not differ
            set_logarithmic(grid[0])
        if has_ks:
            _draw_spread(grid[1], numbers, [episode.ks for episode in history])
            if all(episode.best_ks for episode in history):
                best = [median(episode.best_ks) for episode in history]
                label = "rows that the policy prefers"
                grid[1].plot(numbers, best, color=ACCENT, marker="s", markersize=4, label=label)
            grid[1].set_ylabel("KS distance")
        grid[-1].set_xlabel("episode")
        grid[-1].set_xlim(numbers[0] - 0.5, numbers[-1] + 0.5)
        grid[-1].xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        figure.legend(*grid[-1].get_legend_handles_labels(), loc="outside lower center", ncols=2)


def plot_speed(path: Target, speed: SpeedReport, *, title: str = "") -> None:
    """Draw tokens a second of a model, and of the one it was timed against, beside their bounds.

    Bars are medians, lines run from the least to the most.

    Args:
        path: Where to.
        speed: What was measured.
        title: What stands above.

    Raises:
        YopoError: If matplotlib is not installed.
    """
    speeds = [speed.model] if speed.against is None else [speed.against, speed.model]
    phases = [phase for phase in PHASES if any(getattr(s, phase) for s in speeds)]
    with drawn(path, 1.0 + 3.5 * len(phases), 4.2, title) as figure:
        grid = figure.subplots(1, len(phases), squeeze=False)[0]
        for axes, phase in zip(grid, phases, strict=True):
            for place, one in enumerate(speeds):
                colour = PRUNED if one is speed.model else DENSE
                _draw_speed(axes, place, one, phase, colour)
            times = speed.speed_up(phase)
            told = phase if times is None else f"{phase}: {times:.2f} times as fast"
            axes.set(title=told, xlim=(-0.6, len(speeds) - 0.4))
            axes.set_xticks([])
            axes.set_ylim(0, 1.15 * axes.dataLim.y1)
            axes.yaxis.set_major_formatter("{x:,g}")
        grid[0].set_ylabel("tokens per second")
        handles, labels = grid[0].get_legend_handles_labels()
        shown = dict(zip(labels, handles, strict=True))
        figure.legend(shown.values(), shown.keys(), loc="outside lower center")


def _draw_spread(axes: Any, numbers: Sequence[int], values: Sequence[Sequence[float]]) -> None:
    """Draw the median of several values by episode, and how they spread."""
    label = "draws"
    if len(values[0]) > 1:
        tenths = [quantiles(found, n=10, method="inclusive") for found in values]
        bands = (
            ([min(found) for found in values], [max(found) for found in values], "all FFNs", 0.12),
            ([t[0] for t in tenths], [t[-1] for t in tenths], "the middle 80 % of them", 0.25),
        )
        for lows, highs, told, alpha in bands:
            shade = {"color": PRUNED, "alpha": alpha, "linewidth": 0, "label": told}
            axes.fill_between(numbers, lows, highs, **shade)
        label = "draws, median FFN"
    middle = [median(found) for found in values]
    axes.plot(numbers, middle, color=PRUNED, marker="o", markersize=4, label=label)


def _draw_speed(axes: Any, place: int, speed: Speed, phase: str, colour: str) -> None:
    found, bound = getattr(speed, phase), getattr(speed, f"{phase}_bound")
    if not found or bound is None:
        return
    middle, name = median(found), shortened(speed.name, 50)
    axes.bar(place, middle, 0.6, color=colour, label=name)
    axes.vlines(place, min(found), max(found), color="black", linewidth=1.2, label="least to most")
    axes.hlines(bound, place - 0.38, place + 0.38, color=ACCENT, linewidth=3, label="bound")
    style = {"color": "white", "ha": "center", "va": "center"}
    axes.annotate(f"{middle:,.{0 if middle >= 100 else 1}f}", (place, middle / 2), **style)
