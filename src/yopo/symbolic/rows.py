"""Symbolic metrics of the rows of an FFN, from weights alone, with no data at all.

Shapes: F rows, D model width.

An expression gives a score to each entry `(F, D)` of the matrices of an FFN, or to each row
`(F, 1)`, and an aggregate makes one of each row. Expand matrices are taken with the gain of the
norm in front of them: that is what they multiply normalised inputs with, and a model in which a
factor has moved from one to the other, and which computes the same, keeps the same rows.
"""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from yopo.adapters import Ffn, norm_gain_and_bias
from yopo.criteria import Criterion
from yopo.errors import InvalidArgumentError
from yopo.features import leverage_scores, scaled
from yopo.symbolic.expression import Expression
from yopo.symbolic.names import ROW_TERMINALS, WEIGHT_TERMINALS

Aggregate = Literal["sum", "mean", "max", "norm"]

AGGREGATES: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "sum": lambda value: value.sum(dim=1, dtype=torch.float64),
        "mean": lambda value: value.mean(dim=1, dtype=torch.float64),
        "max": lambda value: value.amax(dim=1).double(),
        "norm": lambda value: torch.linalg.vector_norm(value, dim=1, dtype=torch.float64),
    }
)
"""How the scores of a row's entries make one; in float64, where no sum of float32 overflows."""

SMALL_TERMINALS = frozenset({"gate_norm", "up_norm", "down_norm", "leverage"})
"""Those with a number for each row, which cost more to compute than to keep."""


def row_terminals(ffn: Ffn, names: Collection[str]) -> dict[str, Tensor]:
    """Return terminals of an FFN by name, float32, none negative.

    `gate`, `up` and `down` are the absolute entries `(F, D)` of the first expand matrix (fc1 where
    there is only one), the second, and the contract matrix; `gate_norm`, `up_norm` and `down_norm`
    the Euclidean norms `(F, 1)` of their rows; `leverage` the leverage scores `(F, 1)` of the
    first. Expand matrices have the gain of the preceding norm folded in. Each is divided by its
    root mean square over the FFN, so that a formula that adds them, or takes the exponential of
    one, means the same in every layer and model.

    An FFN with one expand matrix is one whose second factor is 1 for every input, so `up` and
    `up_norm` are ones there: neutral in products, and of no say in sums. So a formula that was
    found on a gated model can be applied to it, and the other way about. Where rows are no more
    than columns, the leverage of each is 1 but for rounding, and 1 is what it is given.

    Differs from Pruner-Zero, whose terminals are those of single weights: `gate` is its |W|.

    Args:
        ffn: The FFN.
        names: Which of `yopo.symbolic.ROW_TERMINALS`.

    Raises:
        InvalidArgumentError: If a name is no terminal of rows.
    """
    check_row_terminals(names)
    columns = ffn.expand_weights()[0].shape[1]
    gain_D = norm_gain_and_bias(ffn, columns)[0].to(ffn.device)
    with torch.no_grad():
        return {name: _to_unit(_terminal(ffn, gain_D, name)) for name in sorted(names)}


def _terminal(ffn: Ffn, gain_D: Tensor, name: str) -> Tensor:
    """Return one terminal, given the gain of the norm in front of the FFN."""
    expand = ffn.expand_weights()
    columns = 1 if name in SMALL_TERMINALS else len(gain_D)
    is_neutral = name.startswith("up") and len(expand) == 1
    if is_neutral or (name == "leverage" and ffn.rows <= len(gain_D)):
        return gain_D.new_ones(1, 1).expand(ffn.rows, columns)
    if name.startswith("down"):
        matrix_FD = scaled(ffn.contract_weight())
    else:
        matrix_FD = scaled(scaled(expand[1 if name.startswith("up") else 0]) * scaled(gain_D))
    if name == "leverage":
        return leverage_scores(matrix_FD)[:, None]
    return matrix_FD.norm(dim=1, keepdim=True) if name in SMALL_TERMINALS else matrix_FD.abs()


def _to_unit(values: Tensor) -> Tensor:
    """Return values with a root mean square of 1, or zeros."""
    return values / values.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)


