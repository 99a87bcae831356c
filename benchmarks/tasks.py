"""Accuracy of trained models on the paper's tasks, MMLU and BLiMP, dense and pruned, offline.

    python benchmarks/tasks.py                        all models of ../shared, all questions
    python benchmarks/tasks.py --limit 500            the first 500 questions of each task
    python benchmarks/tasks.py --models llama-s --processes 8

Prunes by the default recipe and at random, at a ratio of 0.3, and writes docs/results/tasks.json
and .md. MMLU is asked without solved examples, as in the paper, and of each of its 57 subjects at
most a tenth of the limit. BLiMP, ten of its paradigms, asks which of two sentences is the likelier:
that is what models as small as these can do. Needs ../shared; says so and ends where it is absent.
"""

import argparse
import logging
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import yopo
from common import RESULTS, SHARED, SHARED_MODELS, keep_result, kept_rows, quiet
from yopo.report import format_table

RATIO = 0.3
METHODS = ("yopo", "random rows")
PAPER = ("piqa", "winogrande", "hellaswag", "arc_easy", "arc_challenge")
TASKS = (
    ("paper", PAPER[2:3], 1.0),
    ("paper", PAPER[:2] + PAPER[3:], 1.0),
    ("mmlu", ("mmlu",), 0.1),
    ("blimp", ("blimp_mean",), 1.0),
)
"""Presets, that of the paper in two parts of which the larger begins, and the share of the limit
that each of their tasks gets."""

PARADIGM = """
task: blimp_{name}
tag: blimp
dataset_path: json
dataset_kwargs: {{data_files: {{train: "{file}"}}}}
output_type: multiple_choice
validation_split: train
doc_to_text: ""
doc_to_target: 0
doc_to_choice: "{{{{[sentence_good, sentence_bad]}}}}"
metric_list: [{{metric: acc}}]
"""
"""A paradigm of BLiMP as lm-eval defines it, read from a local file."""


def pruned(path: Path, method: str) -> Any:
    """Return the model pruned by a method, or the dense one."""
    model = yopo.load(path, dtype=torch.float32)
    if method == "dense":
        return model
    if method == "yopo":
        return yopo.PolicyPruner().fit(model).prune(model, RATIO)
    plan = yopo.plan_by_criterion(model, RATIO, criterion=yopo.criteria.random_rows(0))
    yopo.apply_plan(model, plan)
    return model


def define_blimp(folder: Path) -> None:
    """Write definitions of the paradigms that there are, and of their mean, into a folder."""
    for file in (SHARED / "eval" / "blimp").glob("*.jsonl"):
        definition = PARADIGM.format(name=file.stem, file=file)
        (folder / f"{file.stem}.yaml").write_text(definition, encoding="utf-8")
    metrics = "aggregate_metric_list: [{metric: acc, weight_by_size: true}]"
    (folder / "group.yaml").write_text(f"group: blimp_mean\ntask: [blimp]\n{metrics}\n")


@dataclass(frozen=True)
class Part:
    """Some tasks to ask one model, in a process of its own.

    Attributes:
        model: Name of the model.
        method: What it is pruned by, or "dense".
        preset: The preset that the tasks belong to.
        tasks: Those tasks.
        limit: How many questions of each; None for all.
        data_dir: Where the questions are.
    """

    model: str
    method: str
    preset: str
    tasks: tuple[str, ...]
    limit: int | None
    data_dir: Path


def ask(part: Part) -> yopo.TaskReport:
    """Return what a model scores, on one thread."""
    torch.set_num_threads(1)
    quiet()
    logging.getLogger("yopo").setLevel(logging.ERROR)
    path = SHARED / "models" / part.model
    return yopo.evaluate(
        pruned(path, part.method),
        AutoTokenizer.from_pretrained(path),
        tasks=part.tasks,
        data_dir=part.data_dir,
        limit=part.limit,
        batch=32,
    )


