"""What each command does."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from yopo.adapters import find_ffns
from yopo.cli.files import check_json, check_output, copy_tokenizer, write_json
from yopo.errors import InvalidArgumentError
from yopo.evaluation import TaskReport, evaluate, perplexity
from yopo.evaluation.tasks import open_with_tokenizer
from yopo.evaluation.texts import NAMED
from yopo.loading import build_on_meta, load, read_config
from yopo.on_disk import prune_checkpoint
from yopo.plan import plan_widths
from yopo.pruner import PolicyPruner
from yopo.pruning_report import PruningReport
from yopo.ranks import rank_and_count
from yopo.recovery import recover
from yopo.report import describe_ffns, format_table, sizes_of
from yopo.speed import benchmark


def info_command(options: argparse.Namespace) -> None:
    """Tell what there is to prune."""
    config, model_class, widths = read_config(options.model)
    dtype = getattr(config, "dtype", None) or torch.float32
    model = build_on_meta(config, model_class, widths, dtype=dtype)
    ffns = find_ffns(model, prove_unknown=False)
    sizes = sizes_of(model, ffns)
    print(
        f"{type(model).__name__}: {sizes.parameters:,} parameters, {sizes.bytes / 1e6:,.1f} MB, "
        f"{sizes.ffn_parameters / sizes.parameters:.1%} of them in FFN rows\n"
    )
    print(describe_ffns(ffns))
    rows = [["ratio", "reached", "rows removed", "parameters removed", "of all", "MB left"]]
    for ratio in options.ratio:
        kept = plan_widths(ffns, ratio, multiple_of=options.multiple_of)
        left = sizes_of(model, ffns, kept)
        removed = sizes.parameters - left.parameters
        rows.append(
            [
                f"{ratio:g}",
                f"{1 - left.ffn_rows / sizes.ffn_rows:.4f}",
                f"{sizes.ffn_rows - left.ffn_rows:,}",
                f"{removed:,}",
                f"{removed / sizes.parameters:.1%}",
                f"{left.bytes / 1e6:,.1f}",
            ]
        )
    print(f"\n{format_table(rows)}")


def fit_command(options: argparse.Namespace) -> None:
    """Train a policy and save it."""
    pruner = _new_pruner(options)
    from_disk = options.dtype == "auto" and not pruner.runs_model
    pruner.fit(options.model if from_disk else load(options.model, dtype=options.dtype))
    if rank_and_count()[0] == 0:
        pruner.save_policy(options.output)
        print(f"Policy written to {options.output}.")


def prune_command(options: argparse.Namespace) -> None:
    """Prune a model and save it.

    Raises:
        InvalidArgumentError: If the folder to write is not empty.
    """
    size = {"ratio_of": options.ratio_of, "parameters": options.parameters, "bytes": options.bytes}
    pruner = _pruner(options)
    if options.dtype == "auto" and not pruner.runs_model:
        prune_checkpoint(
            options.model,
            options.output,
            options.ratio,
            pruner=pruner,
            layers=options.layers,
            command=options.command,
            **size,
        )
    else:
        check_output(options.output)
        model = load(options.model, dtype=options.dtype)
        if not pruner.is_fitted:
            pruner.fit(model)
        pruner.prune(model, options.ratio, layers=options.layers, **size)
        if rank_and_count()[0] == 0:
            model.save_pretrained(options.output)
            copy_tokenizer(options.model, options.output)
            replace(pruner.report, call=options.command).write_card(options.output)
    if rank_and_count()[0] == 0:
        before, after = pruner.report.before, pruner.report.after
        print(
            f"Removed {before.ffn_rows - after.ffn_rows:,} of {before.ffn_rows:,} FFN rows "
            f"({1 - after.ffn_rows / before.ffn_rows:.2%}), "
            f"{before.parameters - after.parameters:,} of {before.parameters:,} parameters "
            f"({1 - after.parameters / before.parameters:.1%}); {before.bytes / 1e6:,.1f} → "
            f"{after.bytes / 1e6:,.1f} MB. Written to {options.output}."
        )


def report_command(options: argparse.Namespace) -> None:
    """Show what was removed of a checkpoint."""
    report = PruningReport.load(options.folder)
    if options.against is None:
        print(report)
        return
    report = report.with_spectra(options.against)
    report.save(options.folder / "report")
    print(f"{report}\nWritten to {options.folder / 'report'}; report.html shows it best.")


def eval_command(options: argparse.Namespace) -> None:
    """Measure perplexity and accuracy.

    Raises:
        InvalidArgumentError: If a folder is missing, or a card is to hold what is not asked for.
    """
    check_json(options.json)
    if options.write_card and (options.against is None or not options.text):
        raise InvalidArgumentError("`--write-card` needs `--against` and `--text`.")
    card = PruningReport.load(options.model) if options.write_card else None
    texts = {text: text if text in NAMED else Path(text) for text in options.text}
    figures: dict[str, list[float]] = {text: [] for text in texts}
    scores: TaskReport | None = None
    for source in [*([] if options.against is None else [options.against]), options.model]:
        model, tokenizer = open_with_tokenizer(source, dtype=options.dtype)
        for name, text in texts.items():
            value = perplexity(model, text, tokenizer=tokenizer, window=options.window)
            figures[name].append(value)
        if options.tasks:
            scores = evaluate(
                model,
                tokenizer,
                tasks=options.tasks[0] if len(options.tasks) == 1 else options.tasks,
                against=scores,
                data_dir=options.data_dir,
                few_shot=options.few_shot,
                limit=options.limit,
                batch=options.batch,
                window=options.window,
                seed=options.seed,
            )
    names = [Path(source).name for source in (options.against, options.model) if source]
    if figures:
        rows = [[name, *(f"{value:.3f}" for value in found)] for name, found in figures.items()]
        print(format_table([["perplexity", *names], *rows]) + "\n")
    if scores is not None:
        scores = replace(scores, names=(names[-1], names[0]))
        print(scores)
    if options.json is not None:
        write_json(options.json, {"perplexity": figures, **(scores.to_dict() if scores else {})})
    if card is not None:
        for name, (dense, pruned) in figures.items():
            card = card.with_perplexity(name, dense=dense, pruned=pruned)
        (card if scores is None else card.with_tasks(scores)).write_card(options.model)
        print(f"Written into the card and the report of {options.model}.")


def recover_command(options: argparse.Namespace) -> None:
    """Train adapters on a pruned model, and merge them.

    Raises:
        InvalidArgumentError: If the folder to write is not empty.
    """
    check_output(options.output)
    model, tokenizer = open_with_tokenizer(options.model, dtype=options.dtype)
    teacher = None
    if options.teacher is not None:
        teacher, _ = open_with_tokenizer(options.teacher, tokenizer, dtype=options.dtype)
    data = "self" if options.data == "self" else Path(options.data)
    recover(
        model,
        data,
        teacher=teacher,
        tokenizer=tokenizer,
        settings=options.settings,
        targets=options.targets,
        output=options.checkpoints,
        seed=options.seed,
    )
    if rank_and_count()[0] == 0:
        model.save_pretrained(options.output)
        tokenizer.save_pretrained(options.output)
        print(f"Written to {options.output}.")


def bench_command(options: argparse.Namespace) -> None:
    """Time a model."""
    check_json(options.json)
    report = benchmark(
        options.model,
        options.against,
        batch=options.batch,
        prompt=options.prompt,
        new_tokens=options.new_tokens,
        repeats=options.repeats,
        dtype=options.dtype,
        device=options.device,
    )
    print(report)
    if options.json is not None:
        write_json(options.json, report.to_dict())


def demo_command(options: argparse.Namespace) -> None:
    """Do the whole job on a small model."""
    from yopo.demo import run_demo

    if options.model is None:
        torch.set_num_threads(1)  # matrices this small gain nothing from threads, and lose by them
    run_demo(options.model, text=options.text, output=options.output)


def _pruner(options: argparse.Namespace) -> PolicyPruner:
    """Return the pruner whose policy is given, or a new one."""
    if options.policy is None:
        return _new_pruner(options)
    evidence = None if options.evidence == "auto" else options.evidence
    return PolicyPruner.from_policy(
        options.policy, evidence=evidence, allocation=options.allocation
    )


def _new_pruner(options: argparse.Namespace) -> PolicyPruner:
    """Return the pruner that the options describe: where they ask for nothing, the lean one."""
    common: dict[str, Any] = {"seed": options.seed}
    if options.ratio is not None:
        common["ratio"] = options.ratio
    asked = (options.allocation, options.reward, options.evidence, options.episodes)
    is_plain = asked == (None, "output", "auto", None)
    if options.method == "lean" or (options.method is None and is_plain):
        if not is_plain:
            raise InvalidArgumentError(
                "`--method lean` goes with `--ratio` and `--seed` alone: it looks at weights, and "
                "learns nothing."
            )
        return PolicyPruner.lean(**common)
    if options.episodes is not None:
        common["episodes"] = options.episodes
    if options.method == "prunenet":
        if options.allocation == "adaptive":
            raise InvalidArgumentError(
                "`--allocation adaptive` does not go with the published method."
            )
        return PolicyPruner.prunenet(**common)
    return PolicyPruner(
        reward=options.reward,
        evidence=options.evidence,
        allocation=options.allocation or "uniform",
        **common,
    )
