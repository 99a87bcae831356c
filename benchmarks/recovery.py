"""How much of the log-perplexity that pruning loses is won back, and in how many minutes.

    python benchmarks/recovery.py                      all models, ratio 0.3
    python benchmarks/recovery.py --models embedded    one of them; rows of the others stay

Rows are removed by the default recipe, which leaves little to win back, and at random, which leaves
much. Then `yopo.recover` trains with its default settings on 128 windows of 256 tokens, 12 of them
held out and 4 that fill no batch left out: text that the dense model writes, real text, and real
text with the dense model as the teacher; and for the default recipe on 512 windows that the dense
model writes. Writes docs/results/recovery.json and .md.
"""

import copy
import logging
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

import yopo
from common import WINDOW, Subject, measure_subjects
from yopo import criteria
from yopo.pages import format_table
from yopo.recovery.losses import distillation_loss

RATIOS = (0.3,)
WINDOWS = 128
SELF, TEXT, BOTH, MORE = "self", "text", "teacher on text", "self, 4 times as much"


def _cut_at_random(model: Any, ratio: float) -> Any:
    plan = yopo.plan_by_criterion(model, ratio, criterion=criteria.random_rows(0))
    yopo.apply_plan(model, plan)
    return model


CUTS = {
    "default": lambda model, ratio: yopo.PolicyPruner().fit(model).prune(model, ratio),
    "random rows": _cut_at_random,
}


def main() -> None:
    """Measure the models that the command line names, and write the results."""
    logging.getLogger("yopo").setLevel(logging.ERROR)
    measure_subjects("recovery", __doc__ or "", RATIOS, measure=_measure, page=_page)


def _measure(subject: Subject, ratios: list[float]) -> Iterator[dict[str, Any]]:
    dense = subject.load()
    whole = subject.perplexity(dense)
    settings = yopo.RecoverySettings(written=WINDOWS, window=WINDOW)
    text_NW = subject.real_NW[:WINDOWS]
    calls: dict[str, dict[str, Any]] = {
        SELF: {"data": "self", "teacher": dense, "settings": settings},
        TEXT: {"data": text_NW, "settings": settings},
        BOTH: {"data": text_NW, "teacher": dense, "settings": settings},
        MORE: {
            "data": "self",
            "teacher": dense,
            "settings": replace(settings, written=4 * WINDOWS),
        },
    }
    for ratio in ratios:
        for cut, prune in CUTS.items():
            pruned = prune(subject.load(), ratio)
            before = subject.perplexity(pruned)
            apart = _divergence(dense, pruned, subject.test_T)
            for way, call in calls.items():
                if way == MORE and cut != "default":
                    continue
                model = copy.deepcopy(pruned)
                started = time.process_time()
                yopo.recover(model, call["data"], **{k: v for k, v in call.items() if k != "data"})
                minutes = (time.process_time() - started) / 60
                after = subject.perplexity(model)
                row = {
                    "model": subject.name,
                    "ratio": ratio,
                    "cut": cut,
                    "way": way,
                    "dense": whole,
                    "before": before,
                    "after": after,
                    "won_back": math.log(before / after) / math.log(before / whole),
                    "divergence_before": apart,
                    "divergence_after": _divergence(dense, model, subject.test_T),
                    "minutes": minutes,
                }
                print(row, flush=True)
                yield row


def _divergence(dense: Any, model: Any, tokens_T: torch.Tensor) -> float:
    """Return KL(dense ‖ model) in nats of the next token, the mean over a text."""
    losses = []
    with torch.no_grad():
        for ids_BW in tokens_T.view(-1, WINDOW).split(8):
            logits = (each(input_ids=ids_BW, use_cache=False).logits for each in (model, dense))
            losses += [float(distillation_loss(*logits))] * len(ids_BW)
    return statistics.fmean(losses)


def _page(rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(row["model"] for row in rows))
    ways = [SELF, TEXT, BOTH, MORE]
    lines = [
        "# What recovery wins back",
        "",
        "Share of the lost log-perplexity on held-out text that is won back; a minus is a further "
        'loss. "self" is text that the dense model writes, with the dense model as the teacher; '
        '"text" is real text without a teacher. 112 windows of 256 tokens, each seen twice; "4 '
        'times as much" is 456 of them. The real text of the models other than the embedded one is '
        "WikiText-2's validation part, which they were trained on; the test is its test part, "
        "which they were not.",
        "",
    ]
    for ratio in dict.fromkeys(row["ratio"] for row in rows):
        for cut in CUTS:
            found = [row for row in rows if (row["ratio"], row["cut"]) == (ratio, cut)]
            table = [["model", "dense", "pruned", *ways]]
            apart = [["model", "pruned", *ways]]
            spent = [["model", *ways]]
            for name in names:
                own = {row["way"]: row for row in found if row["model"] == name}
                if not own:
                    continue
                first = next(iter(own.values()))
                cells = [
                    f"{own[way]['won_back']:.2f} ({own[way]['after']:.2f})" if way in own else ""
                    for way in ways
                ]
                table.append([name, f"{first['dense']:.2f}", f"{first['before']:.2f}", *cells])
                left = [f"{own[way]['divergence_after']:.4f}" if way in own else "" for way in ways]
                apart.append([name, f"{first['divergence_before']:.4f}", *left])
                times = [
                    f"{own[way]['minutes']:.1f} ({own[way]['won_back'] / own[way]['minutes']:.2f})"
                    if way in own
                    else ""
                    for way in ways
                ]
                spent.append([name, *times])
            lines += [
                f"## Ratio {ratio:g}, {cut}",
                "",
                "Share won back, and in brackets the perplexity that is left:",
                "",
                format_table(table),
                "",
                "KL(dense ‖ recovered) in nats of the next token, on the same text:",
                "",
                format_table(apart),
                "",
                "Minutes of one thread, writing included, and in brackets the share won back a "
                "minute:",
                "",
                format_table(spent),
                "",
            ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
