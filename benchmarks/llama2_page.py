"""The page of `llama2.py`: its lines beside what the paper reports."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from yopo.recovery.settings import settings_by_name
from yopo.report import format_table

ON_WIKITEXT = "wikitext2-train"
"""What the paper recovers on."""

REPORTED: dict[str, dict[Any, float]] = {
    "Llama-2-7b-hf": {"dense": 69.00, 0.2: 61.67, 0.25: 58.63, 0.3: 55.45},
    "phi-2": {"dense": 72.24, 0.2: 66.59, 0.25: 64.10, 0.3: 61.05},
}
"""Mean accuracy over the five tasks, percent, of PruneNet without recovery."""

REPORTED_RECOVERED: dict[str, dict[Any, float]] = {
    "Llama-2-7b-hf": {0.2: 62.34, 0.25: 60.05, 0.3: 57.08},
    "phi-2": {0.2: 65.58, 0.25: 64.25, 0.3: 58.30},
}
"""The same after recovery on WikiText-2."""

SETTINGS_OF_RECOVERY = {True: "paper", False: "published"}
"""Those of recovery, by whether the dense model teaches."""


def page(rows: list[dict[str, Any]], name: str, device: str) -> str:
    """Return the page of all lines."""
    dense = rows[0]
    table = [["method", "ratio", "parameters", "perplexity", "accuracy", "kept", "paper", "fit s"]]
    for row in rows:
        told = "" if row["recovered"] is None else f" + recovery on {Path(row['recovered']).name}"
        paper = reported(row, name)
        table.append(
            [
                f"{row['method']}{told}",
                f"{row['ratio']:g}",
                f"{row['parameters'] / dense['parameters']:.1%}",
                f"{row['perplexity']:.2f}",
                f"{100 * row['accuracy']:.2f} ± {100 * row['error']:.2f}",
                f"{row['accuracy'] / dense['accuracy']:.1%}",
                "" if paper is None else f"{paper:.2f}",
                f"{row.get('fit_seconds', 0.0):.0f}",
            ]
        )
    settings, pinned = dense["settings"], dense["pinned"]
    return (
        f"# The paper's tables: {name}\n\nOn {device} (`python benchmarks/llama2.py`). Accuracy is "
        'the mean over the tasks, in percent, ± one standard error; "kept" is its share of the '
        f"dense model's. Tasks: {settings['tasks']}, {settings['limit'] or 'all'} questions each. "
        f"Perplexity on {Path(settings['text']).name} in windows of {dense['window']} tokens. "
        f"Weights in {pinned['dtype']}. Policies were trained at {settings['trained_at']:g}.\n\n"
        f"{format_table(table)}\n{page_of_recovery(rows)}"
    )


def page_of_recovery(rows: list[dict[str, Any]]) -> str:
    """Return by which settings models were recovered."""
    texts = dict.fromkeys(row["recovered"] for row in rows if row["recovered"] is not None)
    parts = []
    for text in texts:
        settings = settings_by_name(SETTINGS_OF_RECOVERY[text == "self"])
        told = ", ".join(f"{key} {value}" for key, value in asdict(settings).items())
        parts.append(f"\nRecovery on {Path(text).name}: {told}.\n")
    return "".join(parts)


def reported(row: dict[str, Any], name: str) -> float | None:
    """Return what the paper reports for a line, None if nothing."""
    key = "dense" if row["method"] == "dense" else row["ratio"]
    if row["method"] not in ("dense", "prunenet"):
        return None
    if row["recovered"] is None:
        return REPORTED.get(name, {}).get(key)
    return REPORTED_RECOVERED.get(name, {}).get(key) if row["recovered"] == ON_WIKITEXT else None
