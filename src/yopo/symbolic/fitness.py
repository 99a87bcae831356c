"""What a symbolic metric of weights is worth: the perplexity of the model that it prunes."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from yopo.errors import UnsupportedModelError
from yopo.evaluation import perplexity
from yopo.evidence import checksum_of
from yopo.surgery import interrupts_held
from yopo.symbolic.expression import Expression
from yopo.symbolic.inputs import Data, inputs_of
from yopo.symbolic.masks import Pattern, dropped
from yopo.symbolic.matrices import Matrix, find_blocks, matrices_of
from yopo.symbolic.metrics import (
    NoChoiceError,
    check_weight_metric,
    scores_of,
    used_terminals,
)
from yopo.symbolic.statistics import Statistics, check_statistics, checksum_of_tensors
from yopo.writing import LENGTH

_SEQUENCES = 32
_PROBED = 256
"""Rows of a matrix whose masks stand for all."""


class PerplexityFitness:
    """Measure the perplexity of a model whose weights an expression has set to zero.

    This is Pruner-Zero's fitness: all linear maps of the layers are pruned at once, by statistics
    of the dense model. Lower is better; infinity means that the scores choose nothing. The model is
    changed while it is measured, and put back, so it must serve nobody else meanwhile. Beside it,
    a copy of its linear maps is held.

    Differs from the reference, which measures on the test text that it reports: what `data` is,
    should not be what the winner is judged by.

    Args:
        model: The dense model.
        statistics: Of the model: G and X, as far as the terminals of a search need them.
        data: What perplexity is measured on, as for `collect_statistics`; "self" for text that the
            model writes itself.
        tokenizer: The model's, for text.
        sparsity: As for `MetricPruner.prune`.
        pattern: As for `MetricPruner.prune`.
        sequences: As for `collect_statistics`.
        length: As for `collect_statistics`; the window of the perplexity.
        seed: As for `collect_statistics`. Let it differ from that of the statistics.

    Attributes:
        fingerprint: What two runs must agree on to be one search.

    Raises:
        InvalidArgumentError: If an argument is outside its range, or the statistics are of another
            model.
        UnsupportedModelError: If the model cannot be pruned, or is no causal language model.

    Example:
        >>> statistics = yopo.symbolic.collect_statistics(model, sequences=8, length=32)
        >>> fitness = yopo.symbolic.PerplexityFitness(model, statistics, sequences=4, length=32)
        >>> value = fitness(yopo.symbolic.Expression.parse("mul(W, sqrt(X))"))
    """

    def __init__(
        self,
        model: Any,
        statistics: Statistics,
        *,
        data: Data = "self",
        tokenizer: Any = None,
        sparsity: float | None = None,
        pattern: str = "unstructured",
        sequences: int = _SEQUENCES,
        length: int = LENGTH,
        seed: int = 1,
    ) -> None:
        """Check the arguments, and write or draw the text."""
        self._pattern = Pattern.of(pattern, sparsity)
        if model.config.is_encoder_decoder or not model.can_generate():
            raise UnsupportedModelError(
                f"{type(model).__name__} has no perplexity. Pass a causal language model, with its "
                "head."
            )
        check_statistics(statistics)
        statistics.check(model)
        self._model, self._statistics = model, statistics
        blocks = find_blocks(model)
        self._matrices = matrices_of(blocks)
        for matrix in self._matrices:
            self._pattern.check_width(matrix.name, matrix.weight.shape[1])
        probed = {0, len(blocks) // 2, len(blocks) - 1}
        self._probe = [matrix for number in sorted(probed) for matrix in blocks[number].matrices]
        self._dense = [matrix.weight.clone() for matrix in self._matrices]
        self._ids_NW = inputs_of(
            model, data, tokenizer=tokenizer, sequences=sequences, length=length, seed=seed
        )["input_ids"]
        read = checksum_of_tensors({"input_ids": self._ids_NW})
        self.fingerprint = (
            f"perplexity, {self._pattern}, text {read}, statistics {statistics.checksum()}, "
            f"model {checksum_of(model).hex()}"
        )
        self._known: frozenset[str] = frozenset()

    def __call__(self, expression: Expression) -> float:
        """Return the fitness of an expression.

        Raises:
            InvalidArgumentError: If it needs statistics that are not there, or its scores are not
                finite or all the same.
        """
        self._check(expression)
        with self._put_back():
            for matrix in self._matrices:
                matrix.weight.masked_fill_(self._dropped(matrix, expression), 0.0)
            window = self._ids_NW.shape[1]
            return perplexity(self._model, self._ids_NW.flatten(), window=window)

    def signature(self, expression: Expression) -> bytes | None:
        """Return what expressions share that set the same weights to zero, None for useless ones.

        It is a checksum of the masks of up to 256 rows of each matrix in the first, the middle and
        the last layer.

        Raises:
            InvalidArgumentError: If it needs statistics that are not there.
        """
        self._check(expression)
        digest = hashlib.blake2b(digest_size=16)
        try:
            for matrix in self._probe:
                gone = self._dropped(matrix, expression)[:_PROBED]
                digest.update(gone.cpu().numpy().tobytes())
        except NoChoiceError:
            return None
        return digest.digest()

    def _check(self, expression: Expression) -> None:
        """Check, once for each terminal, that the statistics of all matrices hold it.

        Raises:
            InvalidArgumentError: If they do not, or it is none of weights.
        """
        check_weight_metric(expression)
        if not expression.terminals <= self._known:
            for matrix in self._matrices:
                used_terminals(matrix, expression, self._statistics.of(matrix))
            self._known |= expression.terminals

    def _dropped(self, matrix: Matrix, expression: Expression) -> Tensor:
        terminals = self._statistics.of(matrix)
        scores = scores_of(matrix, expression, terminals, primitives="safe")
        return dropped(scores, self._pattern)

    @contextmanager
    def _put_back(self) -> Iterator[None]:
        with torch.no_grad():
            try:
                yield
            finally:
                with interrupts_held():
                    for matrix, dense in zip(self._matrices, self._dense, strict=True):
                        matrix.weight.copy_(dense)
