"""The look of all plots: colours, panels, logarithmic axes, and names short enough for them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import log10
from pathlib import Path
from typing import IO, Any

from yopo.errors import InvalidArgumentError, missing_extra

Target = str | Path | IO[bytes]

DENSE, PRUNED, ACCENT = "#767676", "#0072B2", "#D55E00"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#000000")
"""Of Okabe and Ito; their vermilion is kept for what is to stand out."""

PANELS = 12
"""So many FFNs get a panel each; more are summed up."""

_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 10,
    "figure.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "text.parse_math": False,  # names may have dollars in them
    "svg.hashsalt": "yopo",  # else no two drawings are the same file
}


@contextmanager
def drawn(path: Target, width: float, height: float, title: str) -> Iterator[Any]:
    """Give an empty figure, and write it to `path`.

    Raises:
        YopoError: If matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("plots need matplotlib", "plot") from error
    with rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        if title:
            figure.suptitle(shortened(title, int(10 * width)))
        yield figure
        if not isinstance(path, str | Path):
            figure.savefig(path, format="svg", metadata={"Date": None})
        else:
            is_svg = Path(path).suffix == ".svg"
            figure.savefig(path, dpi=150, metadata={"Date": None} if is_svg else None)


@contextmanager
def panels(path: Target, count: int, title: str) -> Iterator[tuple[Any, list[Any]]]:
    """Give a figure of as many panels, of which those not needed are blank."""
    columns = {1: 1, 2: 2, 3: 3, 4: 2, 5: 3, 6: 3}.get(count, 4)
    rows = -(-count // columns)
    width = 6.0 if count == 1 else 1.0 + 2.7 * columns
    with drawn(path, width, 4.0 if count == 1 else 0.8 + 2.4 * rows, title) as figure:
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
        for axes in grid[count:]:
            axes.remove()
        yield figure, list(grid[:count])


def label_panels(figure: Any, grid: Sequence[Any], x: str, y: str) -> None:
    """Label the axes once for all panels, and number the lowest panel of every column."""
    figure.supxlabel(x, fontsize=10)
    figure.supylabel(y, fontsize=10)
    last = {axes.get_subplotspec().colspan.start: axes for axes in grid}
    for axes in last.values():
        axes.tick_params(labelbottom=True)


def set_logarithmic(*grid: Any) -> None:
    """Make the vertical axes logarithmic, with as many labels as their range needs."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    low = min(axes.dataLim.y0 for axes in grid)
    high = max(axes.dataLim.y1 for axes in grid)
    decades = log10(high / low) if 0 < low < high else 0.0
    for axes in grid:
        axes.set_yscale("log")
        if 0 < decades < 0.7:
            axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        elif decades < 2.5:
            between = (1, 1.5, 2, 3, 5, 7) if decades < 1.2 else (1, 2, 5)
            axes.yaxis.set_major_locator(LogLocator(subs=between))
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.15, which="minor")


def check_any(name: str, given: Any) -> None:
    """Check that there is something to draw.

    Raises:
        InvalidArgumentError: If there is not.
    """
    if not given:
        raise InvalidArgumentError(f"`{name}` is empty: there is nothing to draw.")


def short_names(names: Sequence[str]) -> list[str]:
    """Return what tells names apart: the parts of them that are not the same in all."""
    if len(names) == 1:
        return [shortened(names[0], 60)]
    start, end = _common(names)
    short = [
        ".".join(name.split(".")[len(start) : name.count(".") + 1 - len(end)]) for name in names
    ]
    known = start[-1] + "." if start else ""
    return [shortened(known + name, 28) for name in short]


def pattern(names: Sequence[str]) -> str:
    """Return what an axis along FFNs is called: their number, and what their names share."""
    start, end = _common(names)
    return "FFN: " + shortened(".".join([*start, "n", *end]), 60)


def shortened(text: str, most: int) -> str:
    """Return text with its middle left out where it is too long."""
    if len(text) <= most:
        return text
    tail = most // 2
    return f"{text[: most - tail - 1]}…{text[-tail:]}"


def _common(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the parts that all names begin and end with."""
    parts = [name.split(".") for name in names]
    shortest = min(len(part) for part in parts) - 1
    start = 0
    while start < shortest and len({part[start] for part in parts}) == 1:
        start += 1
    end = 0
    while end < shortest - start and len({part[-1 - end] for part in parts}) == 1:
        end += 1
    return parts[0][:start], parts[0][len(parts[0]) - end :]
