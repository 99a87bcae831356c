"""What the rows of the quality benchmark say: how good ours is, and against whom."""

import statistics
from collections.abc import Callable
from typing import Any

from methods import CALIBRATED, ENTRIES
from yopo.report import format_table

OURS, REAL = "yopo", "calibrated: yopo on real text"
OURS_AGAIN = "elimination + restore"
"""The steps of which `yopo` is made, put together once more: a check, and no rival."""

Row = dict[str, Any]


def bars(rows: list[Row]) -> str:
    """Return a section of the page, computed from the measured rows."""
    lines = ["## Bars", "", *_shares(rows), "", *_spreads(rows), ""]
    lines += _beaten(rows, "Data-free methods that are better than `yopo`", _is_rival)
    lines += _beaten(rows, "Calibrated methods of others that are better than `yopo`", _is_peer)
    lines += _beaten(rows, "Where `yopo` is better on real text", lambda name: name == REAL)
    lines += _beaten(rows, "Other ways to put our steps together that are better", _is_part)
    return "\n".join(lines)


def _shares(rows: list[Row]) -> list[str]:
    """Show the share of random's loss, and how much more real text would save."""
    ratios = sorted({row["ratio"] for row in rows})
    table = [["model", *(f"{ratio:g}" for ratio in ratios), "mean", "on real text", "quotient"]]
    means: dict[str, list[float]] = {OURS: [], REAL: []}
    for model in dict.fromkeys(row["model"] for row in rows):
        own = {row["ratio"]: row["share"] for row in rows if _is(row, model, OURS)}
        real = {row["ratio"]: row["share"] for row in rows if _is(row, model, REAL)}
        if not own or not real or None in own.values():
            continue
        both = statistics.fmean(own.values()), statistics.fmean(real.values())
        means[OURS].append(both[0])
        means[REAL].append(both[1])
        cells = [f"{own[ratio]:.3f}" if ratio in own else "" for ratio in ratios]
        table.append(
            [model, *cells, f"{both[0]:.3f}", f"{both[1]:.3f}", f"{both[0] / both[1]:.2f}"]
        )
    if not means[OURS]:
        return ["`yopo`, its version on real text or random rows were not measured."]
    both = statistics.fmean(means[OURS]), statistics.fmean(means[REAL])
    rest = [f"{both[0]:.3f}", f"{both[1]:.3f}", f"{both[0] / both[1]:.2f}"]
    table.append(["all", *("" for _ in ratios), *rest])
    return ["Share of random's loss that `yopo` has:", "", format_table(table)]


def _spreads(rows: list[Row]) -> list[str]:
    """Show how far seeds lie apart, as a share of what `yopo` gains over random rows."""
    ratios = sorted({row["ratio"] for row in rows})
    table = [["model", *(f"{ratio:g}" for ratio in ratios)]]
    for model in dict.fromkeys(row["model"] for row in rows):
        cells = []
        for ratio in ratios:
            at = {
                row["method"]: row for row in rows if (row["model"], row["ratio"]) == (model, ratio)
            }
            if OURS in at and "random rows" in at and at[OURS]["spread"] is not None:
                gain = at["random rows"]["perplexity"] - at[OURS]["perplexity"]
                cells.append(f"{at[OURS]['spread'] / gain:.4f}")
            else:
                cells.append("")
        table.append([model, *cells])
    title = (
        "Standard deviation of `yopo` over its seeds, as a share of random's perplexity minus its:"
    )
    return [title, "", format_table(table)]


def _beaten(rows: list[Row], title: str, belongs: Callable[[str], bool]) -> list[str]:
    """List where a method of one group has a lower perplexity than ours."""
    own = {(row["model"], row["ratio"]): row for row in rows if row["method"] == OURS}
    lines = []
    compared = 0
    for row in rows:
        ours = own.get((row["model"], row["ratio"]))
        if ours is None or not belongs(row["method"]):
            continue
        compared += 1
        if row["perplexity"] < ours["perplexity"]:
            figures = f"{row['perplexity']:.3f} against {ours['perplexity']:.3f}"
            close = ours["perplexity"] - row["perplexity"] < (ours["spread"] or 0.0)
            lines.append(
                f"* {row['model']} at {row['ratio']:g}: {row['method']}, {figures}"
                + (", less than the spread of `yopo` over seeds" if close else "")
            )
    return [
        f"{title}: {len(lines)} of {compared} comparisons.",
        "",
        *lines,
        *([""] if lines else []),
    ]


def _is(row: Row, model: str, method: str) -> bool:
    return (row["model"], row["method"]) == (model, method)


def _is_rival(method: str) -> bool:
    entry = ENTRIES.get(method)
    known = entry is not None and entry.table == "main" and method != OURS
    return known and not method.startswith(CALIBRATED)


def _is_peer(method: str) -> bool:
    return method.startswith(CALIBRATED) and method != REAL


def _is_part(method: str) -> bool:
    known = method in ENTRIES and method != OURS_AGAIN
    return known and ENTRIES[method].table == "ablation"
