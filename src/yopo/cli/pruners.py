"""The pruner that options describe."""

import argparse
from typing import Any

from yopo.errors import InvalidArgumentError
from yopo.pruner import PolicyPruner


def pruner_of(options: argparse.Namespace) -> PolicyPruner:
    """Return the pruner whose policy is given, or a new one."""
    if options.policy is None:
        return new_pruner(options)
    evidence = None if options.evidence == "auto" else options.evidence
    return PolicyPruner.from_policy(
        options.policy, evidence=evidence, allocation=options.allocation
    )


def new_pruner(options: argparse.Namespace) -> PolicyPruner:
    """Return the pruner that the options describe: where they ask for nothing, the lean one.

    Raises:
        InvalidArgumentError: If they do not go together.
    """
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
