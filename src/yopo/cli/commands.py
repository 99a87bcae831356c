"""What each command does."""

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from yopo.adapters import find_ffns
from yopo.cli.figures import measure
from yopo.cli.files import check_json, copy_tokenizer, write_json, written
from yopo.cli.pruners import new_pruner, pruner_of
from yopo.cli.reports import recovered, report_beside
from yopo.errors import InvalidArgumentError, YopoError
from yopo.evaluation import read_text
from yopo.evaluation.definitions import find_tasks
from yopo.evaluation.tasks import open_with_tokenizer
from yopo.loading import build_on_meta, load, read_config
from yopo.on_disk import prune_checkpoint
from yopo.plan import plan_widths
from yopo.pruning_report import PruningReport
from yopo.ranks import rank_and_count
from yopo.recovery import recover
from yopo.report import describe_ffns, format_table, sizes_of
from yopo.speed import benchmark
from yopo.staging import check_target


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
    pruner = new_pruner(options)
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
    pruner = pruner_of(options)
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
        check_target(options.output, Path(options.model))
        with written(options.output) as folder:
            model = load(options.model, dtype=options.dtype)
            if not pruner.is_fitted:
                pruner.fit(model)
            pruner.prune(model, options.ratio, layers=options.layers, **size)
            if folder is not None:
                model.save_pretrained(folder)
                copy_tokenizer(options.model, folder)
                replace(pruner.report, call=options.command).write_card(folder)
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
        InvalidArgumentError: If a folder is missing, nothing is to be measured, or a card is to
            hold what is not asked for.
    """
    check_json(options.json)
    if not options.text and not options.tasks:
        raise InvalidArgumentError("there is nothing to measure: name `--text` or `--tasks`.")
    if options.write_card and (options.against is None or not options.text):
        raise InvalidArgumentError("`--write-card` needs `--against` and `--text`.")
    card = PruningReport.load(options.model) if options.write_card else None
    texts = {name: read_text(name) for name in options.text}
    if options.tasks:
        find_tasks(options.tasks, options.data_dir)
    sources = [source for source in (options.against, options.model) if source is not None]
    figures = measure(sources, texts, options)
    if texts:
        print(figures.table([Path(source).name for source in sources]))
    if options.json is not None:
        write_json(options.json, figures.to_dict())
    if card is not None:
        figures.written_into(card).write_card(options.model)
        print(f"Written into the card and the report of {options.model}.")


def recover_command(options: argparse.Namespace) -> None:
    """Train adapters on a pruned model, and merge them.

    Raises:
        InvalidArgumentError: If the folder to write is not empty.
        YopoError: If the recovered model cannot be written.
    """
    check_target(options.output, Path(options.model))
    report = report_beside(options.model)
    output: Path = options.output
    checkpoints = options.checkpoints or output.with_name(f"{output.name}.checkpoints")
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
        output=checkpoints,
        seed=options.seed,
    )
    try:
        with written(options.output) as folder:
            if folder is not None:
                model.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
                if report is not None:
                    recovered(report, options).write_card(folder)
    except (YopoError, OSError) as error:
        raise YopoError(
            f"{error} Nothing is lost: the same command goes on from `{checkpoints}`."
        ) from error
    if rank_and_count()[0] == 0:
        if options.checkpoints is None:
            shutil.rmtree(checkpoints, ignore_errors=True)
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
