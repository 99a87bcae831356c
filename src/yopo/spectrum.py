"""Singular values of a matrix and of what is left of it, and the distance between two spectra.

Shapes: F rows of a matrix, D its columns, K kept rows, M draws of kept rows, S singular values.

Singular values come from the eigenvalues of the smaller Gram matrix, which needs no vectors: d × d
when the kept rows are many, the kept part of rows × rows when they are few. When fewer rows are
dropped than kept, their Gram matrix is taken off the dense one instead of summing the kept ones.
Products are done in the precision of the weights (float32 at least), eigenvalues in float64, so a
small singular value is off by rounding of the product alone. What lies below that rounding, in
float32 less than 0.0007 of the largest value, counts as 0: noise must not tell two spectra apart.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_ROUNDING = 4.0
"""Multiple of eps · largest eigenvalue that a product may be off by; measured, it stays below 1."""


@dataclass(frozen=True, slots=True, eq=False)
class Spectrum:
    """Hold a matrix with its singular values, ready to give those of row subsets.

    Attributes:
        weight_FD: The matrix in its own dtype; only the rows at work are ever widened.
        gram: `weightᵀ · weight` `(D, D)` where F > D, else `weight · weightᵀ` `(F, F)`.
        singular_values_S: Those of the whole matrix, ascending, float64; S = min(F, D).
        rounding: Eigenvalues of a Gram matrix up to this are rounding of the product.
    """

    weight_FD: Tensor
    gram: Tensor
    singular_values_S: Tensor
    rounding: Tensor

    @classmethod
    def of(cls, weight_FD: Tensor) -> "Spectrum":
        """Measure a matrix of any floating dtype."""
        wide_FD = _widened(weight_FD)
        tall = weight_FD.shape[0] > weight_FD.shape[1]
        gram = wide_FD.T @ wide_FD if tall else wide_FD @ wide_FD.T
        eigenvalues_S = torch.linalg.eigvalsh(gram.double())
        rounding = _ROUNDING * torch.finfo(gram.dtype).eps * eigenvalues_S[-1]
        return cls(weight_FD, gram, _roots(eigenvalues_S, rounding), rounding)

    def of_rows(self, kept_MK: Tensor) -> Tensor:
        """Return the singular values `(M, min(K, D))` of the kept rows, ascending, float64."""
        rows, columns = self.weight_FD.shape
        kept = kept_MK.shape[1]
        if kept == rows:  # rounding differs from matrix to matrix of a batch, and a tie is a tie
            return self.singular_values_S.expand(len(kept_MK), -1)
        if rows <= columns:
            gram = self.gram[kept_MK[:, :, None], kept_MK[:, None, :]]
        elif kept <= columns:
            part_MKD = _widened(self.weight_FD[kept_MK])
            gram = part_MKD @ part_MKD.mT
        elif rows - kept < kept:
            part_MKD = _widened(self.weight_FD[_complement(kept_MK, rows)])
            gram = self.gram - part_MKD.mT @ part_MKD
        else:
            part_MKD = _widened(self.weight_FD[kept_MK])
            gram = part_MKD.mT @ part_MKD
        return _roots(torch.linalg.eigvalsh(gram.double()), self.rounding)


def ks_distance(first_S: Tensor, second_MS: Tensor) -> Tensor:
    """Return the Kolmogorov-Smirnov distance `(M,)` in [0, 1] of sorted samples, in float64.

    It is the largest difference between the shares of values at or below a point, over all points
    of both samples, as `scipy.stats.ks_2samp(…).statistic`.

    Args:
        first_S: One sample, ascending.
        second_MS: M samples, each ascending; their size may differ from that of the first.
    """
    first_MS = first_S.expand(len(second_MS), -1).contiguous()
    points = torch.cat([first_MS, second_MS], dim=1)
    below_first = torch.searchsorted(first_MS, points, right=True).double()
    below_second = torch.searchsorted(second_MS.contiguous(), points, right=True).double()
    difference = below_first / first_MS.shape[1] - below_second / second_MS.shape[1]
    return difference.abs().amax(dim=1)


def _widened(weight: Tensor) -> Tensor:
    return weight if weight.dtype in (torch.float32, torch.float64) else weight.float()


def _roots(eigenvalues: Tensor, rounding: Tensor) -> Tensor:
    """Return the singular values whose squares are `eigenvalues`, those of mere rounding as 0."""
    return torch.where(eigenvalues > rounding, eigenvalues, 0.0).sqrt()


def _complement(kept_MK: Tensor, rows: int) -> Tensor:
    """Return the rows `(M, rows - K)` that are not kept."""
    dropped_MF = torch.ones(len(kept_MK), rows, dtype=torch.bool, device=kept_MK.device)
    dropped_MF.scatter_(1, kept_MK, False)
    return dropped_MF.nonzero()[:, 1].view(len(kept_MK), -1)
