"""Scores of weights, summed to FFN rows."""

import torch
from torch import Tensor, nn

from yopo.adapters import Ffn, Slot
from yopo.criteria import Criterion
from yopo.symbolic.expression import Expression
from yopo.symbolic.matrices import Matrix, find_blocks, matrices_of
from yopo.symbolic.metrics import scores_of
from yopo.symbolic.primitives import PrimitiveSet
from yopo.symbolic.statistics import Statistics


def weight_criterion(
    model: nn.Module, expression: Expression, statistics: Statistics, *, primitives: PrimitiveSet
) -> Criterion:
    """Return a criterion that scores a row by the sum of the scores of all its weights.

    Args:
        model: The model.
        expression: The score of a weight, over W, G and X.
        statistics: G and X, as far as they are needed.
        primitives: As for `Expression.evaluate`.
    """
    by_place = {matrix.place: matrix for matrix in matrices_of(find_blocks(model))}

    def matrix_of(slot: Slot, rows: int) -> Matrix:
        parts = (None, (slot.start, rows))
        places = [(id(slot.parameter), slot.expert, part) for part in parts]
        return next(by_place[place] for place in places if place in by_place)

    def score(ffn: Ffn) -> Tensor:
        total_F = torch.zeros(ffn.rows, dtype=torch.float64, device=ffn.device)
        for slot in (*ffn.expand, ffn.contract):
            matrix = matrix_of(slot, ffn.rows)
            scores = scores_of(matrix, expression, statistics.of(matrix), primitives=primitives)
            stored = scores.T if matrix.transposed else scores
            start = 0 if matrix.part is not None else slot.start
            rows = stored.movedim(slot.axis, 0)[start : start + slot.step * ffn.rows : slot.step]
            total_F += rows.sum(dim=1, dtype=torch.float64).to(total_F.device)
        return total_F

    return score
