"""Greedy elimination: drop, one after another, the row whose loss after restoring is smallest.

Shapes: F rows, D model width, B rows of a block, A rows that are alive.

With H the second moments of the hidden units and W `(F, D)` the columns of the contract matrix,
dropping row j and re-solving the others costs ‖w_j‖² / (H⁻¹)_jj in mean squared output (the
optimal-brain-surgeon formula, Hassibi & Stork 1993, for a whole column as in ZipLM). Afterwards

    H⁻¹ ← H⁻¹ - u uᵀ,   W ← W - u w_jᵀ / √(H⁻¹)_jj,   u = (H⁻¹)_j / √(H⁻¹)_jj.

Only the diagonals of H⁻¹ and of G = W Wᵀ are needed to choose, and one column of each to go on.
With g column j of G, the drop changes G by - (u sᵀ + s uᵀ), s = g / √(H⁻¹)_jj - ½ loss u. So a
block of drops is kept as its u and s, and the F × F matrices, which shrink as rows go, are touched
once a block, by matrix products, instead of once a row. The loop over rows never waits for the
device: which row is dropped is not known to the host.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from yopo.adapters import Ffn
from yopo.damping import damped_cholesky
from yopo.moments import Moments

_BLOCK = 64
_SHRINK = 3 / 4
"""Share of alive rows at which the matrices are cut down to them: each cut is a copy."""
_TINY = 1e-300


@dataclass(frozen=True, slots=True, eq=False)
class Elimination:
    """Say in which order greedy elimination drops the rows of an FFN, and what each drop costs.

    Attributes:
        order_F: The rows, first dropped first, int64. The best to keep are the last.
        loss_F: Entry i is by how much dropping row `order_F[i]` raises the squared error of the
            output, after the drops before it and with the contract matrix re-solved for the rows
            that stay; float64, never negative. It is the mean over tokens of the sum over the D
            entries of the output (which is taken around its mean where a bias absorbs means), so
            the losses of all rows add up to the output's own mean square. The ridge counts as
            evidence here, λ‖W‖² in all.
    """

    order_F: Tensor
    loss_F: Tensor


@torch.no_grad()
def eliminate(
    second_FF: Tensor, contract_FD: Tensor, *, ridge: float = 1e-2, drops: int | None = None
) -> Elimination:
    """Drop rows one after another, each time the one that costs least, and say what each cost.

    Args:
        second_FF: Second moments of the hidden units (central ones where the contract matrix has a
            bias that can absorb means), float64.
        contract_FD: Columns of the contract matrix.
        ridge: Share of the mean diagonal added to it, which keeps rank-deficient moments safe.
        drops: How many rows to drop, by default all. The others come last, cheapest first, with
            the loss that each would be if it alone went next.
    """
    rows = len(second_FF)
    both_2FF = _inverse_and_gram(second_FF, contract_FD, ridge)
    diagonal_2F = both_2FF.diagonal(dim1=1, dim2=2).clone()
    names_F = torch.arange(rows, device=second_FF.device)
    order, losses = [], []
    left = rows if drops is None else min(drops, rows)
    while left:
        size = min(_BLOCK, left)
        dropped_B, loss_B, thin_2BF = _drop_block(both_2FF, diagonal_2F, size)
        order.append(names_F[dropped_B])
        losses.append(loss_B)
        rows, left = rows - size, left - size
        if rows <= _SHRINK * len(names_F) or not left:
            alive_A = diagonal_2F[1].isfinite().nonzero()[:, 0]
            names_F, diagonal_2F = names_F[alive_A], diagonal_2F[:, alive_A]
            if left:
                thin_2BF = thin_2BF.index_select(2, alive_A)
                both_2FF = both_2FF.index_select(1, alive_A)
                both_2FF = both_2FF.index_select(2, alive_A)
        if left:
            u_BF, s_BF = thin_2BF
            both_2FF[0].addmm_(u_BF.T, u_BF, alpha=-1)
            both_2FF[1].addmm_(thin_2BF.flatten(0, 1).T, torch.cat([s_BF, u_BF]), alpha=-1)
    loss_F, last_F = _losses(diagonal_2F).sort(stable=True)
    return Elimination(
        torch.cat([*order, names_F[last_F]]), torch.cat([*losses, loss_F]).clamp_min(0.0)
    )


def elimination_order(second_FF: Tensor, contract_FD: Tensor, *, ridge: float = 1e-2) -> Tensor:
    """Return the rows `(F,)` in the order in which greedy elimination drops them.

    The rows to keep at any ratio are the last of them, so one order serves all ratios.

    Args:
        second_FF: As for `eliminate`.
        contract_FD: As for `eliminate`.
        ridge: As for `eliminate`.
    """
    return eliminate(second_FF, contract_FD, ridge=ridge).order_F


def ffn_elimination(ffn: Ffn, moments: Moments, *, drops: int | None = None) -> Elimination:
    """Eliminate rows of `ffn`, which is not changed.

    Where the contract matrix has a bias, restoring absorbs means, so moments are central.

    Args:
        ffn: The FFN.
        moments: What is known of its hidden units.
        drops: As for `eliminate`.
    """
    second_FF = moments.behind(ffn.contract_bias())
    return eliminate(second_FF, ffn.contract_weight(), drops=drops)


def ffn_elimination_order(ffn: Ffn, moments: Moments, *, drops: int | None = None) -> Tensor:
    """Return the elimination order `(F,)` of the rows of `ffn`.

    Args:
        ffn: As for `ffn_elimination`.
        moments: As for `ffn_elimination`.
        drops: As for `eliminate`.
    """
    return ffn_elimination(ffn, moments, drops=drops).order_F


def _drop_block(both_2FF: Tensor, diagonal_2F: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Drop `size` rows: return which, their losses and the u and s of each.

    `diagonal_2F` is kept up to date, with G at infinity where a row is gone; `both_2FF` is not.
    """
    inverse_F, gram_F = diagonal_2F
    thin_2BF = both_2FF.new_empty(2, size, len(inverse_F))
    loss_B = both_2FF.new_empty(size)
    dropped_B = torch.empty(size, dtype=torch.int64, device=both_2FF.device)
    for step in range(size):
        loss_F = _losses(diagonal_2F)
        loss_1, row_1 = loss_B[step : step + 1], dropped_B[step : step + 1]
        torch.min(loss_F, dim=0, keepdim=True, out=(loss_1, row_1))
        # Columns j of the inverse and of G as they are now: those of the block's start, less what
        # the drops since then have changed.
        u_F, s_F = pair_2F = torch.index_select(both_2FF, 1, row_1)[:, 0]
        if step:
            u_bF, s_bF = thin_2bF = thin_2BF[:, :step]
            u_b, s_b = thin_2bF.index_select(2, row_1)[:, :, 0]
            u_F.addmv_(u_bF.T, u_b, alpha=-1)
            s_F.addmv_(u_bF.T, s_b, alpha=-1)
            s_F.addmv_(s_bF.T, u_b, alpha=-1)
        pair_2F *= u_F.index_select(0, row_1).clamp_min_(_TINY).rsqrt_()
        s_F.addcmul_(u_F, loss_1, value=-0.5)
        inverse_F.addcmul_(u_F, u_F, value=-1)
        gram_F.addcmul_(u_F, s_F, value=-2)
        gram_F.index_fill_(0, row_1, torch.inf)
        thin_2BF[:, step] = pair_2F
    return dropped_B, loss_B, thin_2BF


def _losses(diagonal_2F: Tensor) -> Tensor:
    return diagonal_2F[1] / diagonal_2F[0].clamp_min(_TINY)


def _inverse_and_gram(second_FF: Tensor, contract_FD: Tensor, ridge: float) -> Tensor:
    """Return the inverse of the damped second moments and the products of the columns."""
    weights_FD = contract_FD.to(second_FF)
    inverse_FF = torch.cholesky_inverse(damped_cholesky(second_FF, ridge))
    both_2FF = second_FF.new_empty(2, *second_FF.shape)
    both_2FF[0] = inverse_FF
    torch.mm(weights_FD, weights_FD.T, out=both_2FF[1])
    return both_2FF
