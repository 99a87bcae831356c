"""What a cut did to a model, as data, as a page, and as the card of the pruned checkpoint."""

from yopo.pruning_report.making import report_of
from yopo.pruning_report.result import REPORT_FILE, PruningReport

__all__ = ["REPORT_FILE", "PruningReport", "report_of"]
