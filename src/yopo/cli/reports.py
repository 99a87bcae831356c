"""The report in the folder of a pruned model, and what becomes of it once that is recovered."""

import argparse
from dataclasses import asdict, replace
from pathlib import Path

from yopo.pruning_report import REPORT_FILE, PruningReport
from yopo.recovery.settings import settings_by_name


def report_beside(model: str) -> PruningReport | None:
    """Return the report in the folder of a pruned model, None if there is none.

    Raises:
        PolicyFileError: If it is damaged.
    """
    return PruningReport.load(model) if (Path(model) / REPORT_FILE).is_file() else None


def recovered(report: PruningReport, options: argparse.Namespace) -> PruningReport:
    """Return the report of a cut with how it was recovered, and without the scores before that."""
    how = {
        "call": options.command,
        "teacher": options.teacher and Path(options.teacher).name,
        "data": Path(options.data).name,
        "targets": options.targets,
        "seed": options.seed,
        **asdict(settings_by_name(options.settings)),
    }
    return replace(report, perplexities={}, measured={}, tasks=None, recovery=how)
