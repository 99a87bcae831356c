"""SparseGPT (arXiv 2301.00774): zeros, and the other weights of a row changed to make up for them.

Shapes: O outputs, I inputs, B columns of a block, T tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from yopo.errors import InvalidArgumentError, UnsupportedModelError
from yopo.symbolic.masks import Pattern, dropped
from yopo.symbolic.matrices import Matrix
from yopo.watching import Watch

_COLUMNS = 128
_DAMPING = 0.01


@contextmanager
def watch_products(matrices: Sequence[Matrix]) -> Iterator[dict[str, Tensor]]:
    """Give the sums of xᵀx `(I, I)`, float32, of the inputs of each matrix, by its name."""
    sums = {
        matrix.name: torch.zeros(
            2 * matrix.weight.shape[1:], device=matrix.parameter.device, dtype=torch.float32
        )
        for matrix in matrices
    }
    with Watch((m.weight, m.expert, partial(_add_product, sums[m.name])) for m in matrices):
        yield sums


def _add_product(total_II: Tensor, inputs: Tensor) -> None:
    inputs_TI = inputs.detach().reshape(-1, inputs.shape[-1]).float()
    total_II.addmm_(inputs_TI.T, inputs_TI)


def sparsegpt(weight_OI: Tensor, products_II: Tensor, pattern: Pattern, *, name: str) -> Tensor:
    """Return what SparseGPT makes of a matrix, `(O, I)` in float32.

    Columns go in blocks of 128. In each, the weights with the least w² / [H⁻¹]² become zero, and
    what is lost of the output is made up for by the columns further right. H is the mean of 2xᵀx
    with 1 % of its mean diagonal added to that, and [H⁻¹] the diagonal of the upper Cholesky
    factor of its inverse. Differs from the reference, which lets go whatever is not above a
    threshold, and beside that all weights of inputs that are always zero: here equal weights are
    told apart, those of such inputs go first, and exactly as many go as were asked for.

    Args:
        weight_OI: The matrix.
        products_II: Sums of xᵀx over tokens, which are used up; a factor does not matter.
        pattern: How many go. Without groups, weights of all rows compete in each block.
        name: Of the matrix, for the error.

    Raises:
        UnsupportedModelError: If the products are not finite.
        InvalidArgumentError: If they are all zero.
    """
    weight_OI = weight_OI.float().clone()
    dead_I = products_II.diagonal() == 0
    if dead_I.all():
        raise InvalidArgumentError(
            f"no token reaches `{name}`, so nothing is known of its inputs. Pass more `data`, or "
            'use a metric of weights alone, such as "magnitude".'
        )
    factor_II = _inverse_factor(products_II, dead_I, name)
    # Weights of dead inputs then score 0, and leave no error when they go.
    scale_I = factor_II.diagonal().masked_fill(dead_I, torch.inf)
    step = _COLUMNS // (pattern.group or 1) * (pattern.group or 1) or weight_OI.shape[1]
    for start in range(0, weight_OI.shape[1], step):
        stop = min(start + step, weight_OI.shape[1])
        own_BB, scale_B = factor_II[start:stop, start:stop], scale_I[start:stop]
        errors_OB = _prune_columns(weight_OI[:, start:stop], own_BB, scale_B, pattern)
        weight_OI[:, stop:] -= errors_OB @ factor_II[start:stop, stop:]
    return weight_OI


def _inverse_factor(products_II: Tensor, dead_I: Tensor, name: str) -> Tensor:
    """Return the upper Cholesky factor of the inverse of the damped products."""
    diagonal_I = products_II.diagonal()
    diagonal_I[dead_I] = 1.0
    diagonal_I += _DAMPING * diagonal_I.mean()
    try:
        inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(products_II))
        factor_II: Tensor = torch.linalg.cholesky(inverse_II, upper=True)
    except RuntimeError as error:  # LinAlgError is one
        raise UnsupportedModelError(
            f"the inputs of `{name}` are NaN, infinite or too far apart in size for SparseGPT. "
            "Load the model in a wider `dtype`, or use another `metric`."
        ) from error
    return factor_II


def _prune_columns(
    weight_OB: Tensor, factor_BB: Tensor, scale_B: Tensor, pattern: Pattern
) -> Tensor:
    """Prune a block of columns in place, and return the error `(O, B)` that each leaves."""
    gone_OB = torch.zeros_like(weight_OB, dtype=torch.bool)
    if pattern.group is None:
        gone_OB = dropped(weight_OB.square() / scale_B.square(), pattern, whole=True)
    errors_OB = torch.empty_like(weight_OB)
    for column in range(weight_OB.shape[1]):
        if pattern.group is not None and column % pattern.group == 0:
            ahead = slice(column, column + pattern.group)
            scores = weight_OB[:, ahead].square() / scale_B[ahead].square()
            gone_OB[:, ahead] = dropped(scores, pattern)
        old_O = weight_OB[:, column].clone()
        new_O = old_O.masked_fill(gone_OB[:, column], 0.0)
        errors_OB[:, column] = (old_O - new_O) / scale_B[column]
        weight_OB[:, column:] -= errors_OB[:, column, None] * factor_BB[column, column:]
        weight_OB[:, column] = new_O
    return errors_OB
