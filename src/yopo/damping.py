"""Make second moments safe to factorise, however little evidence they come from.

Shapes: F rows.
"""

import torch
from torch import Tensor

_RAISED = 10
"""How often the ridge may grow tenfold: by then it outweighs all that rounding can have done."""


def damped_cholesky(second_FF: Tensor, ridge: float) -> Tensor:
    """Return the lower Cholesky factor of second moments plus λI, λ = `ridge` · mean diagonal.

    Second moments have no negative eigenvalue but by the rounding of their sums, which the ridge
    outweighs: it is a share of the mean eigenvalue. Should it not, it grows until it does.

    Args:
        second_FF: Second moments, finite, float64; they stay as they are.
        ridge: λ as a share of the mean diagonal, positive.
    """
    scale = second_FF.diagonal().mean().clamp_min(1e-30)
    damped_FF = second_FF.clone()
    damped_FF.diagonal().add_(ridge * scale)
    for _ in range(_RAISED):
        factor_FF: Tensor
        factor_FF, failed = torch.linalg.cholesky_ex(damped_FF)
        if not failed:
            return factor_FF
        damped_FF.diagonal().add_(9 * ridge * scale)
        ridge *= 10
    factor_FF = torch.linalg.cholesky(damped_FF)
    return factor_FF
