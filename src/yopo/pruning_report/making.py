"""The report of a model that has just been cut."""

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from yopo.card import base_name, read_metadata
from yopo.plan import PruningPlan
from yopo.pruning_report.result import PruningReport
from yopo.reinforce import Episode
from yopo.report import Sizes
from yopo.upkeep import WIDTHS_KEY


def report_of(
    model: Any,
    plan: PruningPlan,
    *,
    sizes: tuple[Sizes, Sizes],
    call: str,
    source: str | Path | None = None,
    recipe: Mapping[str, Any] | None = None,
    history: Sequence[Episode] = (),
    seconds: Mapping[str, float] | None = None,
) -> PruningReport:
    """Return the report of a model that has been cut.

    Args:
        model: The model; of it, its class and its config are looked at.
        plan: What was applied.
        sizes: Those before and after.
        call: What made it.
        source: Where it was loaded from; by default where its config says.
        recipe: Settings of the pruner.
        history: Episodes of the policy.
        seconds: How long each step took.
    """
    if source is None:
        source = str(getattr(model.config, "_name_or_path", "") or "")
    return PruningReport(
        base=base_name(source),
        model_class=type(model).__name__,
        plan=plan,
        before=sizes[0],
        after=sizes[1],
        needs_yopo=bool(getattr(model.config, WIDTHS_KEY, None)),
        call=call,
        recipe=recipe or {},
        versions=_versions(),
        metadata=read_metadata(source),
        history=tuple(history),
        seconds=seconds or {},
    )


def _versions() -> dict[str, str]:
    found = {"torch": str(torch.__version__)}
    for name, package in (("transformers", "transformers"), ("yopo", "yopo-prune")):
        try:
            found[name] = version(package)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found
