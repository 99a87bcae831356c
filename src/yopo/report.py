"""How large a model is, what a plan would leave of it, and tables and plots of results."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from torch import nn

from yopo.adapters import Ffn
from yopo.errors import YopoError


@dataclass(frozen=True, slots=True)
class Sizes:
    """Count a model, tied weights once.

    Attributes:
        parameters: Numbers in all weights.
        bytes: Memory of all weights.
        ffn_rows: Rows of all FFNs.
        ffn_parameters: Numbers that belong to rows of FFNs.
    """

    parameters: int
    bytes: int
    ffn_rows: int
    ffn_parameters: int


def sizes_of(
    model: nn.Module, ffns: Sequence[Ffn], widths: Mapping[str, int] | None = None
) -> Sizes:
    """Count `model` as it is, or as it would be if its FFNs had other widths, given by name."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    rows = ffn_parameters = 0
    for ffn in ffns:
        kept = ffn.rows if widths is None else widths[ffn.name]
        rows += kept
        ffn_parameters += kept * ffn.parameters_per_row
        parameters -= (ffn.rows - kept) * ffn.parameters_per_row
        size -= (ffn.rows - kept) * ffn.bytes_per_row
    return Sizes(parameters, size, rows, ffn_parameters)


def describe_ffns(ffns: Sequence[Ffn]) -> str:
    """Return a table of the FFNs of a model, one line for each kind."""
    kinds: dict[tuple[int, int, int, str], list[str]] = defaultdict(list)
    for ffn in ffns:
        field = "fixed by the architecture" if ffn.width is None else str(ffn.width)
        columns = ffn.expand_weights()[0].shape[1]
        kinds[ffn.rows, columns, len(ffn.expand), field].append(ffn.name)
    lines = [["FFNs", "first", "rows", "width in", "matrices", "config field"]]
    for (rows, columns, expand, field), names in kinds.items():
        matrices = "gated" if expand == 2 else "plain"
        lines.append([f"{len(names)}", names[0], f"{rows}", f"{columns}", matrices, field])
    return format_table(lines)


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Return `rows`, the first of which is the header, as a Markdown table in even columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def plot_perplexities(
    path: str | Path,
    ratios: Sequence[float],
    perplexities: Mapping[str, Sequence[float]],
    *,
    dense: float,
    title: str,
) -> None:
    """Draw perplexity against ratio, a line for each method, and save it as `path`.

    Methods whose names begin with "calibrated" are dashed. The legend of many lines stands beside
    the plot, where it covers none.

    Raises:
        YopoError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise YopoError(
            'plots need matplotlib: pip install "yopo-prune[plot]" (not "yopo", which is another '
            "project)."
        ) from error
    crowded = len(perplexities) > 6
    figure = Figure(figsize=(9.0, 4.5) if crowded else (7.0, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(dense, color="0.5", linestyle=":", label="dense")
    for (name, values), marker in zip(perplexities.items(), cycle("os^vDPX<>"), strict=False):
        style: dict[str, Any] = {"color": "crimson", "linewidth": 3.0} if name == "yopo" else {}
        if name.startswith("calibrated"):
            style["linestyle"] = "--"
        axes.plot(ratios, values, marker=marker, label=name, **style)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.tick_params(which="minor", labelsize=8)
    axes.set(xlabel="ratio (share of FFN rows removed)", ylabel="perplexity", title=title)
    axes.grid(alpha=0.3, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    beside = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if crowded else {}
    axes.legend(frameon=False, **beside)
    figure.savefig(path, dpi=150)
