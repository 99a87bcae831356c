"""What a learned policy adds to the closed form, at other ratios, and on models it never saw.

    python benchmarks/policies.py                     all models
    python benchmarks/policies.py --models embedded   some of them

On each model, from self-written text and from weights alone, a policy learns by the divergence of
predictions at each ratio. Excess log-perplexity over dense, on held-out text, as a share of what
random rows lose: of the closed form from which learning sets out, of the policy that has learned at
this ratio, and of the one that has learned at 0.3. Then the policies that have learned at 0.3 from
weights alone, used from weights alone on every other model. Writes docs/results/policies.json and
.md.
"""

import argparse
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import yopo
from common import RESULTS, Subject, keep_result, quiet, subjects
from yopo import criteria
from yopo.report import format_table
from yopo.writing import write_tokens

RATIOS = (0.2, 0.3, 0.5)
TRAINED = 0.3
EPISODES = 20
SEEDS = (0, 1, 2)


class Judge:
    """Tell what pruning costs one model, as a share of what random rows cost it."""

    def __init__(self, subject: Subject) -> None:
        """Measure the dense model and random rows."""
        self.subject = subject
        self._dense = subject.perplexity(subject.load())
        self._lost = {
            ratio: statistics.fmean(
                self._excess_by(criteria.random_rows(seed), ratio) for seed in SEEDS
            )
            for ratio in RATIOS
        }

    def by_criterion(self, criterion: criteria.Criterion, ratio: float) -> float:
        """Return the share that the rows of a criterion lose."""
        return self._excess_by(criterion, ratio) / self._lost[ratio]

    def by(self, pruner: yopo.PolicyPruner, ratio: float) -> float:
        """Return the share that the pruner's rows lose, restored."""
        return self._excess(pruner.prune(self.subject.load(), ratio)) / self._lost[ratio]

    def _excess_by(self, criterion: criteria.Criterion, ratio: float) -> float:
        model = self.subject.load()
        plan = yopo.plan_by_criterion(model, ratio, criterion=criterion, multiple_of=1)
        yopo.apply_plan(model, plan)
        return self._excess(model)

    def _excess(self, model: Any) -> float:
        return math.log(self.subject.perplexity(model) / self._dense)


def learn(judge: Judge, kind: str, folder: Path) -> list[dict[str, Any]]:
    """Return one row for each ratio, and keep the policy that has learned from weights alone."""
    model = judge.subject.load()
    evidence = write_tokens(model)["input_ids"] if kind == "self" else kind
    settings: dict[str, Any] = {"evidence": evidence, "multiple_of": 1}
    closed = yopo.PolicyPruner(**settings).fit(model)
    learned, seconds = {}, {}
    for ratio in RATIOS:
        started = time.process_time()
        learned[ratio] = yopo.PolicyPruner(
            ratio=ratio, reward="divergence", episodes=EPISODES, **settings
        ).fit(model)
        seconds[ratio] = time.process_time() - started
    if kind == "weights":
        learned[TRAINED].save_policy(folder / judge.subject.name)
    return [
        {
            "model": judge.subject.name,
            "evidence": kind,
            "ratio": ratio,
            "closed form": judge.by(closed, ratio),
            "learned at this ratio": judge.by(learned[ratio], ratio),
            f"learned at {TRAINED}": judge.by(learned[TRAINED], ratio),
            "seconds": seconds[ratio],
            "earned": _earned(learned[ratio]),
        }
        for ratio in RATIOS
    ]


def _earned(pruner: yopo.PolicyPruner) -> list[float]:
    """Return what the draws of each episode have earned on average."""
    return [episode.reward[0] for episode in pruner.history]


def transfer(judge: Judge, folder: Path) -> list[dict[str, Any]]:
    """Return one row for each ratio: what policies of other models do on this one."""
    settings: dict[str, Any] = {"evidence": "weights", "multiple_of": 1}
    closed = yopo.PolicyPruner(**settings).fit(judge.subject.load())
    others = {
        path.name: yopo.PolicyPruner.from_policy(path)
        for path in sorted(folder.iterdir())
        if path.name != judge.subject.name
    }
    return [
        {
            "model": judge.subject.name,
            "ratio": ratio,
            "row norm": judge.by_criterion(criteria.row_norm, ratio),
            "norm product": judge.by_criterion(criteria.norm_product, ratio),
            "closed form": judge.by(closed, ratio),
            "policies of": {name: judge.by(policy, ratio) for name, policy in others.items()},
        }
        for ratio in RATIOS
    ]


def page(learned: list[dict[str, Any]], moved: list[dict[str, Any]]) -> str:
    """Return both tables."""
    names = ["closed form", "learned at this ratio", f"learned at {TRAINED}"]
    table = [["model", "evidence", "ratio", *names, "seconds"]]
    for row in learned:
        shares = [f"{row[name]:.3f}" for name in names]
        table.append(
            [row["model"], row["evidence"], f"{row['ratio']:g}", *shares, f"{row['seconds']:.0f}"]
        )
    sources = list(dict.fromkeys(name for row in moved for name in row["policies of"]))
    baselines = ["row norm", "norm product", "closed form"]
    other = [["model", "ratio", *baselines, *(f"policy of {name}" for name in sources)]]
    for row in moved:
        shares = [f"{row[name]:.3f}" for name in baselines]
        policies = [row["policies of"].get(name) for name in sources]
        cells = ["" if share is None else f"{share:.3f}" for share in policies]
        other.append([row["model"], f"{row['ratio']:g}", *shares, *cells])
    return (
        "# What learning adds to the closed form\n\n"
        "Excess log-perplexity over dense as a share of what random rows lose: 0 is dense, 1 is "
        f"random. {EPISODES} episodes of eight draws; seconds of one processor.\n\n"
        f"{format_table(table)}\n\n# Used from weights alone on another model\n\n"
        f"The policies have learned at {TRAINED}, from weights alone but for the reward. Norms "
        f"restore nothing.\n\n{format_table(other)}\n"
    )


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--models", nargs="+")
    chosen = parser.parse_args().models
    torch.set_num_threads(1)
    quiet()
    judges = [Judge(s) for s in subjects() if chosen is None or s.name in chosen]
    learned: list[dict[str, Any]] = []
    moved: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for judge in judges:
            for kind in ("self", "weights"):
                learned += learn(judge, kind, Path(folder))
                print(page(learned, moved), flush=True)
        for judge in judges:
            moved += transfer(judge, Path(folder))
    keep_result("policies", [{"learned": learned, "transferred": moved}])
    (RESULTS / "policies.md").write_text(page(learned, moved), encoding="utf-8")
    print(page(learned, moved))


if __name__ == "__main__":
    main()
