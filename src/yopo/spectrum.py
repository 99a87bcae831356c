"""Distances between the singular values of a matrix and those of some of its rows.

Shapes: F rows of a matrix, D its columns, K kept rows, M draws of kept rows, S singular values of
the matrix, N rows of a Gram matrix.

A Kolmogorov-Smirnov distance needs singular values, no vectors, and of them only in which order
they and those of the whole matrix lie. So this is the arithmetic that is done:

* the eigenvalues of the smaller Gram matrix, D × D or K × K, in float32;
* where fewer rows are dropped than kept, the Gram matrix of the dropped rows is taken off that of
  all rows; of either only the lower triangle is computed;
* an eigenvalue of float32 is known up to a bound, so a distance lies between two values. Where
  they are more than two in a thousand apart, as always where many singular values are tiny, float64
  does it again; else the distance is the middle between them, which mostly are the same.

Singular values below a millionth of the largest count as 0: float32 holds no more of a matrix, and
noise must not tell two spectra apart.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from yopo.parallel import Place, Turn, in_pairs, map_in_batches, map_on_threads

Weight = Callable[[], AbstractContextManager[Tensor]]
"""Gives a matrix `(F, D)` of any floating dtype for as long as there is work on it."""

_ZERO = 1e-6
"""Singular values up to this share of the largest one count as 0."""

_SURE = (0.5, 4.0)
"""An eigenvalue λ of N is off by at most eps · (first · largest + second · √(N · λ · largest)).

