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
    """Show the share of random's loss, and how much more of it real text would save."""
    ratios = sorted({row["ratio"] for row in rows})
    models = list(dict.fromkeys(row["model"] for row in rows))
    shares: dict[str, dict[tuple[str, float], float]] = {
        method: {
            (row["model"], row["ratio"]): row["share"]
            for row in rows
            if row["method"] == method and row["share"] is not None
        }
        for method in (OURS, REAL)
    }
    table = [["share", *(f"{ratio:g}" for ratio in ratios)]]
    for model in models:
        found = [shares[OURS].get((model, ratio)) for ratio in ratios]
        table.append([model, *("" if share is None else f"{share:.3f}" for share in found)])
    means: list[list[str]] = [["mean"], ["mean, on real text"], ["quotient"]]
    for ratio in ratios:
        both = [(m, ratio) for m in models if all((m, ratio) in s for s in shares.values())]
        if not both:
            return ["`yopo`, its version on real text or random rows were not measured."]
        ours, real = (statistics.fmean(shares[method][key] for key in both) for method in shares)
        means[0].append(f"{ours:.3f}")
        means[1].append(f"{real:.3f}")
        means[2].append(f"{ours / real:.2f}")
    return ["Share of random's loss that `yopo` has:", "", format_table(table + means)]


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
