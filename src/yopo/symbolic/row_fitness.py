"""What a symbolic metric of rows is worth, with no data: by spectra, or by the model's own text.

Shapes: K kept rows, S singular values of a matrix, N of its kept rows.

Either fitness is a function of an expression, the lower the better, that a search can call in
processes of its own.
"""

import math

import torch
from torch import Tensor, nn

from yopo.divergence import Divergence
from yopo.evidence import Evidence
from yopo.parallel import map_on_threads
from yopo.plan import MultipleOf
from yopo.spectrum import Spectrum, spectra_of, spectral_distances
from yopo.symbolic.expression import Expression
from yopo.symbolic.row_choice import RowChoice
from yopo.symbolic.rows import Aggregate

_TIE_BREAK = 1e-6
"""Weight of what decides between equal distances: less than the step between two that differ."""

_FLOOR = 1e-6
"""Share of the largest singular value below which logarithms stop: float32 holds no more."""


class SpectralFitness:
    """Measure how far the singular values of the kept rows are from those of all rows.

    The fitness is the mean, over the FFNs of a model, of the Kolmogorov-Smirnov distance between
    the singular values of the first expand matrix and those of its kept rows: what PruneNet's
    reward is the inverse of. A distance is a multiple of a step, so many expressions share one.
    A millionth of w / (1 + w) decides between those, with w the mean Wasserstein-1 distance of the
    logarithms of the singular values. Lower is better; infinity means that the scores choose
    nothing. The model must not change for as long as the fitness is used.

    Held are D² numbers an FFN, beside the model's FFNs; that is what is pickled, too.

    Args:
        model: The dense model.
        ratio: Share of the rows that is removed, in (0, 1).
        aggregate: As for `row_scores`.
        multiple_of: As for `PolicyPruner`.

    Attributes:
        fingerprint: What two runs must agree on to be one search.

    Raises:
        UnsupportedModelError: If the model cannot be pruned.
        InvalidArgumentError: If an argument is outside its range.

    Example:
        >>> fitness = yopo.symbolic.SpectralFitness(model, 0.3)
        >>> distance = fitness(yopo.symbolic.Expression.parse("gate_norm"))
    """

    def __init__(
        self,
        model: nn.Module,
        ratio: float,
        *,
        aggregate: Aggregate = "sum",
        multiple_of: MultipleOf = "auto",
    ) -> None:
        """Find the FFNs, and the singular values of their first matrices."""
        self._choice = RowChoice(model, ratio, aggregate=aggregate, multiple_of=multiple_of)
        self._spectra = spectra_of([ffn.gate for ffn in self._choice.ffns])
        self.fingerprint = f"spectral, {self._choice.fingerprint}"

    def __call__(self, expression: Expression) -> float:
        """Return the fitness of an expression.

        Raises:
            InvalidArgumentError: If it uses terminals that are none of rows.
        """
        kept = self._choice.kept(expression)
        if kept is None:
            return math.inf
        ks_L1 = spectral_distances(self._spectra, [kept_K[None] for kept_K in kept.values()])
        pairs = list(zip(self._spectra, kept.values(), strict=True))
        found = map_on_threads(lambda pair: _wasserstein(*pair), pairs)
        wasserstein = sum(found) / len(found)
        return float(ks_L1.mean()) + _TIE_BREAK * wasserstein / (1.0 + wasserstein)

    def signature(self, expression: Expression) -> bytes | None:
        """Return what expressions share that keep the same rows, None where scores choose nothing.

        Raises:
            InvalidArgumentError: If the expression uses terminals that are none of rows.
        """
        return self._choice.signature(expression)


class DivergenceFitness:
    """Measure how far predictions of the pruned model are from those of the dense one.

    The fitness is KL(dense ‖ pruned) in nats of the next token, averaged over 2048 tokens of text
    that the dense model writes itself. Lower is better; infinity means that the scores choose
    nothing. Rows are not cut: the model is changed while it is measured, and put back, so it must
    serve nobody else meanwhile.

    Held are log-probabilities of the dense model for that text, a gigabyte at most, and with
    `restore` F² numbers in float64 an FFN; these and the model are what is pickled.

    Args:
        model: The dense model.
        ratio: Share of the rows that is removed, in (0, 1).
        restore: Whether contract matrices are re-solved for the rows that are kept, on other text
            that the model writes itself.
        aggregate: As for `row_scores`.
        multiple_of: As for `PolicyPruner`.
        seed: Seed of the texts.

    Attributes:
        fingerprint: What two runs must agree on to be one search.

    Raises:
        UnsupportedModelError: If the model cannot be pruned, or cannot write text.
        InvalidArgumentError: If an argument is outside its range.

    Example:
        >>> fitness = yopo.symbolic.DivergenceFitness(model, 0.3)
        >>> divergence = fitness(yopo.symbolic.Expression.parse("mul(gate_norm, down_norm)"))
    """

    def __init__(
        self,
        model: nn.Module,
        ratio: float,
        *,
        restore: bool = False,
        aggregate: Aggregate = "sum",
        multiple_of: MultipleOf = "auto",
        seed: int = 0,
    ) -> None:
        """Let the model write a text, and keep what it predicts of each next token."""
        self._choice = RowChoice(model, ratio, aggregate=aggregate, multiple_of=multiple_of)
        ffns, moments = self._choice.ffns, None
        if restore:
            evidence = Evidence("self", seed=seed)
            moments = {ffn.name: found for ffn, found in evidence.moments(model, ffns)}
        self._divergence = Divergence(model, ffns, moments, seed=seed)
        self.fingerprint = f"divergence, restore={restore}, seed={seed}, {self._choice.fingerprint}"

    def __call__(self, expression: Expression) -> float:
        """Return the fitness of an expression.

        Raises:
            InvalidArgumentError: If it uses terminals that are none of rows.
        """
        kept = self._choice.kept(expression)
        if kept is None:
            return math.inf
        (reward,) = self._divergence({name: kept_K[None] for name, kept_K in kept.items()}).tolist()
        return math.exp(-reward)

    def signature(self, expression: Expression) -> bytes | None:
        """Return what expressions share that keep the same rows, None where scores choose nothing.

        Raises:
            InvalidArgumentError: If the expression uses terminals that are none of rows.
        """
        return self._choice.signature(expression)


def _wasserstein(spectrum: Spectrum, kept_K: Tensor) -> float:
    """Return the Wasserstein-1 distance between logs of singular values, of all and of kept rows.

    It is the area between the shares of values at or below a point.
    """
    if len(kept_K) == spectrum.rows:
        return 0.0
    part_N = torch.linalg.eigvalsh(spectrum.grams_of_rows(kept_K[None]))[0]
    floor = _FLOOR**2 * float(spectrum.eigenvalues_S[-1])
    dense_S, part_N = (
        eigenvalues.double().clamp_min(floor).log() / 2
        for eigenvalues in (spectrum.eigenvalues_S, part_N)
    )
    points = torch.cat([dense_S, part_N]).sort().values
    dense, part = (
        torch.searchsorted(sample, points[:-1], right=True).double() / len(sample)
        for sample in (dense_S, part_N)
    )
    return float(((dense - part).abs() * points.diff()).sum())
