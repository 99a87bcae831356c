"""Plots of the FFNs of a model: up to twelve in panels, more summed up."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from yopo.plots.canvas import (
    ACCENT,
    DENSE,
    PANELS,
    PRUNED,
    Target,
    check_any,
    drawn,
    label_panels,
    panels,
    pattern,
    set_logarithmic,
    short_names,
)

_SHARE = "share of the singular values"


def plot_spectra(
    path: Target,
    spectra: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    ks: Mapping[str, float],
    *,
    title: str = "",
) -> None:
    """Draw the singular values of FFNs before and after: up to twelve in panels, more summed up.

    In a panel, the largest distance from curve to curve along the horizontal is the KS distance.

    Args:
        path: Where to.
        spectra: For each FFN, singular values of its gate matrix and of the rows kept, descending;
            all of them, or as many evenly spaced ones as will do.
        ks: The distance of each FFN.
        title: What stands above.

    Raises:
        InvalidArgumentError: If there are no spectra.
        YopoError: If matplotlib is not installed.
    """
    check_any("spectra", spectra)
    names, labels = list(spectra), short_names(list(spectra))
    if len(names) <= PANELS:
        with panels(path, len(names), title) as (figure, grid):
            for axes, name, label in zip(grid, names, labels, strict=True):
                _draw_spectrum(axes, spectra[name], f"{label}\nKS {ks[name]:.3f}")
            set_logarithmic(*grid)
            label_panels(figure, grid, _SHARE, "singular value")
            grid[0].legend(loc="upper right")
        return
    with drawn(path, 9.0, 9.0, title) as figure:
        shape = [["by depth"] * 3, ["ks"] * 3, ["least", "middle", "most"]]
        grid = figure.subplot_mosaic(shape, height_ratios=[1.3, 0.9, 1.2])
        _draw_by_depth(grid["by depth"], list(spectra.values()))
        grid["ks"].plot([ks[name] for name in names], color=PRUNED)
        grid["ks"].set(ylabel="KS distance", xlabel=pattern(names), ylim=(0, None))
        grid["ks"].sharex(grid["by depth"])
        ranked = sorted(names, key=lambda name: ks[name])
        shown = ranked[0], ranked[len(ranked) // 2], ranked[-1]
        for key, name in zip(shape[2], shown, strict=True):
            told = f"{labels[names.index(name)]}\n{key} KS, {ks[name]:.3f}"
            _draw_spectrum(grid[key], spectra[name], told)
            set_logarithmic(grid[key])
            grid[key].set_xlabel(_SHARE)
        grid["least"].set_ylabel("singular value")


def plot_kept_rows(
    path: Target,
    kept: Mapping[str, Sequence[float]],
    *,
    score: str = "score",
    title: str = "",
) -> None:
    """Draw which share of the rows of each FFN was kept, by the score of the rows.

    Up to twelve FFNs get a panel each, more are lines of one picture.

    Args:
        path: Where to.
        kept: For each FFN, the share kept of equal parts of its rows, lowest score first, as
            `kept_by_score` returns it.
        score: What the score is called.
        title: What stands above.

    Raises:
        InvalidArgumentError: If there are no FFNs.
        YopoError: If matplotlib is not installed.
    """
    check_any("kept", kept)
    names, labels = list(kept), short_names(list(kept))
    order = f"rows in the order of their {score}, lowest first, %"
    if len(names) <= PANELS:
        with panels(path, len(names), title) as (figure, grid):
            for axes, name, label in zip(grid, names, labels, strict=True):
                part = 100 / len(kept[name])
                at = [part * (n + 0.5) for n in range(len(kept[name]))]
                axes.bar(at, [100 * share for share in kept[name]], 0.9 * part, color=PRUNED)
                mean = 100 * fmean(kept[name])
                axes.axhline(mean, color=ACCENT, linestyle="--")
                axes.set(ylim=(0, 105), xlim=(0, 100), title=f"{label}\nkept {mean:.1f} % (dashed)")
                axes.set_xticks((0, 50, 100))
            label_panels(figure, grid, order, "kept, %")
        return
    with drawn(path, 9.0, 6.5, title) as figure:
        left, right = figure.subplots(1, 2, width_ratios=[4, 1], sharey=True)
        picture = left.imshow(
            [[100 * share for share in kept[name]] for name in names],
            aspect="auto",
            cmap="cividis",
            vmin=0,
            vmax=100,
            extent=(0, 100, len(names) - 0.5, -0.5),
            interpolation="nearest",
        )
        left.grid(visible=False)
        left.set(xlabel=order, ylabel=pattern(names))
        right.plot([100 * fmean(kept[name]) for name in names], range(len(names)), color=PRUNED)
        right.set(xlabel="kept of all, %", xlim=(0, 105))
        figure.colorbar(picture, ax=left, location="top", label="kept, %", aspect=50, pad=0.02)


def _draw_spectrum(axes: Any, pair: tuple[Sequence[float], Sequence[float]], title: str) -> None:
    """Draw singular values before and after; those that count as 0 are left out of the log."""
    for values, colour, label in zip(pair, (DENSE, PRUNED), ("before", "after"), strict=True):
        share = [n / max(1, len(values) - 1) for n in range(len(values))]
        axes.plot(share, [value or None for value in values], color=colour, label=label)
    axes.lines[0].set_linestyle("--")
    axes.set_title(title)


def _draw_by_depth(axes: Any, pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> None:
    """Draw a few singular values of each FFN, before and after, along the depth of the model."""
    for share, told in ((0.0, "largest"), (0.5, "median"), (0.9, "9 of 10\nare larger")):
        for side, colour, label in ((0, DENSE, "before"), (1, PRUNED, "after")):
            values = [pair[side][round(share * (len(pair[side]) - 1))] or None for pair in pairs]
            style = {"color": colour, "linestyle": "-" if side else "--", "linewidth": 1.4}
            axes.plot(values, label=label if share == 0 else None, **style)
        # Of singular values that count as 0 nothing is drawn.
        if values[-1] is not None:
            axes.annotate(
                told,
                (len(values) - 1, values[-1]),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
            )
    axes.set(ylabel="singular value")
    set_logarithmic(axes)
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, borderaxespad=0.0)
