"""Symbolic metrics of weights, evolved ones too, beside magnitude, Wanda, GBLM and SparseGPT.

    python benchmarks/metrics.py                      evolves on llama-s, measures on all there are
    python benchmarks/metrics.py --on embedded        evolves on the model that comes with yopo
    python benchmarks/metrics.py --iterations 50      a shorter search
    python benchmarks/metrics.py --folder searches    goes on where a killed run has ended
    python benchmarks/metrics.py --models opt-s       measures on one; rows of the others stay

Writes docs/results/metrics.json and .md, and a plot of the search. Formulas evolve as Pruner-Zero's
did, by the perplexity of one model at a sparsity of 50 %, on real text that is neither that of
their statistics nor that of the tables; beside the evolution runs a random search with as many
evaluations. Then every metric prunes every model, layer by layer, by statistics on real text
("calibrated") and on text that the model writes itself ("no data"): 64 windows of 256 tokens each.
Cells show perplexity on held-out text, and in brackets the excess log-perplexity over dense.
"""

import argparse
import logging
import math
import os
import time
from typing import Any

import torch

from common import (
    RESULTS,
    WINDOW,
    Subject,
    keep_result,
    kept_rows,
    machine,
    method_of,
    quiet,
    subjects,
)
from searches import command_of, described, measured_by, search_parser, told_of
from yopo import MetricPruner
from yopo.plots import plot_evolution
from yopo.report import format_table
from yopo.symbolic import (
    Evolution,
    EvolutionSettings,
    Expression,
    PerplexityFitness,
    collect_statistics,
    evolve,
)

Row = dict[str, Any]

NAME = "metrics"
NAMED = ("magnitude", "wanda", "gblm", "sparsegpt", "pruner-zero")
CASES = {"50 %": (0.5, "unstructured"), "60 %": (0.6, "unstructured"), "2:4": (None, "2:4")}
CALIBRATED = 64
"""Windows that statistics are taken on; what follows them is what formulas are judged by."""

JUDGED = 16


def search(subject: Subject, arguments: argparse.Namespace) -> tuple[Evolution, Row]:
    """Evolve a metric on one model, and say what was found."""
    model = subject.load()
    statistics = collect_statistics(model, data=subject.real_NW[:CALIBRATED])
    fitness = PerplexityFitness(
        model, statistics, data=subject.real_NW[CALIBRATED : CALIBRATED + JUDGED]
    )
    found = evolve(
        fitness,
        settings=EvolutionSettings(
            iterations=arguments.iterations, population=arguments.population
        ),
        seed=arguments.seed,
        folder=arguments.folder and arguments.folder / f"{subject.name}-{arguments.seed}",
        workers=arguments.workers,
    )
    named = {name: fitness(Expression.parse(text)) for name, text in _formulas().items()}
    started = time.perf_counter()
    fitness(found.expression)
    row = {
        "row": "search",
        "model": subject.name,
        "seed": arguments.seed,
        "evaluated": len(found.history),
        "at_random": len(found.random),
        "seconds": round(time.perf_counter() - started, 2),
        "evolved": described(found.best),
        "random": described(min(found.random, key=lambda each: each.fitness)),
        "named": named,
        "machine": machine(torch.device("cpu"), shared=True),
        "command": arguments.command,
    }
    return found, row


def measure(subject: Subject, metrics: dict[str, str], cases: list[str]) -> list[Row]:
    """Return one row for each metric, sparsity and kind of text, of one model."""
    dense = subject.perplexity(subject.load())
    texts: dict[str, Any] = {
        "calibrated": {"data": subject.real_NW[:CALIBRATED]},
        "no data": {"data": "self", "sequences": CALIBRATED, "length": WINDOW},
    }
    rows: list[Row] = []
    for text, settings in texts.items():
        statistics = collect_statistics(subject.load(), terminals=["G"], **settings)
        for name, metric in metrics.items():
            if name == "magnitude" and text == "no data":
                continue  # it looks at weights alone
            for case in cases:
                sparsity, pattern = CASES[case]
                known = None if name == "sparsegpt" else statistics
                pruner = MetricPruner(metric, statistics=known, **settings)
                model = pruner.prune(subject.load(), sparsity, pattern=pattern)
                value = subject.perplexity(model)
                rows.append(
                    {
                        "row": "perplexity",
                        "model": subject.name,
                        "text": text,
                        "metric": name,
                        "case": case,
                        "dense": dense,
                        "perplexity": value,
                        "excess": math.log(value / dense),
                    }
                )
                print(rows[-1], flush=True)
    return rows


