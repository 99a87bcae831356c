"""The command line: thin, over the same functions that Python users call."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from yopo.adapters import find_ffns
from yopo.checkpoint import open_checkpoint
from yopo.errors import InvalidArgumentError, YopoError
from yopo.loading import build_on_meta, load, read_config
from yopo.on_disk import prune_checkpoint
from yopo.plan import MultipleOf, plan_widths
from yopo.pruner import PolicyPruner
from yopo.ranks import rank_and_count
from yopo.report import describe_ffns, format_table, sizes_of
from yopo.speed import benchmark


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `yopo` with `arguments`, by default those of the process; return its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (YopoError, OSError) as error:
        print(f"yopo: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("yopo: interrupted", file=sys.stderr)
        return 130
    return 0


def _info(options: argparse.Namespace) -> None:
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


def _fit(options: argparse.Namespace) -> None:
    pruner = _new_pruner(options)
    from_disk = options.dtype == "auto" and not pruner.runs_model
    pruner.fit(options.model if from_disk else load(options.model, dtype=options.dtype))
    if rank_and_count()[0] == 0:
        pruner.save_policy(options.output)
        print(f"Policy written to {options.output}.")


def _prune(options: argparse.Namespace) -> None:
    size = {"ratio_of": options.ratio_of, "parameters": options.parameters, "bytes": options.bytes}
    pruner = _pruner(options)
    if options.dtype == "auto" and not pruner.runs_model:
        checkpoint = open_checkpoint(options.model)
        before = sizes_of(checkpoint.model, checkpoint.ffns)
        plan = prune_checkpoint(
            checkpoint.folder,
            options.output,
            options.ratio,
            pruner=pruner,
            layers=options.layers,
            **size,
        )
        after = sizes_of(checkpoint.model, checkpoint.ffns, plan.widths)
    else:
        if options.output.exists() and any(options.output.iterdir()):
            raise InvalidArgumentError(f"`--output {options.output}` exists and is not empty.")
        model = load(options.model, dtype=options.dtype)
        before = sizes_of(model, find_ffns(model))
        if not pruner.is_fitted:
            pruner.fit(model)
        pruner.prune(model, options.ratio, layers=options.layers, **size)
        after = sizes_of(model, find_ffns(model))
        if rank_and_count()[0] == 0:
            model.save_pretrained(options.output)
            _copy_tokenizer(options.model, options.output)
    if rank_and_count()[0] == 0:
        print(
            f"Removed {before.ffn_rows - after.ffn_rows:,} of {before.ffn_rows:,} FFN rows "
            f"({1 - after.ffn_rows / before.ffn_rows:.2%}), "
            f"{before.parameters - after.parameters:,} of {before.parameters:,} parameters "
            f"({1 - after.parameters / before.parameters:.1%}); {before.bytes / 1e6:,.1f} → "
            f"{after.bytes / 1e6:,.1f} MB. Written to {options.output}."
        )


def _bench(options: argparse.Namespace) -> None:
    if options.json is not None and not options.json.absolute().parent.is_dir():
        raise InvalidArgumentError(f"`--json {options.json}` is in a folder that does not exist.")
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
        options.json.write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")


def _demo(options: argparse.Namespace) -> None:
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


def _copy_tokenizer(source: str, target: Path) -> None:
    """Write the tokenizer of `source`, if it has one, beside the pruned model."""
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(source).save_pretrained(target)
    except (OSError, ValueError, KeyError):
        print(f"{source} has no tokenizer to copy.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="yopo", description="Remove hidden units of FFNs from language models, without data."
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    info = commands.add_parser("info", help="what a model's FFNs are, what ratios would remove")
    info.set_defaults(run=_info)
    info.add_argument("--ratio", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.5])
    info.add_argument("--multiple-of", type=_multiple, default="auto")
    fit = commands.add_parser("fit", help="train a policy and save it")
    fit.set_defaults(run=_fit)
    prune = commands.add_parser("prune", help="remove rows and save the smaller model")
    prune.set_defaults(run=_prune)
    prune.add_argument("--policy", type=Path, help="folder of a policy; by default one is fitted")
    prune.add_argument("--parameters", type=float, help="how many the model may have, as 5e9")
    prune.add_argument("--bytes", type=float, help="how many bytes they may take, as 8e9")
    prune.add_argument("--ratio-of", choices=["ffn", "model"], default="ffn")
    prune.add_argument("--layers", nargs="+", type=_layer, help="numbers or patterns; default all")
    demo = commands.add_parser("demo", help="the whole job on a small model, with baselines")
    demo.set_defaults(run=_demo)
    demo.add_argument("--model", help="a model on the hub or on disk; default: the embedded one")
    demo.add_argument("--text", type=Path, help="text to measure perplexity on")
    demo.add_argument("--output", type=Path, default=Path("yopo-demo"))
    bench = commands.add_parser("bench", help="how fast a model loads and runs, beside its bound")
    bench.set_defaults(run=_bench)
    bench.add_argument("--against", metavar="DENSE", help="a model to time in turn with it")
    bench.add_argument("--batch", type=int, default=1, help="sequences a pass; default 1")
    bench.add_argument("--prompt", type=int, default=128, help="tokens to read; default 128")
    bench.add_argument("--new-tokens", type=int, default=32, help="tokens to write; default 32")
    bench.add_argument("--repeats", type=int, default=5, help="turns that are timed; default 5")
    bench.add_argument("--dtype", default="auto", help="dtype to load the weights in")
    bench.add_argument("--device", help="default: the accelerator if there is one, else the CPU")
    bench.add_argument("--json", type=Path, metavar="FILE", help="file to write the figures to")
    for command in (info, bench, fit, prune):
        command.add_argument("model", help="a model on the hub or on disk")
    for command in (fit, prune):
        command.add_argument("--output", type=Path, required=True, help="folder to write")
        command.add_argument("--ratio", type=float, help="share of FFN rows to remove; default 0.3")
        command.add_argument("--allocation", choices=["uniform", "adaptive"])
        command.add_argument("--method", choices=["lean", "prunenet"])
        command.add_argument(
            "--reward", choices=["output", "divergence", "spectral"], default="output"
        )
        command.add_argument(
            "--evidence",
            choices=["auto", "self", "weights"],
            default="auto",
            help="self, or auto with what is learned, loads the model and lets it write text",
        )
        command.add_argument("--episodes", type=int, help="episodes of policy gradient")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--dtype", default="auto", help="dtype to load the weights in")
    return parser


def _multiple(text: str) -> MultipleOf:
    return "auto" if text == "auto" else int(text)


def _layer(text: str) -> int | str:
    return int(text) if text.isdigit() else text


if __name__ == "__main__":
    sys.exit(main())
