"""The paper's tables, on a machine that has the weights: LLaMA-2-7B, Phi-2, OPT.

    python benchmarks/llama2.py meta-llama/Llama-2-7b-hf
    python benchmarks/llama2.py microsoft/phi-2
    python benchmarks/llama2.py facebook/opt-2.7b --ratios 0.3
    python benchmarks/llama2.py MODEL --methods yopo prunenet --recover train.txt
    python benchmarks/llama2.py MODEL --text wikitext2.txt --data-dir FOLDER    without a network

Prunes at 0.2, 0.25 and 0.3 by the published method, by yopo's default and at random, and measures
of the dense and of each pruned model: parameters, perplexity in windows of 2048 tokens, the five
zero-shot tasks, seconds of training and of cutting. `--recover` tunes each with LoRA on a text
afterwards, by the published settings, and measures it again; `--recover self` lets the dense model
teach instead. Writes results/paper-MODEL.json and .md after each line, and goes on from there.

Beside them the page puts what the paper reports for these models (arXiv 2501.15296, averages over
the five tasks as reprinted in the tables of LILA).
"""

import argparse
import gc
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import yopo
from common import RESULTS, keep_result, kept_rows, machine, quiet
from yopo.report import format_table

RATIOS = (0.2, 0.25, 0.3)
METHODS = ("prunenet", "yopo", "random rows")
REPORTED = {
    "Llama-2-7b-hf": {"dense": 69.00, 0.2: 61.67, 0.25: 58.63, 0.3: 55.45},
    "phi-2": {"dense": 72.24, 0.2: 66.59, 0.25: 64.10, 0.3: 61.05},
}
"""Mean accuracy over the five tasks, percent, of PruneNet without recovery."""


def prune(model: Any, method: str, ratio: float, trained: dict[str, Any]) -> float:
    """Prune a model in place by a method, and return the seconds of cutting.

    A policy is trained once, at the first ratio that asks for it, and used for all.
    """
    if method != "random rows" and method not in trained:
        new = yopo.PolicyPruner.prunenet if method == "prunenet" else yopo.PolicyPruner
        began = time.perf_counter()
        trained[method] = new(ratio=ratio).fit(model)
        trained[f"{method} seconds"] = time.perf_counter() - began
    began = time.perf_counter()
    if method == "random rows":
        plan = yopo.plan_by_criterion(model, ratio, criterion=yopo.criteria.random_rows(0))
        yopo.apply_plan(model, plan)
    else:
        trained[method].prune(model, ratio)
    return time.perf_counter() - began


def measure(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what is told of one model."""
    text = arguments.text if arguments.text == "wikitext2" else Path(arguments.text)
    report = yopo.evaluate(
        model,
        tokenizer,
        tasks=arguments.tasks,
        data_dir=arguments.data_dir,
        limit=arguments.limit,
        batch=arguments.batch,
    )
    average = report.average or report.scores[0]
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "perplexity": yopo.perplexity(model, text, tokenizer=tokenizer, batch=1),
        "accuracy": average.model.value,
        "error": average.model.error,
        **report.to_dict(),
    }


def loaded(arguments: argparse.Namespace) -> Any:
    """Return a fresh copy of the dense model."""
    gc.collect()
    return yopo.load(arguments.model, dtype=arguments.dtype).to(arguments.device)


def lines(arguments: argparse.Namespace) -> list[tuple[str, float]]:
    """Return the methods and ratios to measure, the dense model first."""
    return [("dense", 0.0)] + [(m, ratio) for m in arguments.methods for ratio in arguments.ratios]


def rows_of(
    method: str, ratio: float, arguments: argparse.Namespace, trained: dict[str, Any]
) -> list[dict[str, Any]]:
    """Measure one line: a method at a ratio, and once more after recovery where that is asked."""
    tokenizer, model = AutoTokenizer.from_pretrained(arguments.model), loaded(arguments)
    row: dict[str, Any] = {"method": method, "ratio": ratio, "recovered": False}
    if method != "dense":
        row["cut_seconds"] = prune(model, method, ratio, trained)
        row["fit_seconds"] = trained.get(f"{method} seconds", 0.0)
    found = [row | measure(model, tokenizer, arguments)]
    if method != "dense" and arguments.recover is not None:
        from_self = arguments.recover == "self"
        began = time.perf_counter()
        yopo.recover(
            model,
            "self" if from_self else Path(arguments.recover),
            teacher=loaded(arguments) if from_self else None,
            tokenizer=tokenizer,
            settings="paper" if from_self else "published",
        )
        seconds = time.perf_counter() - began
        found.append(
            row
            | {"recovered": True, "recover_seconds": seconds}
            | measure(model, tokenizer, arguments)
        )
    return found


def page(rows: list[dict[str, Any]], name: str, device: str) -> str:
    """Return the page of all lines."""
    dense = rows[0]
    table = [["method", "ratio", "parameters", "perplexity", "accuracy", "kept", "paper", "fit s"]]
    for row in rows:
        is_published = row["method"] in ("dense", "prunenet") and not row["recovered"]
        key = "dense" if row["method"] == "dense" else row["ratio"]
        paper = REPORTED.get(name, {}).get(key) if is_published else None
        table.append(
            [
                f"{row['method']}{' + recovery' if row['recovered'] else ''}",
                f"{row['ratio']:g}",
                f"{row['parameters'] / dense['parameters']:.1%}",
                f"{row['perplexity']:.2f}",
                f"{100 * row['accuracy']:.2f} ± {100 * row['error']:.2f}",
                f"{row['accuracy'] / dense['accuracy']:.1%}",
                "" if paper is None else f"{paper:.2f}",
                f"{row.get('fit_seconds', 0.0):.0f}",
            ]
        )
    return (
        f"# The paper's tables: {name}\n\nOn {device} (`python benchmarks/llama2.py`). Accuracy is "
        'the mean over the tasks, in percent, ± one standard error; "kept" is its share of the '
        f"dense model's.\n\n{format_table(table)}\n"
    )


def main(given: list[str] | None = None) -> None:
    """Measure line by line, each kept before the next one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", help="a model on the hub or on disk")
    parser.add_argument("--ratios", nargs="+", type=float, default=list(RATIOS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--tasks", default="paper")
    parser.add_argument("--data-dir", type=Path, help="folder with the questions")
    parser.add_argument("--text", default="wikitext2", help="wikitext2, or a file")
    parser.add_argument("--recover", metavar="FILE", help='text to recover on, or "self"')
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", default="auto")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    parser.add_argument("--device", default="cpu" if accelerator is None else accelerator.type)
    arguments = parser.parse_args(given)
    quiet()
    name = Path(arguments.model).name
    rows, trained = kept_rows(f"paper-{name}"), {}
    done = {(row["method"], row["ratio"]) for row in rows}
    device = machine(torch.device(arguments.device))
    for method, ratio in lines(arguments):
        if (method, ratio) in done:
            continue
        rows += rows_of(method, ratio, arguments, trained)
        keep_result(f"paper-{name}", rows)
        (RESULTS / f"paper-{name}.md").write_text(page(rows, name, device), encoding="utf-8")
        print(page(rows, name, device), flush=True)


if __name__ == "__main__":
    main()