def measure(model: str, limit: int | None, blimp: Path, processes: int) -> list[dict[str, Any]]:
    """Return a row for each method and preset."""
    parts = [
        Part(
            model=model,
            method=method,
            preset=preset,
            tasks=tasks,
            limit=limit and max(1, int(limit * share)),
            data_dir=blimp if preset == "blimp" else SHARED / "eval",
        )
        for preset, tasks, share in TASKS
        for method in ("dense", *METHODS)
    ]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        reports = dict(zip(parts, pool.map(ask, parts), strict=True))
    rows = []
    for preset in dict.fromkeys(preset for preset, *_ in TASKS):
        dense, *others = (
            joined([reports[part] for part in parts if (part.preset, part.method) == (preset, way)])
            for way in ("dense", *METHODS)
        )
        for method, report in zip(METHODS, others, strict=True):
            found = beside(report, dense).to_dict()
            del found["members"], found["names"], found["pinned"]["questions from"]
            rows.append({"model": model, "method": method, "preset": preset, **found})
    return rows


def joined(reports: list[yopo.TaskReport]) -> yopo.TaskReport:
    """Return one report of what several tell of one model, asked in the same way."""
    versions = {name: v for r in reports for name, v in r.pinned["task versions"].items()}
    scores = [score for report in reports for score in report.scores]
    if len(reports) > 1:
        scores.sort(key=lambda score: PAPER.index(score.task))
    pinned = reports[0].pinned | {"task versions": versions}
    return replace(reports[0], scores=tuple(scores), pinned=pinned)


def beside(report: yopo.TaskReport, dense: yopo.TaskReport) -> yopo.TaskReport:
    """Return a report with the scores of the dense model beside its own."""
    pairs = zip(report.scores, dense.scores, strict=True)
    return replace(report, scores=tuple(replace(one, against=two.model) for one, two in pairs))


def page(rows: list[dict[str, Any]]) -> str:
    """Return the page of all rows."""
    table = [["model", "task", "metric", "questions", "chance", "dense", *METHODS]]
    by_task: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        for task, score in row["tasks"].items():
            by_task.setdefault((row["model"], task), {})[row["method"]] = score

    def cell(score: dict[str, Any]) -> str:
        error = "" if score["error"] is None else f" ± {100 * score['error']:.1f}"
        return f"{100 * score['value']:.1f}{error}"

    for (model, task), found in by_task.items():
        first = found[METHODS[0]]
        chance = f"{100 * first['chance']:.1f}"
        cells = [model, task, first["metric"], f"{first['questions']:,}", chance]
        cells += [cell(first["against"]), *(cell(found[method]["model"]) for method in METHODS)]
        table.append(cells)
    told = rows[0]["pinned"].items()
    pinned = "; ".join(f"{n} {v}" for n, v in told if n not in ("task versions", "limit"))
    return (
        "# Zero-shot accuracy\n\nPercent, ± one standard error over the questions, at a ratio of "
        f"{RATIO} (`python benchmarks/tasks.py`). Where a task has more questions than the table "
        "tells, the first ones were asked (`--limit 300`). The models are small, and know little "
        "more than how words follow one another. On the paper's tasks and on MMLU the dense ones "
        "are near chance: these show that the pipeline works, not which method is better. On "
        "BLiMP, which asks for the likelier of two sentences, they are well above it, but what a "
        "cut loses is hardly more than the standard error. Perplexity tells more.\n\n"
        f"{format_table(table)}\n\nThe paper's tasks: {pinned}.\n"
    )


def main() -> None:
    """Measure, and write the results after each model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--models", nargs="+", choices=SHARED_MODELS, default=SHARED_MODELS)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--processes", type=int, default=2, help="of one thread each")
    arguments = parser.parse_args()
    if not (SHARED / "eval").is_dir():
        raise SystemExit(f"{SHARED / 'eval'} is not there: nothing to ask.")
    rows = kept_rows("tasks")
    with tempfile.TemporaryDirectory() as folder:
        define_blimp(Path(folder))
        for name in arguments.models:
            found = measure(name, arguments.limit, Path(folder), arguments.processes)
            rows = [row for row in rows if row["model"] != name] + found
            rows.sort(key=lambda row: SHARED_MODELS.index(row["model"]))
            keep_result("tasks", rows)
            (RESULTS / "tasks.md").write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
