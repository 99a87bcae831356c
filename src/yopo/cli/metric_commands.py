"""What the commands about symbolic metrics do."""

import argparse
from pathlib import Path
from typing import Any

from yopo.adapters import find_ffns
from yopo.cli.files import check_output, copy_tokenizer, written
from yopo.errors import InvalidArgumentError
from yopo.evaluation.tasks import open_with_tokenizer
from yopo.evaluation.texts import NAMED
from yopo.loading import load
from yopo.ranks import rank_and_count
from yopo.report import sizes_of
from yopo.symbolic import (
    ROW_TERMINALS,
    WEIGHT_TERMINALS,
    Candidate,
    DivergenceFitness,
    EvolutionSettings,
    Fitness,
    MetricPruner,
    PerplexityFitness,
    collect_statistics,
    evolve,
    sparsity_of,
)
from yopo.symbolic.search_log import check_folder


def sparsify_command(options: argparse.Namespace) -> None:
    """Make weights of a model zero by a metric, or remove FFN rows, and save it.

    Raises:
        InvalidArgumentError: If the folder to write is not empty, or options contradict each other.
        YopoError: If it cannot be written.
    """
    check_output(options.output)
    if options.structured:
        _refuse(options, "pattern", beside="structured")
        if options.sparsity is None:
            raise InvalidArgumentError(
                "`--structured` needs `--sparsity`, the share of FFN rows to remove."
            )
    model, text = _open(options)
    before = sizes_of(model, find_ffns(model))
    pruner = MetricPruner(options.metric, seed=options.seed, **text)
    pattern = options.pattern or "unstructured"
    pruner.prune(model, options.sparsity, pattern=pattern, structured=options.structured)
    with written(options.output) as folder:
        if folder is not None:
            model.save_pretrained(folder)
            copy_tokenizer(options.model, folder)
    if options.structured:
        after = sizes_of(model, find_ffns(model))
        told = f"Removed {before.ffn_rows - after.ffn_rows:,} of {before.ffn_rows:,} FFN rows."
    else:
        shares = sparsity_of(model).values()
        told = f"{min(shares):.2%} to {max(shares):.2%} zeros in {len(shares)} matrices."
    print(f"{told} Written to {options.output}.")


def evolve_command(options: argparse.Namespace) -> None:
    """Search for a metric of weights or of FFN rows, from where an earlier run has ended.

    Raises:
        InvalidArgumentError: If the folder holds no search, or options contradict each other.
    """
    check_folder(options.output)
    settings = EvolutionSettings(
        population=options.population, iterations=options.iterations, offspring=options.offspring
    )
    if options.rows:
        _refuse(options, "sparsity", "pattern", "text", beside="rows")
    elif options.ratio is not None:
        raise InvalidArgumentError("`--ratio` needs `--rows`; without them, `--sparsity` says it.")
    model, text = _open(options)
    found = evolve(
        _fitness(options, model, text),
        settings=settings,
        terminals=ROW_TERMINALS if options.rows else WEIGHT_TERMINALS,
        seed=options.seed,
        folder=options.output,
        workers=options.workers,
    )
    if rank_and_count()[0] == 0:
        print(found.family_tree())
        print(f"\nbest:      {_told(found.best)}")
        if found.random:  # there is none where Ctrl-C came before
            print(f"at random: {_told(min(found.random, key=lambda each: each.fitness))}")
        print(f"\n{found.expression.formula()}\nWritten to {options.output}.")


def _fitness(options: argparse.Namespace, model: Any, text: dict[str, Any]) -> Fitness:
    """Return what a search is judged by."""
    if options.rows:
        ratio = 0.3 if options.ratio is None else options.ratio
        return DivergenceFitness(model, ratio, seed=options.seed)
    return PerplexityFitness(
        model,
        collect_statistics(model, seed=options.seed, **text),
        sparsity=options.sparsity,
        pattern=options.pattern or "unstructured",
        seed=options.seed + 1,
        **text,
    )


def _refuse(options: argparse.Namespace, *names: str, beside: str) -> None:
    """Refuse options that another one would make the command ignore."""
    for name in names:
        if getattr(options, name) is not None:
            raise InvalidArgumentError(f"`--{beside}` does not go with `--{name}`.")


def _open(options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Return the model, and what statistics are collected on."""
    if options.text is None:
        return load(options.model, dtype=options.dtype), {}
    model, tokenizer = open_with_tokenizer(options.model, dtype=options.dtype)
    data = options.text if options.text in NAMED else Path(options.text)
    return model, {"data": data, "tokenizer": tokenizer}


def _told(candidate: Candidate) -> str:
    return f"{candidate.fitness:.4f}  {candidate.expression}"
