"""What each command is told."""

import argparse
from pathlib import Path
from typing import Any

import yopo
from yopo.cli import commands, metric_commands
from yopo.evaluation.texts import NAMED
from yopo.plan import MultipleOf


def parser_of_commands() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    parser = argparse.ArgumentParser(
        prog="yopo", description="Remove hidden units of FFNs from language models, without data."
    )
    parser.add_argument("--version", action="version", version=f"yopo {yopo.__version__}")
    found = parser.add_subparsers(required=True, metavar="command")
    for add in (
        _add_info,
        _add_fit,
        _add_prune,
        _add_demo,
        _add_bench,
        _add_report,
        _add_eval,
        _add_recover,
        _add_sparsify,
        _add_evolve,
    ):
        add(found)
    return parser


def _add_info(found: Any) -> None:
    info = found.add_parser("info", help="what a model's FFNs are, what ratios would remove")
    info.set_defaults(run=commands.info_command)
    _add_model(info)
    info.add_argument(
        "--ratio",
        type=float,
        nargs="+",
        default=[0.1, 0.2, 0.3, 0.5],
        help="shares of FFN rows to remove",
    )
    info.add_argument(
        "--multiple-of", type=_multiple, default="auto", help="what widths are a multiple of"
    )


def _add_fit(found: Any) -> None:
    fit = found.add_parser("fit", help="train a policy and save it")
    fit.set_defaults(run=commands.fit_command)
    _add_model(fit)
    _add_recipe(fit)


def _add_prune(found: Any) -> None:
    prune = found.add_parser("prune", help="remove rows and save the smaller model")
    prune.set_defaults(run=commands.prune_command)
    _add_model(prune)
    prune.add_argument("--policy", type=Path, help="folder of a policy; by default one is fitted")
    prune.add_argument("--parameters", type=float, help="how many the model may have, as 5e9")
    prune.add_argument("--bytes", type=float, help="how many bytes they may take, as 8e9")
    prune.add_argument(
        "--ratio-of",
        choices=["ffn", "model"],
        default="ffn",
        help="what --ratio is a share of: FFN rows, or all parameters",
    )
    prune.add_argument("--layers", nargs="+", type=_layer, help="numbers or patterns; default all")
    _add_recipe(prune)


def _add_recipe(command: argparse.ArgumentParser) -> None:
    """Add what both `fit` and `prune` are told of how to decide."""
    command.add_argument("--output", type=Path, required=True, help="folder to write")
    command.add_argument("--ratio", type=float, help="share of FFN rows to remove; default 0.3")
    command.add_argument(
        "--allocation",
        choices=["uniform", "adaptive"],
        help="one share for all FFNs, or more where less is lost",
    )
    command.add_argument(
        "--method",
        choices=["lean", "prunenet"],
        help="the recipe from weights alone, or PruneNet as published",
    )
    command.add_argument(
        "--reward",
        choices=["output", "divergence", "spectral"],
        default="output",
        help="what a policy learns from",
    )
    command.add_argument(
        "--evidence",
        choices=["auto", "self", "weights"],
        default="auto",
        help="self, or auto with what is learned, loads the model and lets it write text",
    )
    command.add_argument("--episodes", type=int, help="episodes of policy gradient")
    _add_seed(command)
    _add_dtype(command)


def _add_demo(found: Any) -> None:
    demo = found.add_parser("demo", help="the whole job on a small model, with baselines")
    demo.set_defaults(run=commands.demo_command)
    demo.add_argument("--model", help="a model on the hub or on disk; default: the embedded one")
    demo.add_argument("--text", type=Path, help="text to measure perplexity on")
    demo.add_argument("--output", type=Path, default=Path("yopo-demo"), help="folder to write")


def _add_bench(found: Any) -> None:
    bench = found.add_parser("bench", help="how fast a model loads and runs, beside its bound")
    bench.set_defaults(run=commands.bench_command)
    _add_model(bench)
    bench.add_argument("--against", metavar="DENSE", help="a model to time in turn with it")
    bench.add_argument("--batch", type=int, default=1, help="sequences a pass; default 1")
    bench.add_argument("--prompt", type=int, default=128, help="tokens to read; default 128")
    bench.add_argument("--new-tokens", type=int, default=32, help="tokens to write; default 32")
    bench.add_argument("--repeats", type=int, default=5, help="turns that are timed; default 5")
    _add_dtype(bench)
    bench.add_argument("--device", help="default: the accelerator if there is one, else the CPU")
    bench.add_argument("--json", type=Path, metavar="FILE", help="file to write the figures to")


def _add_report(found: Any) -> None:
    report = found.add_parser("report", help="what was removed of a pruned checkpoint")
    report.set_defaults(run=commands.report_command)
    report.add_argument("folder", type=Path, help="the folder of the pruned checkpoint")
    report.add_argument(
        "--against",
        metavar="DENSE",
        help="the model that was cut: compares spectra, and writes plots into FOLDER/report",
    )