So a singular value is off by 2 √N eps of the largest. The tests measure it against float64, on 300
and 768 columns, flat, decaying and with rows of log-normal norms."""

_TOLERANCE, _SHARE = 1e-3, 1e-2
"""How far a distance may lie from that of the exact singular values: so much, or so much of it."""

_CHUNK = 1024
"""Rows that are widened at a time."""

_BLOCKS = 6
"""A triangle is computed in so many blocks: more save little, and multiply more slowly."""

_SMALL = 2**20
"""Bytes of work up to which draws of one matrix are measured together."""

_WORK = 4
"""How many matrices as large as a Gram matrix its eigenvalues take to find, itself included."""


@dataclass(slots=True, eq=False)
class Spectrum:
    """Hold what is known of the singular values of a matrix, to compare those of its rows with.

    Attributes:
        weight: Gives the matrix, which is not held here: it may lie on a disk.
        rows: F.
        columns: D.
        gram: Lower triangle of `weightᵀ · weight` `(D, D)` where F > D, else of
            `weight · weightᵀ` `(F, F)`; None where memory is dearer than time.
        room: How many bytes the work on all matrices may take; None where it is not counted.
        eigenvalues_S: Squares of the singular values, ascending, in the precision of the work:
            float32, or float64 where the matrix comes in it.
    """

    weight: Weight
    rows: int
    columns: int
    gram: Tensor | None
    room: int | None
    eigenvalues_S: Tensor
    _exact_S: Tensor | None = field(default=None, init=False)

    def grams_of_rows(self, kept_MK: Tensor) -> Tensor:
        """Return the lower triangles of the Gram matrices `(M, N, N)` of ascending kept rows."""
        keep, dtype = kept_MK.shape[1], self.eigenvalues_S.dtype
        with self.weight() as weight_FD:
            kept_MK = kept_MK.to(weight_FD.device)
            is_downdated = keep > self.columns and self.rows - keep < keep
            if self.rows > self.columns and not is_downdated:
                return _grams_of(weight_FD, kept_MK, dtype)
            # Made anew where it is not held, so that the result does not depend on that.
            gram = _grams_of(weight_FD, None, dtype)[0] if self.gram is None else self.gram
            if self.rows <= self.columns:
                return gram[kept_MK[:, :, None], kept_MK[:, None, :]]
            is_spare = self.gram is None and len(kept_MK) == 1  # may be written into
            grams_MDD = gram[None] if is_spare else gram.repeat(len(kept_MK), 1, 1)
            return _add_grams(grams_MDD, weight_FD, _complement(kept_MK, self.rows), sign=-1)

    def possible_distances(self, eigenvalues_MN: Tensor) -> Tensor:
        """Return the least and the largest distance `(2, M)` within the bounds of eigenvalues.

        Args:
            eigenvalues_MN: Those of the Gram matrices of some rows, ascending.
        """
        dense_S, part_MN = self.eigenvalues_S.double(), eigenvalues_MN.double().clamp_min(0.0)
        largest, (floor, slope) = dense_S[-1], _SURE
        # An eigenvalue and one of the whole matrix beside it are off by as much, hence twice.
        off_MN = floor * largest + slope * (part_MN.shape[1] * largest * part_MN).sqrt()
        off_MN *= 2 * torch.finfo(eigenvalues_MN.dtype).eps
        dense_S = _without_noise(dense_S, largest)
        above_up, below_up = _leads(dense_S, _without_noise(part_MN + off_MN, largest))
        above_down, below_down = _leads(dense_S, _without_noise(part_MN - off_MN, largest))
        return torch.stack(
            [torch.maximum(above_down, below_up), torch.maximum(above_up, below_down)]
        )

    def exact_distance(self, kept_K: Tensor, turn: Turn) -> float:
        """Return the distance of ascending kept rows, worked out in float64 in turn."""
        with self.weight() as weight_FD:
            part_1N = _eigenvalues([_grams_of(weight_FD, kept_K[None], torch.float64)], turn)
            if self._exact_S is None:
                grams = [_grams_of(weight_FD, None, torch.float64)]
                self._exact_S = _eigenvalues(grams, turn)[0]
        largest = self._exact_S[-1]
        return float(
            ks_distance(_without_noise(self._exact_S, largest), _without_noise(part_1N, largest))
        )


def spectra_of(weights: Sequence[Weight], *, room: int | None = None) -> list[Spectrum]:
    """Return the spectrum of each matrix.

    Args:
        weights: The matrices.
        room: How many bytes the work may take, now and when distances are measured: what one
            matrix takes is taken anyway. By default as many as there are, and N × N numbers are
            held for each matrix, which makes distances of many kept rows cheaper.
    """

    def dense(batch: Sequence[Weight]) -> list[Spectrum]:
        grams, shapes = [], []
        for weight in batch:
            with weight() as weight_FD:
                is_double = weight_FD.dtype == torch.float64
                dtype = torch.float64 if is_double else torch.float32
                grams.append(_grams_of(weight_FD, None, dtype))
                shapes.append(weight_FD.shape)
        kept = [gram_1NN[0] if room is None else None for gram_1NN in grams]
        found = _eigenvalues(grams, turn)
        return [
            Spectrum(weight, shape[0], shape[1], gram, room, eigenvalues_S)
            for weight, shape, gram, eigenvalues_S in zip(batch, shapes, kept, found, strict=True)
        ]

    def place(weight: Weight) -> Place:
        with weight() as weight_FD:
            rows, columns = weight_FD.shape
            return _place(weight_FD.device, 1, rows, columns, weight_FD.dtype)

    def pair_bytes(weight: Weight) -> int:
        with weight() as weight_FD:
            rows, columns = weight_FD.shape
            return _pair_bytes(rows, columns, weight_FD.dtype)

    at_most, turn = in_pairs(room, map(pair_bytes, weights))
    return map_in_batches(dense, weights, place, at_most=at_most)


def spectral_distances(spectra: Sequence[Spectrum], kept: Sequence[Tensor]) -> Tensor:
    """Return the distances `(L, M)` of M draws of rows from each of L matrices, in float64.

    Args:
        spectra: Those of the matrices.
        kept: Kept rows `(M, K)` of each matrix, ascending; K may differ from matrix to matrix.
    """

    def compare(batch: Sequence[_Draws]) -> list[list[float | None]]:
        found = _eigenvalues([spectrum.grams_of_rows(kept_MK) for spectrum, kept_MK in batch], turn)
        parts = torch.split(found, [len(kept_MK) for _, kept_MK in batch])
        possible = [
            spectrum.possible_distances(eigenvalues_MN)
            for (spectrum, _), eigenvalues_MN in zip(batch, parts, strict=True)
        ]
        middles = [_middle(*ends) for ends in torch.cat(possible, dim=1).T.tolist()]
        return [[middles.pop(0) for _ in kept_MK] for _, kept_MK in batch]

    if not spectra:  # a rank may own none
        return torch.zeros(0, 0, dtype=torch.float64, device="cpu")
    found_LM = torch.zeros(len(spectra), len(kept[0]), dtype=torch.float64, device="cpu")
    cut = [n for n, spectrum in enumerate(spectra) if kept[n].shape[1] < spectrum.rows]
    pieces = [(spectra[n], part_MK) for n in cut for part_MK in _in_parts(spectra[n], kept[n])]
    draws = [(spectrum, kept_K) for spectrum, kept_MK in pieces for kept_K in kept_MK]
    at_most, turn = _pairs_for(spectra, spectra[0].eigenvalues_S.dtype)
    found = list(chain(*map_in_batches(compare, pieces, _place_of, at_most=at_most)))
    undecided = [number for number, ks in enumerate(found) if ks is None]
    at_most, exact_turn = _pairs_for(spectra, torch.float64)
    exact = map_on_threads(
        lambda number: draws[number][0].exact_distance(draws[number][1], exact_turn),
        undecided,
        at_most=at_most,
    )
    for number, ks in zip(undecided, exact, strict=True):
        found[number] = ks
    found_LM[cut] = found_LM.new_tensor(found).view(len(cut), len(kept[0]))
    return found_LM


_Draws = tuple[Spectrum, Tensor]
"""A matrix, and draws of rows `(M, K)` of it that are measured together."""


def _in_parts(spectrum: Spectrum, kept_MK: Tensor) -> Sequence[Tensor]:
    """Split draws of a matrix into such as are measured together: many where they are small."""
    each = _place_of((spectrum, kept_MK[:1])).bytes
    return torch.split(kept_MK, max(1, _SMALL // each))


def _place_of(draws: _Draws) -> Place:
    spectrum, kept_MK = draws
    (number, keep), dense_S = kept_MK.shape, spectrum.eigenvalues_S
    return _place(dense_S.device, number, keep, spectrum.columns, dense_S.dtype)


def _place(
    device: torch.device, matrices: int, rows: int, columns: int, dtype: torch.dtype
) -> Place:
    """Tell where eigenvalues of Gram matrices are found, and what that takes."""
    size = min(rows, columns)
    numbers = matrices * (_WORK * size**2 + min(rows, _CHUNK) * columns)
    return Place(device, numbers * max(dtype.itemsize, 4), (size, dtype))


def _pairs_for(spectra: Sequence[Spectrum], dtype: torch.dtype) -> tuple[int | None, Turn]:
    return in_pairs(spectra[0].room, (_pair_bytes(s.rows, s.columns, dtype) for s in spectra))


def _pair_bytes(rows: int, columns: int, dtype: torch.dtype) -> int:
    """Return how many bytes two threads take that measure, one of which finds eigenvalues.

    That one holds a Gram matrix and the copy that LAPACK destroys; the other one, which takes about
    as long for its products, a Gram matrix and rows, as they are and widened.
    """
    block = rows if rows <= columns else min(rows, _CHUNK)
    numbers = 3 * min(rows, columns) ** 2 + 2 * block * columns
    return max(dtype.itemsize, 4) * numbers


def compared_spectra(weight_FD: Tensor, kept_K: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return singular values of a matrix and of some of its rows, descending, and their distance.

    All in float64. What counts as 0 is 0.

    Args:
        weight_FD: The matrix.
        kept_K: The rows, ascending.
    """
    dense_1S = torch.linalg.eigvalsh(_grams_of(weight_FD, None, torch.float64))
    rows_1K = kept_K.to(weight_FD.device)[None]
    is_whole = rows_1K.shape[1] == len(weight_FD)
    part_1S = dense_1S
    if not is_whole:
        part_1S = torch.linalg.eigvalsh(_grams_of(weight_FD, rows_1K, torch.float64))
    dense_1S, part_1S = (_without_noise(found, dense_1S[0, -1]) for found in (dense_1S, part_1S))
    distance = float(ks_distance(dense_1S[0], part_1S))
    return dense_1S[0].sqrt().flip(0), part_1S[0].sqrt().flip(0), distance


