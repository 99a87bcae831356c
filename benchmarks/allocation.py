"""Perplexity of one ratio for all layers against ratios by layer, and of ways to weigh layers.

    python benchmarks/allocation.py                      all models, ratios 0.2, 0.3 and 0.5
    python benchmarks/allocation.py --models embedded    one of them; rows of the others stay

Writes docs/results/allocation.json and .md. Cells are the excess log-perplexity over dense, in
thousandths. All methods remove the same number of rows. "adaptive" weighs the squared error of a
layer by what the residual stream holds there, as `allocation="adaptive"` does; the other weights
are there for comparison: "absolute" takes the error as it is, "own output" as a share of the FFN's
own mean square, "stream, measured" as a share of the mean square of the decoder layer's output,
and "measured KL" by how much a layer cut by 0.3 alone changes the model's predictions.
"""

import copy
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

import yopo
from common import Subject, measure_subjects, method_of
from yopo import criteria
from yopo.allocation import Losses, Spread
from yopo.decision import decide, weigh_losses, write_restored
from yopo.evidence import Evidence
from yopo.report import format_table

RATIOS = (0.2, 0.3, 0.5)
PROBE = 16
"""Sequences on which the change of predictions is measured."""

Cut = Callable[[dict[str, int]], Any]
"""From widths by FFN to a pruned model."""


def _cutter(subject: Subject, evidence: Evidence, losses: dict[str, Losses]) -> Cut:
    policy = yopo.PolicyPruner().fit(subject.load())._require_policy()

    def cut(widths: dict[str, int]) -> Any:
        model = subject.load()
        ffns = yopo.find_ffns(model)
        decision = decide(
            model,
            ffns,
            policy=policy,
            evidence=evidence,
            ratio=0.0,
            widths=widths,
            restore=True,
            generator=None,
            losses=losses,
        )
        yopo.apply_plan(model, decision.plan, ffns=ffns)
        write_restored(ffns, decision.restored)
        return model

    return cut


def _held_by(losses: dict[str, Losses], stream: list[float]) -> dict[str, Losses]:
    """Return `losses` as if the residual stream held `stream` behind each layer."""
    steps = [stream[0], *(after - before for before, after in pairwise(stream))]
    return {
        name: replace(loss, added=step * loss.tokens)
        for (name, loss), step in zip(losses.items(), steps, strict=True)
    }


def _own_output(losses: dict[str, Losses]) -> list[float]:
    return [float(loss.elimination.loss_F.sum()) for loss in losses.values()]


def _stream(model: Any, ids_NW: torch.Tensor) -> list[float]:
    """Return the mean square of the residual stream behind each decoder layer."""
    layers = [m for m in model.modules() if type(m).__name__.endswith("DecoderLayer")]
    total = [0.0] * len(layers)

    def watch(depth: int) -> Callable[..., None]:
        def see(module: Any, inputs: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            total[depth] += float(states.double().square().sum())

        return see

    hooks = [layer.register_forward_hook(watch(depth)) for depth, layer in enumerate(layers)]
    with torch.no_grad():
        model(input_ids=ids_NW, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [value / ids_NW.numel() for value in total]


def _errors_per_kl(
    model: Any, losses: dict[str, Losses], cut: Cut, ids_NW: torch.Tensor
) -> list[float]:
    """Return the error that each layer may make for one unit of KL divergence."""
    rows = {ffn.name: ffn.rows for ffn in yopo.find_ffns(model)}
    with torch.no_grad():
        dense = model(input_ids=ids_NW, use_cache=False).logits.log_softmax(-1)
        found = []
        for name, loss in losses.items():
            removed = round(0.3 * rows[name])
            pruned = cut(rows | {name: rows[name] - removed})
            changed = pruned(input_ids=ids_NW, use_cache=False).logits.log_softmax(-1)
            kl = float((dense.exp() * (dense - changed)).sum(-1).mean())
            found.append(float(loss.elimination.loss_F[:removed].sum()) / kl)
    return found


def _uniform(ffns: list[Any], ratio: float) -> dict[str, int]:
    return {ffn.name: ffn.rows - round(ratio * ffn.rows) for ffn in ffns}


def measure(subject: Subject, ratios: list[float]) -> list[dict[str, Any]]:
    """Return one row for each method and ratio on one model."""
    model = subject.load()
    ffns = yopo.find_ffns(model)
    dense = subject.perplexity(model)
    rows: list[dict[str, Any]] = []

    def note(method: str, ratio: float, values: list[float], shares: list[float]) -> None:
        rows.append(
            {
                "model": subject.name,
                "method": method,
                "ratio": ratio,
                "dense": dense,
                "perplexity": statistics.fmean(values),
                "excess": statistics.fmean(math.log(value / dense) for value in values),
                "shares": shares,
            }
        )
        print(rows[-1], flush=True)

    for ratio in ratios:
        values = []
        for seed in range(3):
            random = subject.load()
            criterion = criteria.random_rows(seed)
            yopo.apply_plan(
                random, yopo.plan_by_criterion(random, ratio, criterion=criterion, multiple_of=1)
            )
            values.append(subject.perplexity(random))
        note("random rows", ratio, values, [ratio] * len(ffns))
    ids_NW = yopo.writing.write_tokens(copy.deepcopy(model), seed=0)["input_ids"]
    for kind in ("self", "weights"):
        evidence = Evidence(ids_NW if kind == "self" else kind, seed=0)
        losses = weigh_losses(model, ffns, evidence)
        cut = _cutter(subject, evidence, losses)
        ways = {"adaptive": losses}
        if kind == "self":
            probe_NW = ids_NW[:PROBE]
            ways |= {
                "absolute": _held_by(losses, [1.0] * len(ffns)),
                "own output": _held_by(losses, _own_output(losses)),
                "stream, measured": _held_by(losses, _stream(model, probe_NW)),
                "measured KL": _held_by(losses, _errors_per_kl(model, losses, cut, probe_NW)),
            }
        spreads = {name: Spread.over(ffns, way, multiple_of=1) for name, way in ways.items()}
        prefix = "" if kind == "self" else "from weights alone: "
        for ratio in ratios:
            found = {"uniform": _uniform(ffns, ratio)}
            found |= {name: spread.widths(ratio) for name, spread in spreads.items()}
            for name, widths in found.items():
                shares = [round(1 - widths[ffn.name] / ffn.rows, 3) for ffn in ffns]
                note(prefix + name, ratio, [subject.perplexity(cut(widths))], shares)
    return rows


def tables(rows: list[dict[str, Any]]) -> str:
    """Return a page with one table for each model, and the shares removed of each layer."""
    lines = ["# Ratios by layer", "", method_of(__doc__ or ""), ""]
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        ratios = list(dict.fromkeys(row["ratio"] for row in own))
        header = ["method", *(f"{ratio:g}" for ratio in ratios), f"removed at {ratios[1]:g}"]
        table = [header]
        for name in dict.fromkeys(row["method"] for row in own):
            mine = [row for row in own if row["method"] == name]
            cells = [f"{1000 * row['excess']:.1f}" for row in mine]
            table.append([name, *cells, " ".join(f"{share:.2f}" for share in mine[1]["shares"])])
        lines += [f"## {model}, dense {own[0]['dense']:.2f}", "", format_table(table), ""]
    return "\n".join(lines)


def main() -> None:
    """Measure, and write the results."""
    measure_subjects("allocation", __doc__ or "", RATIOS, measure=measure, page=tables)


if __name__ == "__main__":
    main()
