"""yopo: make language models smaller by removing hidden units of their FFNs, without data.

The distribution is called `yopo-prune` (`pip install yopo-prune`); the name `yopo` on PyPI belongs
to an unrelated project.
"""

from importlib.metadata import PackageNotFoundError, version

from yopo import criteria, symbolic
from yopo.adapters import find_ffns, register_adapter
from yopo.criteria import plan_by_criterion
from yopo.errors import (
    InvalidArgumentError,
    NotFittedError,
    PolicyFileError,
    PolicyMismatchError,
    UnsupportedModelError,
    YopoError,
)
from yopo.evaluation import TaskReport, evaluate, perplexity, read_text
from yopo.loading import load
from yopo.on_disk import prune_checkpoint
from yopo.plan import PruningPlan
from yopo.pruner import PolicyPruner
from yopo.pruning_report import PruningReport
from yopo.recovery import RecoverySettings, recover
from yopo.reinforce import Episode
from yopo.speed import SpeedReport, benchmark
from yopo.surgery import apply_plan
from yopo.symbolic import MetricPruner

try:
    __version__ = version("yopo-prune")
except PackageNotFoundError:  # running from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "Episode",
    "InvalidArgumentError",
    "MetricPruner",
    "NotFittedError",
    "PolicyFileError",
    "PolicyMismatchError",
    "PolicyPruner",
    "PruningPlan",
    "PruningReport",
    "RecoverySettings",
    "SpeedReport",
    "TaskReport",
    "UnsupportedModelError",
    "YopoError",
    "apply_plan",
    "benchmark",
    "criteria",
    "evaluate",
    "find_ffns",
    "load",
    "perplexity",
    "plan_by_criterion",
    "prune_checkpoint",
    "read_text",
    "recover",
    "register_adapter",
    "symbolic",
]