def page(rows: list[Row]) -> str:
    """Return the page: what was found, and all figures."""
    found = next(row for row in rows if row["row"] == "search")
    lines = ["# Symbolic metrics of weights", "", method_of(__doc__), "", measured_by(found)]
    lines += ["", "## What the search found", ""]
    lines += [_told_search(found), "", "![The search](metrics.svg)"]
    for model in dict.fromkeys(row["model"] for row in rows if row["row"] == "perplexity"):
        own = [row for row in rows if row["row"] == "perplexity" and row["model"] == model]
        mark = ", on which the formula evolved" if model == found["model"] else ""
        lines += ["", f"## {model}{mark}, dense {own[0]['dense']:.2f}", "", _table(own)]
    return "\n".join(lines) + "\n"


def _formulas() -> dict[str, str]:
    return {
        "wanda": "mul(W, sqrt(X))",
        "gblm": "add(mul(W, sqrt(X)), mul(W, G))",
        "pruner-zero": "mul(abs(mul(W, W)), mms(G))",
    }


def _told_search(row: Row) -> str:
    named = ", ".join(f"{name} {value:.2f}" for name, value in row["named"].items())
    return (
        f"On {row['model']}, seed {row['seed']}, {row['evaluated']} evaluations and "
        f"{row['at_random']} at random, {row['seconds']:.2g} s each. Perplexity on the text that "
        f"formulas are judged by: {told_of(row, 2)}; for comparison {named}."
    )


def _table(rows: list[Row]) -> str:
    cases = list(dict.fromkeys(row["case"] for row in rows))
    texts = list(dict.fromkeys(row["text"] for row in rows))
    found = {(row["metric"], row["text"], row["case"]): row for row in rows}
    table = [["metric", *(f"{case}, {text}" for text in texts for case in cases)]]
    for name in dict.fromkeys(row["metric"] for row in rows):
        cells = [name]
        for text in texts:
            for case in cases:
                row = found.get((name, text, case)) or found[name, texts[0], case]
                decimals = 2 if row["dense"] >= 10 else 3
                cells.append(f"{row['perplexity']:.{decimals}f} ({row['excess']:.3f})")
        table.append(cells)
    return format_table(table)


def _arguments() -> argparse.Namespace:
    parser = search_parser(__doc__)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    arguments = parser.parse_args()
    arguments.command = command_of(NAME, parser, arguments)
    return arguments


def main() -> None:
    """Search, measure, and write the results."""
    arguments = _arguments()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(arguments.threads)
    quiet()
    logging.getLogger("yopo").setLevel(logging.ERROR)
    at_hand = {subject.name: subject for subject in subjects()}
    if arguments.on not in at_hand:
        print(f"{arguments.on} is not there, nothing is measured; there is {', '.join(at_hand)}.")
        return
    found, row = search(at_hand[arguments.on], arguments)
    print(row, flush=True)
    RESULTS.mkdir(exist_ok=True)
    plot_evolution(RESULTS / f"{NAME}.svg", found)
    metrics = {name: name for name in NAMED} | {
        "evolved": row["evolved"]["expression"],
        "random search": row["random"]["expression"],
    }
    before = kept_rows(NAME)
    is_same = any(old.get("evolved") == row["evolved"] for old in before)
    measured = [old for old in before if is_same and old["row"] == "perplexity"]
    for name, subject in at_hand.items():
        if arguments.models is None or name in arguments.models:
            measured = [old for old in measured if old["model"] != name]
            measured += measure(subject, metrics, arguments.cases)
            keep_result(NAME, [row, *measured])
            (RESULTS / f"{NAME}.md").write_text(page([row, *measured]), encoding="utf-8")


if __name__ == "__main__":
    main()
