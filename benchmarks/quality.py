"""Perplexity of every method at every ratio on every model at hand.

    python benchmarks/quality.py                          all there is, ratios 0.1 to 0.6
    python benchmarks/quality.py --models llama-s         one model; rows of the others stay
    python benchmarks/quality.py --methods yopo FLAP      methods whose names hold one of these
    python benchmarks/quality.py --path MODEL --text FILE any model on disk; half of the text is to
                                                          calibrate on, half to measure on

Writes docs/results/quality.json, cost.json, quality.md and a plot for each model.

All methods keep int((1 - ratio) n) rows of each FFN, but for adaptive widths, which keep as many of
all FFNs together. Cells show perplexity, ± its standard deviation over seeds where something is
random, and in brackets the excess log-perplexity over dense as a share of what random rows lose: 0
is dense, 1 is random. What looks at real text is called calibrated. Seconds of a processor, and MiB
above the loaded model, are those of one cold run at ratio 0.3 on one thread.
"""

import argparse
import logging
import math
import os
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import yopo
from bars import Row, bars
from common import RESULTS, WINDOW, Subject, keep_result, kept_rows, quiet, subjects
from cost import cost_of
from methods import ENTRIES, Entry, Workbench
from yopo.plots import plot_perplexities
from yopo.report import format_table

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
COST_RATIO = 0.3

PLOTTED = (
    "random rows",
    "row norm",
    "OptiPFair VOW",
    "PruneNet as published",
    "yopo, from weights alone",
    "yopo",
    "calibrated: OptiPFair MAW",
    "calibrated: Wanda-sp",
    "calibrated: FLAP",
    "calibrated: Taylor",
    "calibrated: yopo on real text",
)


def measure(subject: Subject, entries: dict[str, Entry], ratios: list[float]) -> Iterator[Row]:
    """Yield one row for each method and ratio on one model, with no perplexity where it cannot."""
    dense = subject.perplexity(subject.load())
    bench = Workbench(subject)
    for name, entry in entries.items():
        for ratio in ratios:
            row: Row = {"model": subject.name, "method": name, "ratio": ratio, "dense": dense}
            try:
                values = [_left(subject, bench, entry, ratio, seed) for seed in entry.seeds]
            except yopo.UnsupportedModelError as error:
                row |= {"perplexity": None, "absent": str(error)}
            else:
                row |= {
                    "values": values,
                    "perplexity": statistics.fmean(values),
                    "spread": statistics.stdev(values) if len(values) > 1 else None,
                    "excess": statistics.fmean(math.log(value / dense) for value in values),
                }
            print(row, flush=True)
            yield row


def measure_cost(subject: Subject, entries: dict[str, Entry]) -> list[Row]:
    """Return what each method costs on one model."""
    model = subject.load()
    # The first text, solution and spectrum of a process load what later ones find loaded.
    yopo.PolicyPruner(evidence=subject.real_NW[:1], multiple_of=1).fit(model).plan(model, 0.3)
    model.generate(subject.real_NW[:1, :2], max_new_tokens=2, do_sample=True)
    torch.linalg.svdvals(torch.eye(2))
    rows = []
    for name, entry in entries.items():
        if entry.costed:
            run = partial(_run, entry, Workbench(subject), model)
            found = cost_of(run)
            if found:
                rows.append({"model": subject.name, "method": name, "ratio": COST_RATIO} | found)
                print(rows[-1], flush=True)
    return rows


def with_shares(rows: list[Row]) -> list[Row]:
    """Return the rows with their share of what random rows lose."""
    lost = {
        (row["model"], row["ratio"]): row["excess"]
        for row in rows
        if row["method"] == "random rows"
    }
    shared = []
    for row in rows:
        random = lost.get((row["model"], row["ratio"]))
        known = random is not None and row["perplexity"] is not None
        shared.append(row | {"share": row["excess"] / random if known else None})
    return shared


def page(rows: list[Row], costs: list[Row]) -> str:
    """Return the page: bars, then for each model the methods, and the steps of ours alone."""
    lines = ["# Quality", "", __doc__.split("\n\n")[3].strip(), ""]
    lines += [bars([row for row in rows if row["perplexity"] is not None])]
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        spent = {row["method"]: row for row in costs if row["model"] == model}
        lines += [f"## {model}, dense {own[0]['dense']:.2f}", "", _table(own, spent, "main"), ""]
        absent = {row["method"]: row["absent"] for row in own if row["perplexity"] is None}
        lines += [f"* {name} is absent: {reason}" for name, reason in absent.items()]
        lines += ["", "Steps of ours, alone and together:", "", _table(own, spent, "ablation"), ""]
    return "\n".join(lines).replace("\n\n\n", "\n\n")


