"""Does the policy learn, and does what it learns help? The paper's reward, on trained models.

    python benchmarks/learning.py

Mean Kolmogorov-Smirnov distance at ratio 0.3 of the policy's own start, of what it has learned, of
the norms and of random rows, and beside it the perplexity that each selection leaves. Then what 20
episodes on the output reward add to greedy elimination. Writes docs/results/learning.json and .md.
"""

import math
import statistics
from typing import Any

import torch

import yopo
from common import RESULTS, Subject, keep_result, quiet, subjects
from yopo import criteria
from yopo.moments import read_moments
from yopo.report import format_table
from yopo.reward import output_reward
from yopo.spectrum import spectra_of, spectral_distances
from yopo.writing import write_tokens

RATIO = 0.3
RANDOM_SEEDS = 20


def mean_ks(model: Any, plan: yopo.PruningPlan) -> float:
    """Return the distance that `plan` earns, averaged over the layers of `model`."""
    ffns = yopo.find_ffns(model)
    spectra = spectra_of([ffn.gate for ffn in ffns])
    return float(spectral_distances(spectra, [plan.kept[ffn.name][None] for ffn in ffns]).mean())


def output_error(model: Any, plan: yopo.PruningPlan, inputs: dict[str, torch.Tensor]) -> float:
    """Return the FFNs' output error on `inputs` after restoring, as a geometric mean of layers."""
    ffns = yopo.find_ffns(model)
    moments = read_moments(model, ffns, inputs)
    rewards = []
    for ffn in ffns:
        found = moments[ffn.name]
        second_FF = found.behind(ffn.contract_bias())
        kept_1K = plan.kept[ffn.name][None]
        rewards.append(float(output_reward(second_FF, ffn.contract_weight(), kept_1K)))
    return math.exp(-statistics.fmean(rewards))


def measure(subject: Subject) -> dict[str, Any]:
    """Return the distances and perplexities of one model."""
    model = subject.load()
    learned = yopo.PolicyPruner(reward="spectral", restore=False, ratio=RATIO, multiple_of=1).fit(
        model
    )

    def by(criterion: criteria.Criterion) -> yopo.PruningPlan:
        return yopo.plan_by_criterion(model, RATIO, criterion=criterion, multiple_of=1)

    randoms = [by(criteria.random_rows(seed)) for seed in range(RANDOM_SEEDS)]
    distances = [mean_ks(model, plan) for plan in randoms]
    plans = {
        "learned": learned.plan(model, RATIO),
        "row norm": by(criteria.row_norm),
        "norm product": by(criteria.norm_product),
        "random rows": randoms[0],
        "elimination on self-written text": yopo.PolicyPruner(multiple_of=1)
        .fit(model)
        .plan(model, RATIO),
    }
    left = {}
    for name, plan in plans.items():
        pruned = subject.load()
        yopo.apply_plan(pruned, plan)
        left[name] = subject.perplexity(pruned)
    ks = {name: mean_ks(model, plan) for name, plan in plans.items()}
    inputs = write_tokens(model)
    tuned = yopo.PolicyPruner(
        ratio=RATIO, episodes=20, evidence=inputs["input_ids"], multiple_of=1
    ).fit(model)
    closed = yopo.PolicyPruner(ratio=RATIO, evidence=inputs["input_ids"], multiple_of=1).fit(model)
    ks["random rows"] = statistics.fmean(distances)
    return {
        "model": subject.name,
        "ks": ks | {"start": statistics.fmean(learned.history[0].best_ks)},
        "random_deviation": statistics.stdev(distances),
        "deviations_below_random": (ks["random rows"] - ks["learned"])
        / statistics.stdev(distances),
        "output_error": {
            "elimination": output_error(model, closed.plan(model), inputs),
            "after 20 episodes": output_error(model, tuned.plan(model), inputs),
            "random rows": output_error(model, randoms[0], inputs),
        },
        "perplexity": left | {"dense": subject.perplexity(model)},
    }


def main() -> None:
    """Measure, and write the results."""
    torch.set_num_threads(1)
    quiet()
    rows = [measure(subject) for subject in subjects()]
    keep_result("learning", rows)
    names = ["start", "learned", "row norm", "norm product", "random rows"]
    names.append("elimination on self-written text")
    table = [["model", "", *names]]
    for row in rows:
        table.append([row["model"], "KS", *(f"{row['ks'][name]:.4f}" for name in names)])
        cells = [f"{row['perplexity'][n]:.2f}" if n in row["perplexity"] else "" for n in names]
        table.append(["", f"perplexity (dense {row['perplexity']['dense']:.2f})", *cells])
    errors = [["model", *rows[0]["output_error"]]]
    for row in rows:
        errors.append([row["model"], *(f"{value:.5f}" for value in row["output_error"].values())])
    page = f"# What the spectral reward teaches\n\nRatio {RATIO}, nothing restored.\n\n"
    page += format_table(table) + "\n\n# What learning adds to elimination\n\n"
    page += "Output error of the FFNs after restoring, geometric mean of the layers.\n\n"
    page += format_table(errors) + "\n"
    (RESULTS / "learning.md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
