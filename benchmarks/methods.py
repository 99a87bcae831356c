"""The methods that the quality benchmark compares, and the steps of ours, each alone.

Whatever a method needs to know of a model or its text is found out once, and kept on a `Workbench`
for the other ratios.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

import baselines
import yopo
from common import Subject
from yopo import criteria
from yopo.adapters import Ffn
from yopo.decision import write_restored
from yopo.elimination import ffn_elimination_order
from yopo.evidence import Evidence
from yopo.moments import Moments
from yopo.restore import restore_contract
from yopo.writing import write_tokens

SEEDS = (0, 1, 2)

T = TypeVar("T")


class Workbench:
    """Keep what was found out about one model."""

    def __init__(self, subject: Subject) -> None:
        """Start empty."""
        self.real_NW = subject.real_NW
        self._kept: dict[Any, Any] = {}

    def once(self, key: Any, compute: Callable[[], T]) -> T:
        """Return what `compute` gave when it was first called for `key`."""
        if key not in self._kept:
            self._kept[key] = compute()
        found: T = self._kept[key]
        return found

    def seen(self, model: Any) -> dict[str, baselines.Seen]:
        """Return what real text shows of the dense model's hidden units."""
        return self.once("seen", lambda: baselines.see(model, self.real_NW))

    def text(self, model: Any) -> Tensor:
        """Return text that the dense model wrote."""
        return self.once("text", lambda: write_tokens(model)["input_ids"])

    def moments(self, model: Any, kind: str) -> dict[str, Moments]:
        """Return the moments of the dense model's hidden units."""

        def compute() -> dict[str, Moments]:
            evidence = Evidence(self.text(model) if kind == "self" else kind, seed=0)
            found = evidence.moments(model, yopo.find_ffns(model))
            return {ffn.name: moments for ffn, moments in found}

        return self.once(("moments", kind), compute)


Method = Callable[[Workbench, Any, float, int], None]
"""Prunes a model in place, for a ratio and a seed."""

Selection = Callable[[dict[str, Moments], int], criteria.Criterion]


@dataclass(frozen=True)
class Entry:
    """Hold a method, the seeds it is run with, and where it is shown.

    Attributes:
        prune: The method.
        seeds: One seed where nothing is random.
        table: "main", or "ablation" for a part of ours.
        costed: Whether time and memory are measured.
    """

    prune: Method
    seeds: tuple[int, ...] = (0,)
    table: Literal["main", "ablation"] = "main"
    costed: bool = True


def by_criterion(make: Callable[[Workbench, Any, int], criteria.Criterion]) -> Method:
    """Return a method that cuts by the criterion that `make` returns."""

    def prune(bench: Workbench, model: Any, ratio: float, seed: int) -> None:
        score = make(bench, model, seed)
        plan = yopo.plan_by_criterion(model, ratio, criterion=score, multiple_of=1)
        yopo.apply_plan(model, plan)

    return prune


def plain(score: criteria.Criterion) -> Entry:
    """Return the method that cuts by a criterion of the weights."""
    return Entry(by_criterion(lambda bench, model, seed: score))


def ours(*, calibrated: bool = False, **settings: Any) -> Method:
    """Return the pruner of the library; one serves all ratios, and remembers its evidence."""

    def prune(bench: Workbench, model: Any, ratio: float, seed: int) -> None:
        evidence: dict[str, Any] = {"evidence": bench.real_NW} if calibrated else {}
        pruner = bench.once(
            ("pruner", seed, calibrated, *settings.items()),
            lambda: yopo.PolicyPruner(seed=seed, multiple_of=1, **settings, **evidence).fit(model),
        )
        pruner.prune(model, ratio)

    return prune


def step(select: Selection, *, evidence: str = "self", restore: bool) -> Method:
    """Return one selection of rows, on one kind of evidence, with or without restoring."""

    def prune(bench: Workbench, model: Any, ratio: float, seed: int) -> None:
        moments = bench.moments(model, evidence)
        score = select(moments, seed)
        plan = yopo.plan_by_criterion(model, ratio, criterion=score, multiple_of=1)
        ffns = yopo.find_ffns(model)
        restored = {}
        if restore:
            restored = {
                ffn.name: restore_contract(
                    moments[ffn.name],
                    ffn.contract_weight(),
                    ffn.contract_bias(),
                    plan.kept[ffn.name],
                    dtype=ffn.contract.parameter.dtype,
                )
                for ffn in ffns
            }
        yopo.apply_plan(model, plan, ffns=ffns)
        write_restored(ffns, restored)

    return prune


