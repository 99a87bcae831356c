"""Evolve a symbolic metric of FFN rows with no data, and measure it on models it has not seen.

    python benchmarks/evolve_rows.py                      on llama-s, measured on all there are
    python benchmarks/evolve_rows.py --iterations 50      a shorter search
    python benchmarks/evolve_rows.py --on embedded        on the model that comes with yopo
    python benchmarks/evolve_rows.py --folder searches    goes on where a killed run has ended
    python benchmarks/evolve_rows.py --models opt-s       measures on one; rows of the others stay

Writes docs/results/evolve_rows.json and .md. Two searches run on one model at one ratio: by the
divergence of its predictions on text that it writes itself, and by the distance between singular
values. Beside each runs a random search with as many evaluations. What they find is compared with
criteria made by hand, in perplexity on real text, on that model and on the others. All methods keep
int((1 - ratio) n) rows of each FFN. "Restored" means that the contract matrices are re-solved on
text that the model writes itself. Cells show perplexity, the mean over three seeds for random rows,
and in brackets the excess log-perplexity over dense as a share of what random rows lose without
restoring: 0 is dense, 1 is random.
"""

import argparse
import logging
import math
import os
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from scipy.stats import spearmanr

from common import RESULTS, Subject, keep_result, kept_rows, machine, method_of, quiet, subjects
from methods import SEEDS, Method, Workbench, by_criterion, ours, step
from searches import command_of, described, measured_by, search_parser, told_of
from yopo import criteria
from yopo.report import format_table
from yopo.symbolic.evolution import EvolutionSettings, evolve
from yopo.symbolic.expression import Expression
from yopo.symbolic.history import Candidate, Evolution
from yopo.symbolic.names import ROW_TERMINALS
from yopo.symbolic.row_fitness import DivergenceFitness, SpectralFitness
from yopo.symbolic.rows import row_criterion

Row = dict[str, Any]

NAME = "evolve_rows"
RATIOS = (0.2, 0.3, 0.5)
BY_HAND = ("row norm", "norm product", "norm product with gains")
EVOLVED = "evolved by divergence"
FOUND = (EVOLVED, "random search by divergence", "evolved by spectrum")


def searches(subject: Subject, arguments: argparse.Namespace) -> Iterator[tuple[Evolution, Row]]:
    """Yield what each kind of fitness has led to, with a row that describes it."""
    settings = EvolutionSettings(iterations=arguments.iterations, population=arguments.population)
    model = subject.load()
    for kind in (DivergenceFitness, SpectralFitness):
        fitness = kind(model, arguments.ratio, multiple_of=1)
        name = "divergence" if kind is DivergenceFitness else "spectrum"
        folder = arguments.folder and arguments.folder / f"{subject.name}-{name}"
        found = evolve(
            fitness,
            settings=settings,
            terminals=ROW_TERMINALS,
            seed=arguments.seed,
            folder=folder,
            workers=arguments.workers,
        )
        at_random = min(found.random, key=lambda candidate: candidate.fitness)
        hand = {name: fitness(expression) for name, expression in _by_hand().items()}
        started = time.perf_counter()
        fitness(found.expression)
        yield (
            found,
            {
                "row": "search",
                "model": subject.name,
                "ratio": arguments.ratio,
                "fitness": name,
                "evaluated": len(found.history),
                "seed": arguments.seed,
                "seconds": round(time.perf_counter() - started, 2),
                "evolved": described(found.best),
                "random": described(at_random),
                "by_hand": hand,
            },
        )


