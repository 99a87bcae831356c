"""What `yopo eval` measures of models, told as it comes."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from yopo.evaluation import TaskReport, evaluate, perplexity
from yopo.evaluation.tasks import open_with_tokenizer
from yopo.evaluation.texts import tokens_of
from yopo.evaluation.windows import window_of
from yopo.pruning_report import PruningReport
from yopo.report import format_table


@dataclass(slots=True)
class Figures:
    """Collect figures of models.

    Attributes:
        perplexities: For each text those of all models.
        measured: For each text how they were measured.
        scores: What the last model scores on tasks, beside the one before.
    """

    perplexities: dict[str, list[float]] = field(default_factory=dict)
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)
    scores: TaskReport | None = None

    def table(self, names: Sequence[str]) -> str:
        """Return a table of perplexities."""
        rows = [[text, *(f"{v:.3f}" for v in found)] for text, found in self.perplexities.items()]
        return format_table([["perplexity", *names], *rows])

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values that JSON can hold."""
        scores = {} if self.scores is None else self.scores.to_dict()
        return {"perplexity": self.perplexities, "measured": self.measured, **scores}

    def written_into(self, report: PruningReport) -> PruningReport:
        """Return a report with these figures, of a dense and of a pruned model."""
        for text, (dense, pruned) in self.perplexities.items():
            how = self.measured[text]
            report = report.with_perplexity(text, dense=dense, pruned=pruned, how=how)
        return report if self.scores is None else report.with_tasks(self.scores)


def measure(
    sources: Sequence[str], texts: Mapping[str, str], options: argparse.Namespace
) -> Figures:
    """Measure one model after another, and print each figure."""
    found = Figures()
    for source in sources:
        model, tokenizer = open_with_tokenizer(source, dtype=options.dtype)
        for name, text in texts.items():
            value, how = _perplexity(model, tokenizer, text, options)
            found.perplexities.setdefault(name, []).append(value)
            found.measured[name] = _both(found.measured.get(name, how), how)
            print(f"{source}: perplexity {value:.3f} on {name}", flush=True)
        if options.tasks:
            found.scores = _scores(model, tokenizer, source, found.scores, options)
            print(f"{found.scores}\n", flush=True)
    return found


def _perplexity(
    model: Any, tokenizer: Any, text: str, options: argparse.Namespace
) -> tuple[float, dict[str, Any]]:
    """Return the perplexity of a model on a text, and how it was measured."""
    tokens_T = tokens_of(text, tokenizer)
    window = window_of(model, options.window)
    value = perplexity(model, tokens_T, tokenizer=tokenizer, window=window, batch=options.batch)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return value, {"window": window, "tokens": len(tokens_T), "dtype": dtype}


def _both(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return how two models were measured: what differs is told of both."""
    return {
        name: value if first[name] == value else f"{first[name]} and {value}"
        for name, value in second.items()
    }


def _scores(
    model: Any,
    tokenizer: Any,
    source: str,
    against: TaskReport | None,
    options: argparse.Namespace,
) -> TaskReport:
    """Return what a model scores on tasks, beside another one if there is one."""
    scores = evaluate(
        model,
        tokenizer,
        tasks=options.tasks,
        against=against,
        data_dir=options.data_dir,
        few_shot=options.few_shot,
        limit=options.limit,
        batch=options.batch,
        window=options.window,
        seed=options.seed,
    )
    return replace(scores, names=(Path(source).name, against.names[0] if against else "against"))
