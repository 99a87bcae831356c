"""`MetricPruner`: set the weights to zero that a symbolic metric scores lowest."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor, nn

from yopo.criteria import plan_by_criterion
from yopo.errors import InvalidArgumentError
from yopo.plan import MultipleOf, PruningPlan
from yopo.surgery import apply_plan
from yopo.symbolic.activations import watch_norms
from yopo.symbolic.expression import Expression
from yopo.symbolic.inputs import Data, inputs_of
from yopo.symbolic.masks import Pattern, dropped
from yopo.symbolic.matrices import Block, Matrix, find_blocks, matrices_of
from yopo.symbolic.metrics import Metric, check_weight_metric, metric_of, scores_of
from yopo.symbolic.names import ROW_TERMINALS
from yopo.symbolic.passes import walk_all_blocks
from yopo.symbolic.primitives import PrimitiveSet
from yopo.symbolic.rows import row_criterion
from yopo.symbolic.sparsegpt import sparsegpt, watch_products
from yopo.symbolic.statistics import Statistics, check_statistics, read_statistics
from yopo.symbolic.structured import weight_criterion
from yopo.symbolic.undo import put_back_on_error
from yopo.writing import LENGTH, SEQUENCES, with_progress

Model = TypeVar("Model", bound=nn.Module)


class MetricPruner:
    """Set weights of a model's linear maps to zero, or remove FFN rows, by a symbolic metric.

    Args:
        metric: "pruner-zero", "wanda", "gblm" or "magnitude"; "sparsegpt", which also changes the
            weights that stay; or an expression over `W`, `G` and `X`, as text or `Expression`.
        data: What `G` and `X` are collected on: "self" for text that the model writes itself, or
            text or token ids as for `yopo.symbolic.collect_statistics`.
        tokenizer: The model's, for text.
        statistics: `G` and `X` that are there already; only what the metric lacks is collected.
            SparseGPT, which needs more, takes none.
        sequential: Whether `X` is collected layer by layer, behind layers that are pruned already,
            as the papers do, instead of all at once; SparseGPT does nothing else. `G` is always
            that of the dense model, and so is `X` where `statistics` hold it.
        primitives: "safe", or "compat" for the reference's arithmetic with its overflow and NaN.
        sequences: As for `collect_statistics`.
        length: As for `collect_statistics`.
        seed: As for `collect_statistics`.

    Raises:
        InvalidArgumentError: If the metric is no expression, or arguments are outside their range
            or go with another metric alone.

    Example:
        >>> pruner = yopo.MetricPruner(metric="wanda", sequences=8, length=32)
        >>> sparse = pruner.prune(model, 0.5)
    """

    def __init__(
        self,
        metric: str | Expression = "pruner-zero",
        *,
        data: Data = "self",
        tokenizer: Any = None,
        statistics: Statistics | None = None,
        sequential: bool = True,
        primitives: PrimitiveSet = "safe",
        sequences: int = SEQUENCES,
        length: int = LENGTH,
        seed: int = 0,
    ) -> None:
        """Check and keep the arguments; nothing is computed before `prune` or `plan`."""
        self._metric = None if metric == "sparsegpt" else metric_of(metric)
        if statistics is not None:
            check_statistics(statistics)
        if self._metric is None and not (sequential and statistics is None):
            raise InvalidArgumentError(
                "SparseGPT looks at inputs behind pruned layers, of which it needs more than X: it "
                "takes no `statistics` and no `sequential=False`."
            )
        if primitives not in ("safe", "compat"):
            raise InvalidArgumentError(
                f'`primitives` must be "safe" or "compat", got {primitives!r}.'
            )
        self._statistics, self._sequential = statistics, sequential
        self._primitives: PrimitiveSet = primitives
        self._text: dict[str, Any] = {
            "data": data,
            "tokenizer": tokenizer,
            "sequences": sequences,
            "length": length,
            "seed": seed,
        }

    def prune(
        self,
        model: Model,
        sparsity: float | None = None,
        *,
        pattern: str = "unstructured",
        structured: bool = False,
    ) -> Model:
        """Set the lowest-scored weights of every linear map in the model's layers to zero.

        Embeddings, head, norms and biases stay. Shapes stay too, so that a saved model is an
        ordinary checkpoint with zeros in it, no smaller or faster by itself; `yopo.recover` keeps
        the zeros. On an error, and on Ctrl-C, the model is as it was; for that, what becomes zero
        is held on the CPU until the end.

        Args:
            model: A `PreTrainedModel` in memory, changed in place.
            sparsity: Share of the weights of each row that become zero, in [0, 1), the number
                rounded down; 0.5 by default. With `structured`, the share of FFN rows to remove.
            pattern: "unstructured", or "N:M" for N weights that stay of every M consecutive
                inputs, such as "2:4", which says the sparsity too.
            structured: Whether to remove whole FFN rows instead, by the sum of their scores, as
                `plan` decides: the model becomes smaller and faster.

        Returns:
            The model.

        Raises:
            InvalidArgumentError: If an argument is outside its range, M does not divide a width,
                the statistics are of another model, or scores are not finite or all the same.
            UnsupportedModelError: If the model cannot be pruned, or cannot serve to collect what
                the metric needs.
        """
        if structured:
            if sparsity is None or pattern != "unstructured":
                raise InvalidArgumentError(
                    "with `structured=True` rows are removed: pass their share as `sparsity`, and "
                    "no `pattern`."
                )
            apply_plan(model, self.plan(model, sparsity))
            return model
        chosen = Pattern.of(pattern, sparsity)
        blocks = find_blocks(model)
        for matrix in matrices_of(blocks):
            chosen.check_width(matrix.name, matrix.weight.shape[1])
        if self._metric is None:
            self._prune_by_sparsegpt(model, blocks, chosen)
        else:
            check_weight_metric(self._metric.expression)
            self._prune_by_metric(model, blocks, self._metric, chosen)
        return model

    def plan(
        self, model: nn.Module, ratio: float, *, multiple_of: MultipleOf = "auto"
    ) -> PruningPlan:
        """Decide which FFN rows stay, by the sum of the scores of their weights.

        A metric of W, G and X is summed over the weights of a row in every matrix that it runs
        through, X being that of the dense model. One of the terminals of rows is summed as
        `yopo.symbolic.row_criterion` does, and needs no data.

        Args:
            model: A `PreTrainedModel` in memory, which is not changed.
            ratio: Share of the rows to remove, in [0, 1).
            multiple_of: As for `PolicyPruner`.

        Raises:
            InvalidArgumentError: As for `prune`.
            UnsupportedModelError: As for `prune`.
        """
        if self._metric is None:
            raise InvalidArgumentError(
                "SparseGPT chooses weights, not rows: use another `metric` with `structured=True`."
            )
        expression = self._metric.expression
        if expression.terminals & set(ROW_TERMINALS):
            if self._primitives != "safe":
                raise InvalidArgumentError(
                    f"`primitives={self._primitives!r}` is what the reference computes of W, G and "
                    f"X; `{expression}` is of FFN rows."
                )
            criterion = row_criterion(expression)
            return plan_by_criterion(model, ratio, criterion=criterion, multiple_of=multiple_of)
        lacking = self._lacking(model, expression)
        statistics = self._with(model, inputs_of(model, **self._text) if lacking else {}, lacking)
        criterion = weight_criterion(model, expression, statistics, primitives=self._primitives)
        return plan_by_criterion(model, ratio, criterion=criterion, multiple_of=multiple_of)

    def _prune_by_metric(
        self, model: nn.Module, blocks: Sequence[Block], metric: Metric, pattern: Pattern
    ) -> None:
        lacking = self._lacking(model, metric.expression)
        inputs = inputs_of(model, **self._text) if lacking else {}
        behind_pruned = self._sequential and "X" in lacking
        statistics = self._with(model, inputs, lacking - {"X"} if behind_pruned else lacking)

        def zeroed(matrix: Matrix, activations: Mapping[str, Tensor]) -> Tensor:
            known = replace(statistics, activations=activations)
            scores = scores_of(
                matrix,
                metric.expression,
                known.of(matrix),
                primitives=self._primitives,
                whole=metric.whole,
            )
            return matrix.weight.masked_fill(dropped(scores, pattern, whole=metric.whole), 0.0)

        with put_back_on_error() as change:
            if not behind_pruned:
                for matrix in with_progress(matrices_of(blocks), "prune", unit="matrix"):
                    change(matrix.weight, zeroed(matrix, statistics.activations))
                return
            count = len(next(iter(inputs.values())))
            for block, run in walk_all_blocks(model, blocks, inputs):
                with watch_norms(block.matrices, count) as norms:
                    run()
                for matrix in block.matrices:
                    change(matrix.weight, zeroed(matrix, norms))

    def _prune_by_sparsegpt(
        self, model: nn.Module, blocks: Sequence[Block], pattern: Pattern
    ) -> None:
        inputs = inputs_of(model, **self._text)
        with put_back_on_error() as change:
            for block, run in walk_all_blocks(model, blocks, inputs):
                with watch_products(block.matrices) as products:
                    run()
                for matrix in block.matrices:
                    known = products.pop(matrix.name)
                    new = sparsegpt(matrix.weight, known, pattern, name=matrix.name)
                    change(matrix.weight, new.to(matrix.weight.dtype))

    def _lacking(self, model: nn.Module, expression: Expression) -> frozenset[str]:
        """Return what the statistics given, of this model if any, lack of what a metric needs."""
        needed = expression.terminals & {"G", "X"}
        if self._statistics is None:
            return needed
        self._statistics.check(model)
        return needed - self._statistics.terminals

    def _with(
        self, model: nn.Module, inputs: dict[str, Tensor], lacking: frozenset[str]
    ) -> Statistics:
        """Return the statistics given, and what they lack collected on a text."""
        given = Statistics({}, {}) if self._statistics is None else self._statistics
        if not lacking:
            return given
        found = read_statistics(model, inputs, lacking)
        return Statistics(
            given.gradients or found.gradients, given.activations or found.activations
        )