def std_times_norm(moments: dict[str, Moments], seed: int) -> criteria.Criterion:
    """Select by the standard deviation of the hidden unit times the norm of its column."""

    def score(ffn: Ffn) -> Tensor:
        std_F = moments[ffn.name].covariance().diagonal().clamp_min(0).sqrt()
        return std_F * ffn.contract_weight().double().square().sum(dim=1).sqrt()

    return score


def elimination(moments: dict[str, Moments], seed: int) -> criteria.Criterion:
    """Select what greedy elimination drops last."""

    def score(ffn: Ffn) -> Tensor:
        order_F = ffn_elimination_order(ffn, moments[ffn.name])
        return torch.empty(ffn.rows).scatter_(0, order_F, torch.arange(1.0, ffn.rows + 1))

    return score


def layer_by_layer(bench: Workbench, model: Any, ratio: float, seed: int) -> None:
    """Cut one layer after the other, each on how the layers before it, already cut, feed it.

    The text is what the dense model wrote.
    """
    text_NW = bench.text(model)
    for ffn in yopo.find_ffns(model):
        pruner = yopo.PolicyPruner(evidence=text_NW, multiple_of=1, seed=seed).fit(model)
        pruner.prune(model, ratio, layers=[ffn.name])


def published(bench: Workbench, model: Any, ratio: float, seed: int) -> None:
    """Train PruneNet at the ratio, and draw the rows."""
    yopo.PolicyPruner.prunenet(ratio=ratio, seed=seed).fit(model).prune(model, ratio)


def flap(bench: Workbench, model: Any, ratio: float, seed: int) -> None:
    """Cut as FLAP does."""
    baselines.prune_as_flap(model, ratio, seen=bench.seen(model))


def part(method: Method, seeds: tuple[int, ...] = (0,), *, costed: bool = False) -> Entry:
    """Return an entry of the ablation table."""
    return Entry(method, seeds, "ablation", costed)


def random_order(moments: dict[str, Moments], seed: int) -> criteria.Criterion:
    """Select at random."""
    return criteria.random_rows(seed)


ENTRIES: dict[str, Entry] = {
    "random rows": Entry(by_criterion(lambda b, m, seed: criteria.random_rows(seed)), SEEDS),
    "row norm": plain(criteria.row_norm),
    "norm product": plain(criteria.norm_product),
    **{name: plain(score) for name, score in baselines.WEIGHTS_ONLY.items()},
    "PruneNet as published": Entry(published, SEEDS),
    "spectral reward, learned": Entry(ours(reward="spectral", restore=False), SEEDS),
    "yopo, from weights alone": Entry(ours(evidence="weights"), SEEDS),
    "yopo": Entry(ours(), SEEDS),
    "calibrated: OptiPFair MAW": Entry(
        by_criterion(lambda bench, model, seed: baselines.maw_with_text(bench.seen(model)))
    ),
    "calibrated: Wanda-sp": Entry(
        by_criterion(lambda bench, model, seed: baselines.wanda_sp(bench.seen(model)))
    ),
    "calibrated: FLAP": Entry(flap),
    "calibrated: Taylor": Entry(
        by_criterion(
            lambda bench, model, seed: bench.once(
                "taylor", lambda: baselines.taylor(model, bench.real_NW)
            )
        )
    ),
    "calibrated: yopo on real text": Entry(ours(calibrated=True)),
    "random rows + restore": part(step(random_order, restore=True), SEEDS),
    "row norm + restore": part(step(lambda m, s: criteria.row_norm, restore=True)),
    "std × column norm": part(step(std_times_norm, restore=False)),
    "std × column norm + restore": part(step(std_times_norm, restore=True)),
    "elimination": part(step(elimination, restore=False)),
    "elimination + restore": part(step(elimination, restore=True)),
    "elimination, weights": part(step(elimination, evidence="weights", restore=False)),
    "elimination, weights + restore": part(step(elimination, evidence="weights", restore=True)),
    "layer by layer": part(layer_by_layer, costed=True),
    "adaptive widths": part(ours(allocation="adaptive"), costed=True),
}

CALIBRATED = "calibrated: "
"""How the names of methods begin that look at real text."""
