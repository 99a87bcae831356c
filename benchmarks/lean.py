"""Perplexity of the recipe for models larger than memory, against what needs more memory.

    python benchmarks/lean.py                      all models, ratios 0.1, 0.2, 0.3 and 0.5
    python benchmarks/lean.py --models embedded    one of them; rows of the others stay

Writes docs/results/lean.json and .md. Cells show perplexity, ± its standard deviation over three
seeds where something is random, and in brackets the excess log-perplexity over dense as a share of
what random rows lose: 0 is dense, 1 is random. All methods keep int((1 - ratio) n) rows of each
FFN. "lean" is `PolicyPruner.lean()`: 4096 imagined inputs. "weights alone" is
`PolicyPruner(evidence="weights")`: 32768 imagined inputs, and second moments of all rows. "yopo" is
`PolicyPruner()`, on text that the model writes itself.
"""

import logging
import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import yopo
from common import Subject, measure_subjects, method_of
from yopo import criteria
from yopo.report import format_table

RATIOS = (0.1, 0.2, 0.3, 0.5)
SEEDS = (0, 1, 2)

Cut = Callable[[Any, float], Any]
"""Prunes a model in place and returns it."""


def _by_criterion(criterion: criteria.Criterion) -> Cut:
    def cut(model: Any, ratio: float) -> Any:
        plan = yopo.plan_by_criterion(model, ratio, criterion=criterion, multiple_of=1)
        yopo.apply_plan(model, plan)
        return model

    return cut


def _by(pruner: yopo.PolicyPruner) -> Cut:
    def cut(model: Any, ratio: float) -> Any:
        return pruner.fit(model).prune(model, ratio)

    return cut


def _methods() -> dict[str, list[Cut]]:
    """Return every method by name, one cut a seed."""

    def lean(restore: bool) -> list[Cut]:
        make = yopo.PolicyPruner.lean
        return [_by(make(seed=seed, restore=restore, multiple_of=1)) for seed in SEEDS]

    return {
        "random rows": [_by_criterion(criteria.random_rows(seed)) for seed in SEEDS],
        "row norm": [_by_criterion(criteria.row_norm)],
        "lean, not restored": lean(False),
        "lean": lean(True),
        "weights alone, not restored": [
            _by(yopo.PolicyPruner(evidence="weights", restore=False, multiple_of=1))
        ],
        "weights alone": [_by(yopo.PolicyPruner(evidence="weights", multiple_of=1))],
        "yopo": [_by(yopo.PolicyPruner(multiple_of=1))],
    }


def measure(subject: Subject, ratios: list[float]) -> Iterator[dict[str, Any]]:
    """Yield one row for each method and ratio on one model."""
    dense = subject.perplexity(subject.load())
    random: dict[float, float] = {}
    for method, cuts in _methods().items():
        for ratio in ratios:
            values = [subject.perplexity(cut(subject.load(), ratio)) for cut in cuts]
            excess = statistics.fmean(math.log(value / dense) for value in values)
            row = {
                "model": subject.name,
                "method": method,
                "ratio": ratio,
                "dense": dense,
                "values": values,
                "perplexity": statistics.fmean(values),
                "spread": statistics.stdev(values) if len(values) > 1 else None,
                "excess": excess,
                "share": excess / random.setdefault(ratio, excess),
            }
            print(row, flush=True)
            yield row


def page(rows: list[dict[str, Any]]) -> str:
    """Return a page with one table for each model."""
    lines = ["# The recipe for models larger than memory", ""]
    lines += [method_of(__doc__ or ""), ""]
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        ratios = list(dict.fromkeys(row["ratio"] for row in own))
        table = [["method", *(f"{ratio:g}" for ratio in ratios)]]
        for name in dict.fromkeys(row["method"] for row in own):
            table.append([name, *(_cell(row) for row in own if row["method"] == name)])
        lines += [f"## {model}, dense {own[0]['dense']:.2f}", "", format_table(table), ""]
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    decimals = 2 if row["dense"] >= 10 else 3
    spread = "" if row["spread"] is None else f" ± {row['spread']:.{decimals}f}"
    return f"{row['perplexity']:.{decimals}f}{spread} ({row['share']:.3f})"


def main() -> None:
    """Measure, and write the results."""
    logging.getLogger("yopo").setLevel(logging.ERROR)
    measure_subjects("lean", __doc__ or "", RATIOS, measure=measure, page=page)


if __name__ == "__main__":
    main()