def correlation(subject: Subject, found: Evolution, ratio: float) -> Row:
    """Return the rank correlation of the two kinds of fitness over candidates of one search."""
    spectral = SpectralFitness(subject.load(), ratio, multiple_of=1)
    known: dict[str, Candidate] = {each.signature: each for each in (*found.history, *found.random)}
    drawn = {each.signature for each in found.random}
    other = {signature: spectral(each.expression) for signature, each in known.items()}

    def rank(signatures: list[str]) -> float:
        pairs = [[known[s].fitness for s in signatures], [other[s] for s in signatures]]
        return float(spearmanr(*pairs).statistic)

    best = sorted(known, key=lambda signature: known[signature].fitness)[: len(known) // 4]
    return {
        "row": "correlation",
        "model": subject.name,
        "ratio": ratio,
        "candidates": {"all": len(known), "random": len(drawn), "best quarter": len(best)},
        "spearman": {
            "all": rank(list(known)),
            "random": rank(sorted(drawn)),
            "best quarter": rank(best),
        },
    }


def methods(formulas: dict[str, Expression]) -> dict[str, tuple[Method, Method, tuple[int, ...]]]:
    """Return for each method how it prunes without and with restoring, and its seeds."""

    def both(make: Any, seeds: tuple[int, ...] = (0,)) -> tuple[Method, Method, tuple[int, ...]]:
        plain = by_criterion(lambda bench, model, seed: make(seed))
        return plain, step(lambda moments, seed: make(seed), restore=True), seeds

    def formula(expression: Expression) -> tuple[Method, Method, tuple[int, ...]]:
        return both(lambda seed: row_criterion(expression))

    return {
        "random rows": both(criteria.random_rows, SEEDS),
        "row norm": both(lambda seed: criteria.row_norm),
        "norm product": both(lambda seed: criteria.norm_product),
        "norm product with gains": formula(_by_hand()["norm product with gains"]),
        **{name: formula(expression) for name, expression in formulas.items()},
        "yopo": (ours(restore=False), ours(), (0,)),
    }


def measure(subject: Subject, formulas: dict[str, Expression], ratios: list[float]) -> list[Row]:
    """Return one row for each method, ratio and way to go on, of one model."""
    dense = subject.perplexity(subject.load())
    bench = Workbench(subject)
    rows: list[Row] = []
    for name, (plain, restored, seeds) in methods(formulas).items():
        for is_restored, prune in ((False, plain), (True, restored)):
            for ratio in ratios:
                values = []
                for seed in seeds:
                    model = subject.load()
                    prune(bench, model, ratio, seed)
                    values.append(subject.perplexity(model))
                rows.append(
                    {
                        "row": "perplexity",
                        "model": subject.name,
                        "method": name,
                        "restored": is_restored,
                        "ratio": ratio,
                        "dense": dense,
                        "values": values,
                        "perplexity": statistics.fmean(values),
                        "excess": statistics.fmean(math.log(value / dense) for value in values),
                    }
                )
                print(rows[-1], flush=True)
    return rows


def page(rows: list[Row]) -> str:
    """Return the page: what was found, whether it is any good elsewhere, and all figures."""
    first = next(row for row in rows if row["row"] == "search")
    lines = ["# Formulas of rows that evolve without data", "", method_of(__doc__)]
    lines += ["", measured_by(first), "", "## What the searches found", ""]
    lines += [_told_search(row) for row in rows if row["row"] == "search"]
    lines += [_told_correlation(row) for row in rows if row["row"] == "correlation"]
    lines += ["", "## Is it better elsewhere?", "", *_verdict(rows, first["model"])]
    for model in dict.fromkeys(row["model"] for row in rows if row["row"] == "perplexity"):
        own = [row for row in rows if row["row"] == "perplexity" and row["model"] == model]
        mark = ", on which the formulas evolved" if model == first["model"] else ""
        lines += ["", f"## {model}{mark}, dense {own[0]['dense']:.2f}", "", _table(own)]
    return "\n".join(lines) + "\n"


def _by_hand() -> dict[str, Expression]:
    """Return the criteria made by hand as formulas, which take gains into account."""
    return {
        "row norm with gains": Expression.parse("gate_norm"),
        "norm product with gains": Expression.parse("mul(mul(gate_norm, up_norm), down_norm)"),
    }


def _told_search(row: Row) -> str:
    hand = ", ".join(f"{name} {value:.4f}" for name, value in row["by_hand"].items())
    return (
        f"* By {row['fitness']} on {row['model']} at {row['ratio']}, seed {row['seed']}, "
        f"{row['evaluated']} evaluations and as many at random, {row['seconds']:.2g} s each: "
        f"{told_of(row, 4)}; for comparison {hand}."
    )


def _told_correlation(row: Row) -> str:
    told = ", ".join(
        f"{value:.2f} over {row['candidates'][which]} ({which})"
        for which, value in row["spearman"].items()
    )
    return f"* Rank correlation of the two kinds of fitness, over candidates of the first: {told}."


def _verdict(rows: list[Row], home: str) -> list[str]:
    """Return how often formulas are better than others, on models that they did not evolve on."""
    found = {
        (row["model"], row["restored"], row["ratio"], row["method"]): row["perplexity"]
        for row in rows
        if row["row"] == "perplexity" and row["model"] != home
    }

    def wins(name: str, restored: bool, rivals: tuple[str, ...], model: str | None = None) -> str:
        places = {key[:3] for key in found if key[1] is restored and model in (None, key[0])}
        if not places or name in rivals:
            return "-"
        won = sum(
            found[(*place, name)] < min(found[(*place, rival)] for rival in rivals)
            for place in places
        )
        return f"{won} of {len(places)}"

    rivals = {name: (name,) for name in ("random rows", *BY_HAND)} | {"best by hand": BY_HAND}
    rivals |= {name: (name,) for name in (FOUND[1], "yopo")}
    models = list(dict.fromkeys(key[0] for key in found))
    table = [["", *rivals, *(f"best by hand, {model}" for model in models)]]
    for name in FOUND:
        for restored in (False, True):
            cells = [wins(name, restored, others) for others in rivals.values()]
            cells += [wins(name, restored, BY_HAND, model) for model in models]
            table.append([name + (", restored" if restored else ""), *cells])
    told = f"At how many models and ratios, without {home}, a formula has the lower perplexity:"
    return [told, "", format_table(table)]


def _table(rows: list[Row]) -> str:
    ratios = sorted({row["ratio"] for row in rows})
    found = {(row["method"], row["restored"], row["ratio"]): row for row in rows}
    heads = [f"{ratio:g}{told}" for told in ("", " restored") for ratio in ratios]
    table = [["method", *heads]]
    for name in dict.fromkeys(row["method"] for row in rows):
        cells = [name]
        for restored in (False, True):
            for ratio in ratios:
                row = found[name, restored, ratio]
                share = row["excess"] / found["random rows", False, ratio]["excess"]
                decimals = 2 if row["dense"] >= 10 else 3
                cells.append(f"{row['perplexity']:.{decimals}f} ({share:.2f})")
        table.append(cells)
    return format_table(table)


def _measured_before(rows: list[Row]) -> dict[str, list[Row]]:
    """Return what an earlier run has measured of the same formulas, by model."""

    def found(of: list[Row]) -> list[Any]:
        return [
            (
                row["model"],
                row["fitness"],
                row["evolved"]["expression"],
                row["random"]["expression"],
            )
            for row in of
            if row["row"] == "search"
        ]

    known = kept_rows(NAME)
    measured: dict[str, list[Row]] = {}
    for row in known if found(known) == found(rows) else []:
        if row["row"] == "perplexity":
            measured.setdefault(row["model"], []).append(row)
    return measured


def _arguments() -> argparse.Namespace:
    parser = search_parser(__doc__)
    parser.add_argument("--ratio", type=float, default=0.3, help="the ratio to evolve at")
    parser.add_argument("--ratios", nargs="+", type=float, default=list(RATIOS))
    arguments = parser.parse_args()
    arguments.command = command_of(NAME, parser, arguments)
    return arguments


def main() -> None:
    """Search, measure, and write the results."""
    arguments = _arguments()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(arguments.threads)
    quiet()
    logging.getLogger("yopo").setLevel(logging.ERROR)  # a formula may well be hard to restore
    at_hand = {subject.name: subject for subject in subjects()}
    if arguments.on not in at_hand:
        print(f"{arguments.on} is not there, nothing is measured; there is {', '.join(at_hand)}.")
        return
    home = at_hand[arguments.on]
    names, formulas = {"divergence": EVOLVED, "spectrum": FOUND[2]}, dict[str, Expression]()
    rows: list[Row] = []
    for found, row in searches(home, arguments):
        where = machine(torch.device("cpu"), shared=True)
        rows.append(row | {"machine": where, "command": arguments.command})
        print(row, flush=True)
        formulas[names[row["fitness"]]] = found.expression
        if row["fitness"] == "divergence":
            formulas[FOUND[1]] = Expression.parse(row["random"]["expression"])
            rows.append(correlation(home, found, arguments.ratio))
            print(rows[-1], flush=True)
    measured = _measured_before(rows)
    for name, subject in at_hand.items():
        if arguments.models is None or name in arguments.models:
            measured[name] = measure(subject, formulas, arguments.ratios)
            own = [row for model in at_hand for row in measured.get(model, [])]
            keep_result(NAME, rows + own)
            (RESULTS / f"{NAME}.md").write_text(page(rows + own), encoding="utf-8")


if __name__ == "__main__":
    main()