def plot(rows: list[Row], model: str) -> None:
    """Draw the methods that matter, at the ratios that all of them were measured at."""
    own = [row for row in rows if row["model"] == model and row["perplexity"] is not None]
    found = {
        name: {row["ratio"]: row["perplexity"] for row in own if row["method"] == name}
        for name in PLOTTED
    }
    found = {name: values for name, values in found.items() if values}
    ratios = sorted(set.intersection(*(set(values) for values in found.values())))
    plot_perplexities(
        RESULTS / f"quality-{model}.png",
        ratios,
        {name: [values[ratio] for ratio in ratios] for name, values in found.items()},
        dense=own[0]["dense"],
        title=f"{model}: perplexity after pruning",
    )


def subject_on_disk(path: Path, text: Path, windows: int = 32) -> Subject:
    """Return a model on disk, with the first half of a text to calibrate on, the rest to measure.

    Raises:
        SystemExit: If the text is shorter than two windows.
    """
    tokenizer = AutoTokenizer.from_pretrained(path)
    content = text.read_text(encoding="utf-8")
    ids_T = torch.tensor(tokenizer(content, add_special_tokens=False, verbose=False).input_ids)
    half = len(ids_T) // 2
    if half < WINDOW:
        raise SystemExit(f"{text} holds {len(ids_T)} tokens; at least {2 * WINDOW} are needed.")
    real_NW = ids_T[: half // WINDOW * WINDOW].view(-1, WINDOW)[:128]
    return Subject(path.name, path, ids_T[half:][: windows * WINDOW], real_NW)


def _left(subject: Subject, bench: Workbench, entry: Entry, ratio: float, seed: int) -> float:
    model = subject.load()
    entry.prune(bench, model, ratio, seed)
    return subject.perplexity(model)


def _run(entry: Entry, bench: Workbench, model: Any) -> None:
    entry.prune(bench, model, COST_RATIO, entry.seeds[0])


def _table(rows: list[Row], spent: dict[str, Row], which: str) -> str:
    names = [name for name, entry in ENTRIES.items() if entry.table == which]
    if which == "ablation":  # what the steps are parts of, or compare with
        names = ["random rows", "row norm", *names, "yopo, from weights alone", "yopo"]
        names.append("calibrated: yopo on real text")
    ratios = sorted({row["ratio"] for row in rows})
    table = [["method", *(f"{ratio:g}" for ratio in ratios), "seconds", "MiB"]]
    for name in names:
        mine = {row["ratio"]: row for row in rows if row["method"] == name}
        cost = spent.get(name)
        cells = [_cell(mine.get(ratio)) for ratio in ratios]
        cells += [f"{cost['seconds']:.1f}", f"{cost['mebibytes']:.0f}"] if cost else ["", ""]
        if mine:
            table.append([name, *cells])
    return format_table(table)


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row["perplexity"] is None:
        return "absent"
    decimals = 2 if row["dense"] >= 10 else 3
    cell = f"{row['perplexity']:.{decimals}f}"
    if row["spread"] is not None:
        cell += f" ± {row['spread']:.{decimals}f}"
    return cell if row["share"] is None else f"{cell} ({row['share']:.3f})"


def _merged(old: list[Row], new: list[Row]) -> list[Row]:
    """Return the old rows, but for those measured again or of methods that are gone, and the new.

    They come sorted by model, method and ratio.
    """
    order = {name: place for place, name in enumerate(ENTRIES)}
    rows = {
        (row["model"], order[row["method"]], row["ratio"]): row
        for row in old + new
        if row["method"] in order
    }
    return [rows[key] for key in sorted(rows)]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--models", nargs="+")
    parser.add_argument("--methods", nargs="+", default=[""])
    parser.add_argument("--ratios", nargs="+", type=float, default=list(RATIOS))
    parser.add_argument("--path", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--threads", type=int, default=1, help="for quality; cost has one")
    parser.add_argument("--skip-cost", action="store_true")
    arguments = parser.parse_args()
    if (arguments.path is None) != (arguments.text is None):
        parser.error("--path and --text go together")
    return arguments


def main() -> None:
    """Measure, and write the results."""
    arguments = _arguments()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    quiet()
    logging.getLogger("yopo").setLevel(logging.ERROR)  # widths differ on the way, layer by layer
    entries = {
        name: entry
        for name, entry in ENTRIES.items()
        if any(word in name for word in arguments.methods)
    }
    if arguments.path is not None:
        chosen = [subject_on_disk(arguments.path, arguments.text)]
    else:
        names = arguments.models
        chosen = [subject for subject in subjects() if names is None or subject.name in names]
    costs = kept_rows("cost")
    if not arguments.skip_cost:
        for subject in chosen:  # all of them first, while this process is fit to be forked
            costs = _merged(costs, measure_cost(subject, entries))
            keep_result("cost", costs)
    torch.set_num_threads(arguments.threads)
    rows = kept_rows("quality")
    for subject in chosen:
        for row in measure(subject, entries, arguments.ratios):
            rows = with_shares(_merged(rows, [row]))
            keep_result("quality", rows)
        (RESULTS / "quality.md").write_text(page(rows, costs), encoding="utf-8")
        plot(rows, subject.name)


if __name__ == "__main__":
    main()
