"""From scores to masks: which weights become zero.

The lowest scores go. Of equal ones, those further left go first, as in the references.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real

import torch
from torch import Tensor

from yopo.errors import InvalidArgumentError

_NUMBERS = 2**22
"""Scores that are ranked at a time."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """Say how many weights become zero, and among which.

    Attributes:
        sparsity: Share of the weights of each group, in [0, 1).
        group: M, how many consecutive inputs make a group; None for all weights of a row.
    """

    sparsity: float
    group: int | None = None

    @classmethod
    def of(cls, pattern: str, sparsity: float | None) -> "Pattern":
        """Return what `pattern` and `sparsity` say together.

        Args:
            pattern: "unstructured", or "N:M" for N weights that stay of every M.
            sparsity: Share of zeros; N:M says it already.

        Raises:
            InvalidArgumentError: If one is outside its range, or they contradict each other.
        """
        if sparsity is not None and not (isinstance(sparsity, Real) and 0 <= sparsity < 1):
            raise InvalidArgumentError(f"`sparsity` must be in [0, 1), got {sparsity!r}.")
        if pattern == "unstructured":
            return cls(0.5 if sparsity is None else sparsity)
        match = re.fullmatch(r"(\d+):(\d+)", pattern) if isinstance(pattern, str) else None
        if match is None or not 1 <= int(match[1]) < int(match[2]):
            raise InvalidArgumentError(
                '`pattern` must be "unstructured", or "N:M" with 1 ≤ N < M for N weights that stay '
                f"of every M, got {pattern!r}."
            )
        kept, group = int(match[1]), int(match[2])
        share = 1 - kept / group
        if sparsity is not None and abs(sparsity - share) > 1e-9:
            raise InvalidArgumentError(
                f"`pattern={pattern!r}` makes a sparsity of {share:g}, got `sparsity={sparsity}`."
            )
        return cls(share, group)

    def dropped_of(self, length: int) -> int:
        """Return how many of `length` weights become zero, the share rounded down."""
        return int(Fraction(str(round(self.sparsity, 12))) * length)

    def check_width(self, name: str, width: int) -> None:
        """Check that rows of `width` weights can be divided into groups.

        Raises:
            InvalidArgumentError: If they cannot.
        """
        if self.group is not None and width % self.group:
            raise InvalidArgumentError(
                f"`{name}` has {width} inputs, which groups of {self.group} do not divide. Use "
                '`pattern="unstructured"`.'
            )


def dropped(scores: Tensor, pattern: Pattern, *, whole: bool = False) -> Tensor:
    """Return which weights become zero, `(out, in)`, bool.

    Args:
        scores: `(out, in)`, the higher, the better to keep; no NaN.
        pattern: How many go; its groups divide `in`.
        whole: Whether weights of all rows compete, where the pattern has no groups.
    """
    rows = scores
    if pattern.group is not None:
        rows = scores.reshape(-1, pattern.group)
    elif whole:
        rows = scores.reshape(1, -1)
    count = pattern.dropped_of(rows.shape[1])
    step = max(1, _NUMBERS // rows.shape[1])
    found = [_lowest(part, count) for part in torch.split(rows, step)]
    return torch.cat(found).view(scores.shape)


def _lowest(rows: Tensor, count: int) -> Tensor:
    """Return where the `count` lowest of each row are, the leftmost of equal ones."""
    if count == 0:
        return torch.zeros_like(rows, dtype=torch.bool)
    threshold = rows.kthvalue(count, dim=1, keepdim=True).values
    below = rows < threshold
    equal = rows == threshold
    left = count - below.sum(dim=1, keepdim=True)
    return below | (equal & (equal.cumsum(dim=1, dtype=torch.int32) <= left))