def row_scores(ffn: Ffn, expression: Expression, *, aggregate: Aggregate = "sum") -> Tensor:
    """Return the score `(F,)` of each row of an FFN, float64: the higher, the better to keep.

    Args:
        ffn: The FFN.
        expression: Over terminals of rows: `gate`, `up`, `down`, their norms and `leverage`.
        aggregate: What the scores of a row's entries are made one by: their "sum", "mean" or "max",
            or the Euclidean "norm", which forgets their sign.

    Raises:
        InvalidArgumentError: If the expression uses other terminals, or matrices of different
            widths, there is no such aggregate, or the scores are not finite or all the same.

    Example:
        >>> metric = yopo.symbolic.Expression.parse("mul(mul(gate, up), down_norm)")
        >>> scores = yopo.symbolic.row_scores(yopo.find_ffns(model)[0], metric)
    """
    check_row_terminals(expression.terminals)
    check_aggregate(aggregate)
    terminals = row_terminals(ffn, expression.terminals)
    scores_F = aggregated(terminals, expression, aggregate)
    told = scores_fault(scores_F)
    if told is not None:
        raise InvalidArgumentError(
            f"`{expression}` cannot choose rows of `{ffn.name}`: {told}. Use another expression."
        )
    return scores_F


def row_criterion(expression: Expression, aggregate: Aggregate = "sum") -> Criterion:
    """Return a criterion that keeps the rows for which an expression has the highest scores.

    Args:
        expression: As for `row_scores`.
        aggregate: As for `row_scores`.

    Raises:
        InvalidArgumentError: If the expression uses terminals of single weights, or there is no
            such aggregate.

    Example:
        >>> metric = yopo.symbolic.Expression.parse("mul(mul(gate_norm, up_norm), down_norm)")
        >>> criterion = yopo.symbolic.row_criterion(metric)
        >>> yopo.apply_plan(model, yopo.plan_by_criterion(model, 0.3, criterion=criterion))
    """
    check_row_terminals(expression.terminals)
    check_aggregate(aggregate)
    return partial(row_scores, expression=expression, aggregate=aggregate)


def aggregated(
    terminals: Mapping[str, Tensor], expression: Expression, aggregate: Aggregate
) -> Tensor:
    """Return the scores `(F,)` of rows, whatever they are.

    Args:
        terminals: What the expression uses, of one FFN.
        expression: As for `row_scores`.
        aggregate: As for `row_scores`.

    Raises:
        InvalidArgumentError: If the expression combines matrices of different widths.
    """
    wide = {name: terminals[name].shape[1] for name in expression.terminals - SMALL_TERMINALS}
    if len(set(wide.values())) > 1:
        told = ", ".join(f"`{name}` {columns}" for name, columns in sorted(wide.items()))
        raise InvalidArgumentError(
            f"`{expression}` combines entries of matrices of different widths ({told}): combine "
            "their norms instead, such as `down_norm`."
        )
    with torch.no_grad():
        return AGGREGATES[aggregate](expression.evaluate(terminals))


def scores_fault(scores_F: Tensor) -> str | None:
    """Return why rows cannot be chosen by these scores, None where they can."""
    if not torch.isfinite(scores_F).all():
        return "its scores are not finite"
    if len(scores_F) > 1 and scores_F.min() == scores_F.max():
        return "it scores all rows the same"
    return None


def check_row_terminals(names: Collection[str]) -> None:
    """Check that all names are of terminals of rows.

    Raises:
        InvalidArgumentError: If one is not.
    """
    strange = sorted(set(names) - set(ROW_TERMINALS))
    if strange:
        way_out = (
            " It is one of single weights, by which `yopo.MetricPruner` prunes; the two kinds "
            "cannot be mixed."
            if strange[0] in WEIGHT_TERMINALS
            else ""
        )
        raise InvalidArgumentError(
            f"`{strange[0]}` is no terminal of rows, which are {', '.join(ROW_TERMINALS)}.{way_out}"
        )


def check_aggregate(aggregate: str) -> None:
    """Check that there is such an aggregate.

    Raises:
        InvalidArgumentError: If there is not.
    """
    if aggregate not in AGGREGATES:
        known = ", ".join(f'"{name}"' for name in AGGREGATES)
        raise InvalidArgumentError(f"`aggregate` must be one of {known}, got {aggregate!r}.")