def ks_distance(first_S: Tensor, second_MS: Tensor) -> Tensor:
    """Return the Kolmogorov-Smirnov distance `(M,)` in [0, 1] of sorted samples, in float64.

    It is the largest difference between the shares of values at or below a point, over all points
    of both samples, as `scipy.stats.ks_2samp(…).statistic`.

    Args:
        first_S: One sample, ascending.
        second_MS: M samples, each ascending; their size may differ from that of the first.
    """
    return torch.stack(_leads(first_S, second_MS)).amax(dim=0)


def _leads(first_S: Tensor, second_MS: Tensor) -> tuple[Tensor, Tensor]:
    """Return by how much the first share is the larger one at most, and the second, each `(M,)`."""
    first_MS = first_S.expand(len(second_MS), -1).contiguous()
    points = torch.cat([first_MS, second_MS], dim=1)
    below_first = torch.searchsorted(first_MS, points, right=True).double()
    below_second = torch.searchsorted(second_MS.contiguous(), points, right=True).double()
    difference = below_first / first_MS.shape[1] - below_second / second_MS.shape[1]
    return difference.amax(dim=1), -difference.amin(dim=1)


def _eigenvalues(grams: list[Tensor], turn: Turn) -> Tensor:
    """Return the eigenvalues `(M, N)` of stacks of Gram matrices, and let go of these."""
    with turn:
        found_MN: Tensor = torch.linalg.eigvalsh(torch.cat(grams) if len(grams) > 1 else grams[0])
        grams.clear()
    return found_MN


