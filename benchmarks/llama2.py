"""The paper's tables, on a machine that has the weights: LLaMA-2-7B, Phi-2, OPT.

    python benchmarks/llama2.py meta-llama/Llama-2-7b-hf
    python benchmarks/llama2.py microsoft/phi-2
    python benchmarks/llama2.py facebook/opt-2.7b --ratios 0.3
    python benchmarks/llama2.py MODEL --methods yopo prunenet --recover wikitext2-train
    python benchmarks/llama2.py MODEL --text wikitext2.txt --data-dir FOLDER    without a network

Prunes at 0.2, 0.25 and 0.3 by the published method, by yopo's default and at random, and measures
of the dense and of each pruned model: parameters, perplexity in windows of 2048 tokens, the five
zero-shot tasks, seconds of training and of cutting. A policy is trained at the first of the ratios
and used for all. `--recover` tunes each with LoRA on a text afterwards, by the published settings,
and measures it again: `wikitext2-train`, `alpaca-train` or a file; `--recover self` lets the dense
model teach instead, by yopo's settings. Writes docs/results/paper-MODEL.json and .md after each
line, and goes on from there; a file of lines that were measured in another way is refused.

Beside them the page puts what the paper reports for these models (arXiv 2501.15296, averages over
the five tasks as reprinted in the tables of LILA).
"""

import argparse
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import yopo
from common import RESULTS, keep_result, kept_rows, machine, quiet
from llama2_page import ON_WIKITEXT, SETTINGS_OF_RECOVERY, page
from yopo.evaluation.windows import window_of

RATIOS = (0.2, 0.25, 0.3)
METHODS = ("prunenet", "yopo", "random rows")
TRAINING: dict[str, Callable[[Any], Any]] = {
    ON_WIKITEXT: lambda load: load("Salesforce/wikitext", "wikitext-2-raw-v1", split="train"),
    "alpaca-train": lambda load: load("tatsu-lab/alpaca", split="train").train_test_split(
        test_size=0.2, seed=42
    )["train"],
}
"""Texts to recover on; of Alpaca the four fifths that SliceGPT does not set apart."""


def prune(
    model: Any, method: str, ratio: float, trained: dict[str, Any], *, train_at: float
) -> float:
    """Prune a model in place by a method, and return the seconds of cutting.

    A policy is trained on the first model that asks for it, and used for all.
    """
    if method != "random rows" and method not in trained:
        new = yopo.PolicyPruner.prunenet if method == "prunenet" else yopo.PolicyPruner
        began = time.perf_counter()
        trained[method] = new(ratio=train_at).fit(model)
        trained[f"{method} seconds"] = time.perf_counter() - began
    began = time.perf_counter()
    if method == "random rows":
        plan = yopo.plan_by_criterion(model, ratio, criterion=yopo.criteria.random_rows(0))
        yopo.apply_plan(model, plan)
    else:
        trained[method].prune(model, ratio)
    return time.perf_counter() - began


def recover(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> float:
    """Recover a model in place as the arguments say, and return the seconds that it took."""
    text, from_self = arguments.recover, arguments.recover == "self"
    data: Any = text if from_self else Path(text)
    if text in TRAINING:
        from datasets import load_dataset

        data = TRAINING[text](load_dataset)
    began = time.perf_counter()
    yopo.recover(
        model,
        data,
        teacher=loaded(arguments) if from_self else None,
        tokenizer=tokenizer,
        settings=SETTINGS_OF_RECOVERY[from_self],
    )
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
        "window": window_of(model, None),
        "accuracy": average.model.value,
        "error": average.model.error,
        **report.to_dict(),
    }


def loaded(arguments: argparse.Namespace) -> Any:
    """Return a fresh copy of the dense model."""
    gc.collect()
    return yopo.load(arguments.model, dtype=arguments.dtype).to(arguments.device)


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what moves the figures of all lines."""
    named = {key: getattr(arguments, key) for key in ("model", "tasks", "limit", "text", "dtype")}
    data_dir = arguments.data_dir
    return named | {
        "data_dir": None if data_dir is None else str(data_dir),
        "trained_at": arguments.ratios[0],
    }


def lines(arguments: argparse.Namespace) -> list[tuple[str, float]]:
    """Return the methods and ratios to measure, the dense model first."""
    return [("dense", 0.0)] + [(m, ratio) for m in arguments.methods for ratio in arguments.ratios]


def rows_of(
    method: str,
    ratio: float,
    wanted: Sequence[str | None],
    arguments: argparse.Namespace,
    trained: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """Measure a method at a ratio: as cut, None among what is wanted, and after recovery."""
    tokenizer, model = AutoTokenizer.from_pretrained(arguments.model), loaded(arguments)
    row: dict[str, Any] = {"method": method, "ratio": ratio, "settings": settings_of(arguments)}
    if method != "dense":
        train_at = arguments.ratios[0]
        row["cut_seconds"] = prune(model, method, ratio, trained, train_at=train_at)
        row["fit_seconds"] = trained.get(f"{method} seconds", 0.0)
    for text in wanted:
        if text is not None:
            row["recover_seconds"] = recover(model, tokenizer, arguments)
        yield row | {"recovered": text} | measure(model, tokenizer, arguments)


def check_settings(rows: list[dict[str, Any]], settings: dict[str, Any], name: str) -> None:
    """End here if lines that are there were measured in another way."""
    for row in rows:
        found = row.get("settings", {})
        moved = [f"{key} {found.get(key)}" for key in settings if found.get(key) != settings[key]]
        if moved:
            raise SystemExit(
                f"{RESULTS / name}.json was measured with {', '.join(moved)}: move it away, or "
                "measure in the same way."
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
    parser.add_argument("--recover", metavar="TEXT", help=f"{', '.join(TRAINING)}, a file or self")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", default="auto")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    parser.add_argument("--device", default="cpu" if accelerator is None else accelerator.type)
    arguments = parser.parse_args(given)
    quiet()
    name = f"paper-{Path(arguments.model).name}"
    rows = kept_rows(name)
    trained: dict[str, Any] = {}
    check_settings(rows, settings_of(arguments), name)
    device = machine(torch.device(arguments.device))
    for method, ratio in lines(arguments):
        done = {
            row["recovered"] for row in rows if (row["method"], row["ratio"]) == (method, ratio)
        }
        asked = (None,) if method == "dense" or not arguments.recover else (None, arguments.recover)
        wanted = [text for text in asked if text not in done]
        for row in rows_of(method, ratio, wanted, arguments, trained) if wanted else ():
            rows = sorted([*rows, row], key=_place)
            keep_result(name, rows)
            text = page(rows, name.removeprefix("paper-"), device)
            (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
            print(text, flush=True)


def _place(row: dict[str, Any]) -> tuple[int, float, str]:
    """Return where a line stands on the page."""
    return ("dense", *METHODS).index(row["method"]), row["ratio"], row["recovered"] or ""


if __name__ == "__main__":
    main()
