"""Metrics by name, and the scores that they give to the weights of a matrix."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from yopo.errors import InvalidArgumentError
from yopo.symbolic.expression import Expression
from yopo.symbolic.matrices import Matrix
from yopo.symbolic.names import ROW_TERMINALS
from yopo.symbolic.primitives import PrimitiveSet


class NoChoiceError(InvalidArgumentError):
    """Report scores by which no weights can be chosen."""


@dataclass(frozen=True, slots=True)
class Metric:
    """Hold a score, and among which weights it decides.

    Attributes:
        expression: The score.
        whole: Whether all weights of a matrix compete, instead of those of a row.
    """

    expression: Expression
    whole: bool = False


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "pruner-zero": Metric(Expression.parse("mul(abs(mul(W, W)), mms(G))")),
        "wanda": Metric(Expression.parse("mul(W, sqrt(X))")),
        "gblm": Metric(Expression.parse("add(mul(W, sqrt(X)), mul(W, G))")),
        "magnitude": Metric(Expression("W"), whole=True),
    }
)
"""By name: Pruner-Zero (arXiv 2406.02924), Wanda (arXiv 2306.11695), GBLM-Pruner (arXiv 2311.04902)
as its code has it, and magnitude, whose weights compete over the whole matrix."""


def metric_of(metric: str | Expression) -> Metric:
    """Return the metric of a name, of the text of an expression, or of an expression.

    Raises:
        InvalidArgumentError: If it is neither.
    """
    if isinstance(metric, Expression):
        return Metric(metric)
    if not isinstance(metric, str):
        raise InvalidArgumentError(
            "`metric` must be a name, the text of an expression or an `Expression`, got "
            f"{metric!r}."
        )
    if metric in METRICS:
        return METRICS[metric]
    try:
        return Metric(Expression.parse(metric))
    except InvalidArgumentError as error:
        names = ", ".join(f'"{name}"' for name in (*METRICS, "sparsegpt"))
        raise InvalidArgumentError(
            f"`metric` must be {names} or an expression, got {metric!r}: {error}"
        ) from error


def scores_of(
    matrix: Matrix,
    expression: Expression,
    terminals: Mapping[str, Tensor],
    *,
    primitives: PrimitiveSet,
    whole: bool = False,
) -> Tensor:
    """Return the score of each weight of a matrix, `(out, in)` in float32.

    Rows that no gradient comes to, such as hidden units that are never active, may get one score
    for all their weights: their ties are decided like any others.

    Args:
        matrix: The matrix.
        expression: The score.
        terminals: W, G and X of it, as far as they are needed.
        primitives: As for `Expression.evaluate`.
        whole: Whether weights of all rows compete.

    Raises:
        InvalidArgumentError: If a terminal is missing or zero everywhere.
        NoChoiceError: If scores are NaN or infinite, or all weights of a row get one score although
            they differ.
    """
    used = used_terminals(matrix, expression, terminals)
    scores = expression.evaluate(used, primitives=primitives)
    if not torch.stack(scores.aminmax()).isfinite().all():
        raise NoChoiceError(
            f"`{expression}` is NaN or infinite for weights of `{matrix.name}`. Use "
            '`primitives="safe"`.'
        )
    scores = scores.expand(terminals["W"].shape)
    constant = _are_constant(scores, whole)
    for values in used.values():  # nobody can choose by what does not differ
        constant &= ~_are_constant(values, whole)
    if constant.any():
        raise NoChoiceError(
            f"`{expression}` gives all weights of row {int(constant.nonzero()[0])} of "
            f"`{matrix.name}` the same score, so it cannot choose among them. Use another `metric`."
        )
    return scores


def used_terminals(
    matrix: Matrix, expression: Expression, terminals: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the terminals of a matrix that an expression uses.

    Args:
        matrix: The matrix.
        expression: The expression.
        terminals: Those of the matrix that there are.

    Raises:
        InvalidArgumentError: If one is missing or zero everywhere.
    """
    for name in sorted(expression.terminals):
        if name not in terminals:
            raise InvalidArgumentError(
                f"`{expression}` needs {name} of `{matrix.name}`, and there is only "
                f"{', '.join(sorted(terminals))}. Collect `statistics` that hold it."
            )
        if name != "W" and not terminals[name].any():
            raise InvalidArgumentError(
                f"{name} of `{matrix.name}` is zero everywhere: nothing of the text reaches it. "
                "Pass more `data`, or `sequential=False` where layers share weights, or use a "
                'metric of weights alone, such as "magnitude".'
            )
    return {name: terminals[name] for name in expression.terminals}


def _are_constant(values: Tensor, whole: bool) -> Tensor:
    """Tell of each row, or of all together, whether its values are all the same."""
    rows = values.reshape(1, -1) if whole else values
    low, high = rows.aminmax(dim=1)
    return low == high


def check_weight_metric(expression: Expression) -> None:
    """Check that an expression scores weights.

    Raises:
        InvalidArgumentError: If it scores whole rows of FFNs.
    """
    foreign = sorted(expression.terminals & set(ROW_TERMINALS))
    if foreign:
        raise InvalidArgumentError(
            f"`{expression}` looks at `{foreign[0]}` of an FFN, so it scores rows, not weights. "
            "Use `structured=True` with terminals of rows alone, or W, G and X alone."
        )