def _grams_of(weight_FD: Tensor, rows_MK: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the lower triangles of the smaller Gram matrices of some rows, or of all, M = 1."""
    draws, rows = rows_MK.shape if rows_MK is not None else (1, len(weight_FD))
    columns = weight_FD.shape[1]
    size = min(rows, columns)
    grams_MNN = weight_FD.new_zeros(draws, size, size, dtype=dtype)
    if rows > columns:
        return _add_grams(grams_MNN, weight_FD, rows_MK, sign=1)
    part_MKD = (weight_FD[None] if rows_MK is None else weight_FD[rows_MK]).to(dtype)
    return _add_products(grams_MNN, part_MKD, sign=1)


def _add_grams(
    grams_MDD: Tensor, weight_FD: Tensor, rows_MK: Tensor | None, *, sign: int
) -> Tensor:
    """Add ± the products of columns of some rows, or of all, to lower triangles, return them."""
    if rows_MK is None:
        parts = (part_KD[None] for part_KD in torch.split(weight_FD, _CHUNK))
    else:
        parts = (weight_FD[part_MK] for part_MK in torch.split(rows_MK, _CHUNK, dim=1))
    for part_MKD in parts:
        _add_products(grams_MDD, part_MKD.to(grams_MDD.dtype).mT, sign=sign)
    return grams_MDD


def _add_products(lower_MNN: Tensor, factor_MNK: Tensor, *, sign: int) -> Tensor:
    """Add ± `factor · factorᵀ` to lower triangles in blocks, return them; the rest is noise."""
    size = factor_MNK.shape[1]
    step = -(-size // _BLOCKS)
    for start in range(0, size, step):
        stop = start + step
        block = lower_MNN[:, start:, start:stop]
        block.baddbmm_(factor_MNK[:, start:], factor_MNK[:, start:stop].mT, alpha=sign)
    return lower_MNN


def _middle(one: float, other: float) -> float | None:
    """Return what lies near enough to all between two distances, None where nothing does."""
    middle = (one + other) / 2
    return middle if abs(one - middle) <= min(_TOLERANCE, _SHARE * middle) else None


def _without_noise(eigenvalues: Tensor, largest: Tensor) -> Tensor:
    """Return eigenvalues of a Gram matrix with 0 for all whose singular values count as 0."""
    return torch.where(eigenvalues > _ZERO**2 * largest, eigenvalues, 0.0)


def _complement(kept_MK: Tensor, rows: int) -> Tensor:
    """Return the rows `(M, F - K)` that are not kept."""
    is_dropped_MF = torch.ones(len(kept_MK), rows, dtype=torch.bool, device=kept_MK.device)
    is_dropped_MF.scatter_(1, kept_MK, False)
    return is_dropped_MF.nonzero()[:, 1].view(len(kept_MK), -1)
