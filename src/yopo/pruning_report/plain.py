"""Reports as plain values that JSON can hold, and back.

Shapes: F rows of an FFN, K kept rows.
"""

import base64
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from yopo.errors import InvalidArgumentError, PolicyFileError
from yopo.evaluation import TaskReport
from yopo.plan import PruningPlan
from yopo.reinforce import Episode
from yopo.report import Sizes
from yopo.speed.result import SpeedReport

if TYPE_CHECKING:  # the report itself calls these functions
    from yopo.pruning_report.result import PruningReport

_KIND, _FORMAT = "yopo-pruning-report", 1

_AS_THEY_ARE = ("base", "model_class", "needs_yopo", "call")
_MAPPINGS = ("recipe", "versions", "metadata", "seconds", "ks")
_NEWER_MAPPINGS = ("measured", "recovery")
"""Those that a report need not have."""


def values_of(report: "PruningReport") -> dict[str, Any]:
    """Return everything in a report as plain values, the plan with one bit a row."""
    plan, speed = report.plan, report.speed
    return {
        "kind": _KIND,
        "format": _FORMAT,
        **{name: getattr(report, name) for name in _AS_THEY_ARE},
        "ratio": {"asked": plan.ratio, "reached": plan.ratio_reached},
        "before": asdict(report.before),
        "after": asdict(report.after),
        **{name: dict(getattr(report, name)) for name in (*_MAPPINGS, *_NEWER_MAPPINGS)},
        "perplexities": {
            text: {"dense": dense, "pruned": pruned}
            for text, (dense, pruned) in report.perplexities.items()
        },
        "tasks": None if report.tasks is None else report.tasks.to_dict(),
        "speed": None if speed is None else speed.to_dict(),
        "rows": dict(plan.rows),
        "widths": plan.widths,
        "kept": {name: _packed(kept_K, plan.rows[name]) for name, kept_K in plan.kept.items()},
        "kept_by_norm": {name: list(shares) for name, shares in report.kept_by_norm.items()},
        "spectra": {name: [list(a), list(b)] for name, (a, b) in report.spectra.items()},
        "history": [asdict(episode) for episode in report.history],
    }


def fields_of(values: Any) -> dict[str, Any]:
    """Return the fields of the report that `values_of` has written out.

    Raises:
        PolicyFileError: If it is damaged, foreign, or of a newer format.
    """
    if not isinstance(values, Mapping) or values.get("kind") != _KIND:
        raise PolicyFileError("this is no report that yopo wrote.")
    if not isinstance(values.get("format"), int) or values["format"] > _FORMAT:
        raise PolicyFileError(
            f"the report has format {values.get('format')!r}, this yopo reads up to {_FORMAT}. "
            "Update yopo (`pip install --upgrade yopo-prune`)."
        )
    try:
        return _fields_of(values)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        told = error if isinstance(error, InvalidArgumentError) else repr(error)
        raise PolicyFileError(f"the report is damaged: {told}") from error


def _fields_of(values: Mapping[str, Any]) -> dict[str, Any]:
    rows, tasks, speed = values["rows"], values["tasks"], values["speed"]
    kept = {name: _unpacked(text, rows[name]) for name, text in values["kept"].items()}
    return {
        **{name: values[name] for name in _AS_THEY_ARE},
        "plan": PruningPlan(kept=kept, rows=rows, ratio=values["ratio"]["asked"]),
        "before": Sizes(**values["before"]),
        "after": Sizes(**values["after"]),
        **{name: dict(values[name]) for name in _MAPPINGS},
        **{name: dict(values.get(name, {})) for name in _NEWER_MAPPINGS},
        "perplexities": {
            text: (float(pair["dense"]), float(pair["pruned"]))
            for text, pair in values["perplexities"].items()
        },
        "tasks": None if tasks is None else TaskReport.from_dict(tasks),
        "speed": None if speed is None else SpeedReport.from_dict(speed),
        "kept_by_norm": {name: tuple(shares) for name, shares in values["kept_by_norm"].items()},
        "spectra": {name: (tuple(a), tuple(b)) for name, (a, b) in values["spectra"].items()},
        "history": tuple(_episode(episode) for episode in values["history"]),
    }


def _episode(values: Mapping[str, Any]) -> Episode:
    lists = {name: tuple(found) for name, found in values.items() if name != "number"}
    return Episode(number=values["number"], **lists)


def _packed(kept_K: Tensor, rows: int) -> str:
    is_kept_F = np.zeros(rows, dtype=bool)
    is_kept_F[kept_K.numpy()] = True
    return base64.b64encode(np.packbits(is_kept_F).tobytes()).decode()


def _unpacked(text: str, rows: int) -> Tensor:
    bits = np.unpackbits(np.frombuffer(base64.b64decode(text, validate=True), np.uint8))
    if len(bits) != -(-rows // 8) * 8 or bits[rows:].any():
        raise ValueError(f"{len(bits)} bits for {rows} rows")
    return torch.from_numpy(bits.nonzero()[0].astype(np.int64))
