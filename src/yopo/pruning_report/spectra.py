"""How the spectra and the norms of what was kept compare with those of the dense model.

Shapes: S singular values.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from yopo.adapters import find_ffns
from yopo.checkpoint import open_checkpoint
from yopo.criteria import row_norm
from yopo.errors import InvalidArgumentError
from yopo.plan import PruningPlan
from yopo.report import kept_by_score
from yopo.spectrum import compared_spectra
from yopo.surgery import check_plan
from yopo.writing import with_progress

_POINTS, _ALL_POINTS = 200, 40_000
"""Singular values held of a spectrum, and of all spectra before a cut, at most."""

Pair = tuple[tuple[float, ...], tuple[float, ...]]
"""Singular values before and after, descending."""


@dataclass(frozen=True, slots=True)
class Compared:
    """Hold what was found, by FFN. `PruningReport` documents each field."""

    ks: dict[str, float]
    spectra: dict[str, Pair]
    kept_by_norm: dict[str, tuple[float, ...]]


def compare(plan: PruningPlan, dense: nn.Module | str | Path) -> Compared:
    """Compare the gate matrices of a model with the rows of them that a plan keeps.

    Args:
        plan: The plan.
        dense: The model before the cut, or the folder or name of its checkpoint.

    Raises:
        InvalidArgumentError: If the plan was made for another model.
    """
    model = open_checkpoint(dense).model if isinstance(dense, str | Path) else dense
    ffns = find_ffns(model)
    names = [ffn.name for ffn in ffns if ffn.name in plan.rows]  # without heads
    if not names:
        raise InvalidArgumentError(
            "`dense` is another model than the one that was cut: it has no "
            f"`{next(iter(plan.rows))}`."
        )
    kept = {name: plan.kept[name] for name in names}
    rows = {name: plan.rows[name] for name in names}
    check_plan(ffns, PruningPlan(kept=kept, rows=rows, ratio=plan.ratio))
    points = max(20, min(_POINTS, _ALL_POINTS // len(ffns)))
    found = Compared({}, {}, {})
    for ffn in with_progress(ffns, "spectra", total=len(ffns), unit="FFN"):
        kept_K = kept[ffn.name]
        with ffn.loaded():
            before_S, after_S, distance = compared_spectra(ffn.expand_weights()[0], kept_K)
            found.kept_by_norm[ffn.name] = kept_by_score(kept_K, row_norm(ffn))
        found.ks[ffn.name] = distance
        found.spectra[ffn.name] = (_thinned(before_S, points), _thinned(after_S, points))
    return found


def _thinned(values_S: Tensor, points: int) -> tuple[float, ...]:
    """Return all values, or as many at even steps, first and last included, to six digits."""
    at = torch.arange(len(values_S), device="cpu")
    if len(values_S) > points:
        at = torch.linspace(0, len(values_S) - 1, points, device="cpu").round().long()
    return tuple(float(f"{value:.6g}") for value in values_S.cpu()[at].tolist())
