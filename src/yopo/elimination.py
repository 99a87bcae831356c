"""Greedy elimination: drop, one after another, the row whose loss after restoring is smallest.

Shapes: F rows, D model width, B rows of a block, b rows of the block dropped so far.

With H the second moments of the hidden units and W `(F, D)` the columns of the contract matrix,
dropping row j and re-solving the others costs ‖w_j‖² / (H⁻¹)_jj in mean squared output (the
optimal-brain-surgeon formula, Hassibi & Stork 1993, for a whole column as in ZipLM). Afterwards

    H⁻¹ ← H⁻¹ - u uᵀ,   W ← W - k w_jᵀ,   u = (H⁻¹)_j / √(H⁻¹)_jj,   k = u / √(H⁻¹)_jj.

Only the diagonals of H⁻¹ and of G = W Wᵀ are needed to choose, and one column of each to go on. So
a block of drops is kept as thin factors, and the F × F matrices are touched once a block, by matrix
products, instead of once a row.
"""

import torch
from torch import Tensor

from yopo.adapters import Ffn
from yopo.moments import Moments

_BLOCK = 64


def elimination_order(second_FF: Tensor, contract_FD: Tensor, *, ridge: float = 1e-2) -> Tensor:
    """Return the rows `(F,)` in the order in which greedy elimination drops them.

    The rows to keep at any ratio are the last of them, so one order serves all ratios.

    Args:
        second_FF: Second moments of the hidden units (central ones where the contract matrix has a
            bias that can absorb means), float64.
        contract_FD: Columns of the contract matrix.
        ridge: Share of the mean diagonal added to it, which keeps rank-deficient moments safe.
    """
    rows = len(second_FF)
    inverse_FF = _inverse(second_FF, ridge)
    contract_FD = contract_FD.to(second_FF.dtype)
    gram_FF = contract_FD @ contract_FD.T
    alive_F = torch.ones(rows, dtype=torch.bool, device=second_FF.device)
    order: list[Tensor] = []
    for start in range(0, rows, _BLOCK):
        size = min(_BLOCK, rows - start)
        order += _drop_block(inverse_FF, gram_FF, alive_F, size)
    return torch.stack(order)


def ffn_elimination_order(ffn: Ffn, moments: Moments) -> Tensor:
    """Return the elimination order `(F,)` of the rows of `ffn`.

    Where the contract matrix has a bias, restoring absorbs means, so moments are central.
    """
    return elimination_order(moments.behind(ffn.contract_bias()), ffn.contract_weight())


def _drop_block(inverse_FF: Tensor, gram_FF: Tensor, alive_F: Tensor, size: int) -> list[Tensor]:
    """Drop `size` rows, and update the matrices in place."""
    rows = len(alive_F)
    steps_FB = inverse_FF.new_zeros(rows, size)  # u of each drop
    moves_FB = inverse_FF.new_zeros(rows, size)  # k of each drop
    grams_FB = inverse_FF.new_zeros(rows, size)  # column j of G before each drop
    inverse_F, gram_F = inverse_FF.diagonal().clone(), gram_FF.diagonal().clone()
    dropped: list[Tensor] = []
    for step in range(size):
        loss_F = gram_F / inverse_F.clamp_min(1e-300)
        row = torch.where(alive_F, loss_F, torch.inf).argmin()
        u_F = inverse_FF[:, row] - steps_FB[:, :step] @ steps_FB[row, :step]
        g_F = gram_FF[:, row] - _gram_change(moves_FB, grams_FB, dropped, row, step)
        pivot = u_F[row].clamp_min(1e-300)
        k_F, u_F = u_F / pivot, u_F / pivot.sqrt()
        gram_F += k_F * (k_F * g_F[row] - 2 * g_F)
        inverse_F -= u_F.square()
        steps_FB[:, step], moves_FB[:, step], grams_FB[:, step] = u_F, k_F, g_F
        alive_F[row] = False
        dropped.append(row)
    inverse_FF -= steps_FB @ steps_FB.T
    own_B = torch.stack([grams_FB[row, step] for step, row in enumerate(dropped)])
    cross_FF = moves_FB @ grams_FB.T
    gram_FF -= cross_FF + cross_FF.T - (moves_FB * own_B) @ moves_FB.T
    return dropped


def _gram_change(
    moves_FB: Tensor, grams_FB: Tensor, dropped: list[Tensor], row: Tensor, step: int
) -> Tensor:
    """Return by how much column `row` of G has shrunk through the drops of the block so far."""
    if step == 0:
        return torch.zeros_like(moves_FB[:, 0])
    k_Fb, g_Fb = moves_FB[:, :step], grams_FB[:, :step]
    own_b = torch.stack([grams_FB[dropped[i], i] for i in range(step)])
    return k_Fb @ g_Fb[row] + g_Fb @ k_Fb[row] - k_Fb @ (own_b * k_Fb[row])


def _inverse(second_FF: Tensor, ridge: float) -> Tensor:
    damped_FF = second_FF.clone()
    damped_FF.diagonal().add_(ridge * second_FF.diagonal().mean().clamp_min(1e-30))
    return torch.cholesky_inverse(torch.linalg.cholesky(damped_FF))