def _add_eval(found: Any) -> None:
    evaluation = found.add_parser("eval", help="perplexity and accuracy, beside another model")
    evaluation.set_defaults(run=commands.eval_command)
    _add_model(evaluation)
    evaluation.add_argument("--against", metavar="DENSE", help="a model to measure beside it")
    evaluation.add_argument(
        "--text", nargs="+", default=[], help=f"for perplexity: {', '.join(NAMED)}, or files"
    )
    evaluation.add_argument(
        "--tasks", nargs="+", default=[], help="paper, mmlu, or tasks and groups of lm-eval"
    )
    evaluation.add_argument("--data-dir", type=Path, help="folder with the questions, for offline")
    evaluation.add_argument("--few-shot", type=int, help="solved examples before each question")
    evaluation.add_argument("--limit", type=int, help="questions of each task; default all")
    evaluation.add_argument("--batch", type=int, default=8, help="requests a pass; default 8")
    evaluation.add_argument("--window", type=int, help="tokens a window; default 2048 or fewer")
    _add_seed(evaluation)
    _add_dtype(evaluation)
    evaluation.add_argument("--json", type=Path, metavar="FILE", help="file to write to")
    evaluation.add_argument(
        "--write-card", action="store_true", help="write the figures into the card of the model"
    )


def _add_recover(found: Any) -> None:
    recovery = found.add_parser("recover", help="train adapters on a pruned model, merge them")
    recovery.set_defaults(run=commands.recover_command)
    _add_model(recovery)
    recovery.add_argument("--output", type=Path, required=True, help="folder to write")
    recovery.add_argument("--teacher", metavar="DENSE", help="the model that was cut")
    recovery.add_argument(
        "--data", default="self", help="self, the default: the teacher writes; or a file"
    )
    recovery.add_argument(
        "--settings",
        choices=["paper", "published"],
        default="paper",
        help="those of PruneNet's paper, or of its script",
    )
    recovery.add_argument(
        "--targets",
        choices=["both", "attention", "ffn"],
        default="both",
        help="which matrices get an adapter",
    )
    recovery.add_argument(
        "--checkpoints",
        type=Path,
        help="folder to keep checkpoints in, and to go on from; default: OUTPUT.checkpoints, until "
        "OUTPUT is there",
    )
    _add_seed(recovery)
    _add_dtype(recovery)


def _add_sparsify(found: Any) -> None:
    sparsify = found.add_parser(
        "sparsify", help="make weights zero by Pruner-Zero, Wanda, SparseGPT or a formula"
    )
    sparsify.set_defaults(run=metric_commands.sparsify_command)
    _add_model(sparsify)
    sparsify.add_argument("--output", type=Path, required=True, help="folder to write")
    sparsify.add_argument(
        "--metric",
        default="pruner-zero",
        help="pruner-zero, wanda, gblm, magnitude, sparsegpt, or a formula such as 'mul(W, G)'",
    )
    sparsify.add_argument(
        "--structured",
        action="store_true",
        help="remove FFN rows; --sparsity is their share then, and has no default",
    )
    _add_zeros(sparsify)


def _add_evolve(found: Any) -> None:
    evolution = found.add_parser("evolve", help="search for a formula that prunes better")
    evolution.set_defaults(run=metric_commands.evolve_command)
    _add_model(evolution)
    evolution.add_argument(
        "--output", type=Path, required=True, help="folder of the search, which goes on from there"
    )
    evolution.add_argument(
        "--rows",
        action="store_true",
        help="of FFN rows, judged by the model's own predictions; takes --ratio in place of "
        "--sparsity, --pattern and --text",
    )
    evolution.add_argument("--ratio", type=float, help="share of rows to remove; default 0.3")
    evolution.add_argument(
        "--population", type=int, default=50, help="formulas that breed; default 50"
    )
    evolution.add_argument("--iterations", type=int, default=300, help="children; default 300")
    evolution.add_argument(
        "--offspring",
        type=int,
        default=1,
        help="children made at once, on which the result depends; default 1",
    )
    evolution.add_argument(
        "--workers",
        type=int,
        default=1,
        help="processes, of which --offspring keeps as many busy; default 1",
    )
    _add_zeros(evolution)


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help="a model on the hub or on disk")


def _add_seed(command: argparse.ArgumentParser) -> None:
    command.add_argument("--seed", type=int, default=0, help="seed of all randomness")


def _add_dtype(command: argparse.ArgumentParser) -> None:
    command.add_argument("--dtype", default="auto", help="dtype to load the weights in")


def _add_zeros(command: argparse.ArgumentParser) -> None:
    """Add what both `sparsify` and `evolve` are told of which weights become zero."""
    command.add_argument("--sparsity", type=float, help="share of zeros; default 0.5")
    command.add_argument("--pattern", help="unstructured, 2:4, 4:8 …; default unstructured")
    command.add_argument(
        "--text", help=f"for gradients and inputs: {', '.join(NAMED)}, or a file; default: own text"
    )
    _add_seed(command)
    _add_dtype(command)


def _multiple(text: str) -> MultipleOf:
    return "auto" if text == "auto" else int(text)


def _layer(text: str) -> int | str:
    return int(text) if text.isdigit() else text
