"""Perplexity of every method at every ratio on every model at hand.

    python benchmarks/quality.py                      all models, ratios 0.1 to 0.6
    python benchmarks/quality.py --models embedded    one of them; rows of the others stay

Writes results/quality.json, .md and .png. "share" is the excess log-perplexity over dense as a
share of what random rows lose. All methods keep int((1 - ratio) n) rows. Seconds are means over
ratios, of which the first pays for evidence and training.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import yopo
from common import RESULTS, Subject, keep_result, kept_rows, quiet, subjects
from yopo import criteria
from yopo.evaluation import perplexity
from yopo.report import format_table, plot_perplexities

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
SEEDS = (0, 1, 2)

Method = Callable[[Any, float, int, Subject], None]
"""Prunes a model in place, for a ratio and a seed."""


def _criterion(score: Callable[[int], criteria.Criterion]) -> Method:
    def prune(model: Any, ratio: float, seed: int, subject: Subject) -> None:
        plan = yopo.plan_by_criterion(model, ratio, criterion=score(seed), multiple_of=1)
        yopo.apply_plan(model, plan)

    return prune


def _published(model: Any, ratio: float, seed: int, subject: Subject) -> None:
    yopo.PolicyPruner.prunenet(ratio=ratio, seed=seed).fit(model).prune(model, ratio)


def _ours(*, calibrated: bool = False, **settings: Any) -> Method:
    """Return a method of ours; one pruner serves all ratios, and remembers its evidence."""
    pruners: dict[tuple[str, int], yopo.PolicyPruner] = {}

    def prune(model: Any, ratio: float, seed: int, subject: Subject) -> None:
        key = (subject.name, seed)
        if key not in pruners:
            evidence = {"evidence": subject.real_NW} if calibrated else {}
            pruner = yopo.PolicyPruner(seed=seed, multiple_of=1, **settings, **evidence)
            pruners[key] = pruner.fit(model)
        pruners[key].prune(model, ratio)

    return prune


METHODS: dict[str, tuple[Method, tuple[int, ...]]] = {
    "random rows": (_criterion(criteria.random_rows), SEEDS),
    "row norm": (_criterion(lambda seed: criteria.row_norm), (0,)),
    "norm product": (_criterion(lambda seed: criteria.norm_product), (0,)),
    "PruneNet as published": (_published, SEEDS),
    "spectral reward, learned": (_ours(reward="spectral", restore=False), SEEDS),
    "elimination, no restoring": (_ours(restore=False), SEEDS),
    "yopo, from weights alone": (_ours(evidence="weights"), SEEDS),
    "yopo": (_ours(), SEEDS),
    "calibrated: yopo on real text": (_ours(calibrated=True), (0,)),
}


def measure(subject: Subject, ratios: list[float]) -> list[dict[str, Any]]:
    """Return one row for each method and ratio on one model."""
    dense = perplexity(subject.load(), subject.test_T)
    rows: list[dict[str, Any]] = []
    for name, (method, seeds) in METHODS.items():
        for ratio in ratios:
            values, seconds = [], []
            for seed in seeds:
                model = subject.load()
                started = time.perf_counter()
                method(model, ratio, seed, subject)
                seconds.append(time.perf_counter() - started)
                values.append(perplexity(model, subject.test_T))
            rows.append(
                {
                    "model": subject.name,
                    "method": name,
                    "ratio": ratio,
                    "dense": dense,
                    "perplexity": statistics.fmean(values),
                    "spread": statistics.stdev(values) if len(values) > 1 else None,
                    "excess": statistics.fmean(math.log(value / dense) for value in values),
                    "seconds": statistics.fmean(seconds),
                }
            )
            print(rows[-1], flush=True)
    lost = {row["ratio"]: row["excess"] for row in rows if row["method"] == "random rows"}
    return [row | {"share": row["excess"] / lost[row["ratio"]]} for row in rows]


def tables(rows: list[dict[str, Any]]) -> str:
    """Return a page with one table for each model: perplexity and, in brackets, the share."""
    lines = ["# Quality", "", __doc__.split("\n\n")[2].strip(), ""]
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        ratios = list(dict.fromkeys(row["ratio"] for row in own))
        table = [["method", *(f"{ratio:g}" for ratio in ratios), "seconds"]]
        for name in dict.fromkeys(row["method"] for row in own):
            mine = [row for row in own if row["method"] == name]
            cells = [f"{row['perplexity']:.2f} ({row['share']:.3f})" for row in mine]
            seconds = statistics.fmean(row["seconds"] for row in mine)
            table.append([name, *cells, f"{seconds:.1f}"])
        lines += [f"## {model}, dense {own[0]['dense']:.2f}", "", format_table(table), ""]
    return "\n".join(lines)


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--models", nargs="+")
    parser.add_argument("--ratios", nargs="+", type=float, default=list(RATIOS))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    quiet()
    rows = kept_rows("quality")
    for subject in subjects():
        if arguments.models is None or subject.name in arguments.models:
            rows = [row for row in rows if row["model"] != subject.name]
            rows += measure(subject, arguments.ratios)
            keep_result("quality", rows)
            (RESULTS / "quality.md").write_text(tables(rows), encoding="utf-8")
            own = [row for row in rows if row["model"] == subject.name]
            plot_perplexities(
                RESULTS / f"quality-{subject.name}.png",
                arguments.ratios,
                {
                    name: [row["perplexity"] for row in own if row["method"] == name]
                    for name in METHODS
                },
                dense=own[0]["dense"],
                title=f"{subject.name}: perplexity after pruning",
            )


if __name__ == "__main__":
    main()
