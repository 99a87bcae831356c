"""Closed-form scores of rows, from the weights alone: the larger, the better to keep.

Shapes: F rows, D model width. A criterion is a function from an FFN to scores `(F,)`; whoever
wants another one writes that function and hands it to `plan_by_criterion`.
"""

import zlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from yopo.adapters import Ffn, check_weights, find_ffns
from yopo.errors import InvalidArgumentError
from yopo.plan import MultipleOf, PruningPlan, plan_widths
from yopo.sampling import best_rows

Criterion = Callable[[Ffn], Tensor]


def row_norm(ffn: Ffn) -> Tensor:
    """Return the Euclidean norm `(F,)` of each row of the first expand matrix (gate, or fc1)."""
    norm_F: Tensor = ffn.expand_weights()[0].float().norm(dim=1)
    return norm_F


def norm_product(ffn: Ffn) -> Tensor:
    """Return the log of the product of each row's norms, `(F,)`: in every expand and contract."""
    matrices = [*ffn.expand_weights(), ffn.contract_weight()]
    return torch.stack([matrix.float().norm(dim=1).log() for matrix in matrices]).sum(dim=0)


def random_rows(seed: int = 0) -> Criterion:
    """Return a criterion that scores rows by noise: the baseline that any method must beat."""

    def score(ffn: Ffn) -> Tensor:
        own_seed = zlib.crc32(f"{seed} {ffn.name}".encode())
        generator = torch.Generator().manual_seed(own_seed)
        return torch.rand(ffn.rows, generator=generator, device="cpu")

    return score


def plan_by_criterion(
    model: nn.Module, ratio: float, *, criterion: Criterion, multiple_of: MultipleOf = "auto"
) -> PruningPlan:
    """Plan to keep, in each FFN of `model`, the rows that `criterion` scores highest.

    Raises:
        UnsupportedModelError: If the model cannot be pruned.
        InvalidArgumentError: If `ratio` is outside [0, 1) or keeps nothing, or `criterion` does
            not return a score for each row.

    Example:
        >>> plan = yopo.plan_by_criterion(model, 0.3, criterion=yopo.criteria.row_norm)
        >>> yopo.apply_plan(model, plan)
    """
    ffns = find_ffns(model)
    check_weights(ffns)
    widths = plan_widths(ffns, ratio, multiple_of=multiple_of)
    kept = {
        ffn.name: best_rows(_scores(criterion, ffn), keep=widths[ffn.name]).cpu() for ffn in ffns
    }
    return PruningPlan(kept=kept, rows={ffn.name: ffn.rows for ffn in ffns}, ratio=ratio)


def _scores(criterion: Criterion, ffn: Ffn) -> Tensor:
    scores_F = criterion(ffn)
    if not isinstance(scores_F, Tensor):
        told = f"a {type(scores_F).__name__}"
    elif scores_F.shape != (ffn.rows,) or scores_F.isnan().any():
        has_nan = " with NaN" if scores_F.isnan().any() else ""
        told = f"{scores_F.dtype} of shape {tuple(scores_F.shape)}{has_nan}"
    else:
        return scores_F
    raise InvalidArgumentError(
        f"`criterion` must return one score, no NaN, for each of the {ffn.rows} rows of "
        f"`{ffn.name}`, got {told}."
    )
