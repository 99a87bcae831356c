"""Re-solve the contract matrix for the rows that stay, so that the FFN's output changes least.

Shapes: F rows, K kept rows, D model width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from yopo.moments import Moments


@dataclass(frozen=True, slots=True, eq=False)
class Restored:
    """Hold a re-solved contract matrix.

    Attributes:
        contract_KD: Its columns for the kept rows.
        bias_D: Its bias, None where it has none.
        error: Mean squared error of the FFN's output on the evidence, as a share of the output's
            mean square.
        error_before: The same without re-solving.
    """

    contract_KD: Tensor
    bias_D: Tensor | None
    error: float
    error_before: float


def restore_contract(
    moments: Moments,
    contract_FD: Tensor,
    bias_D: Tensor | None,
    kept_K: Tensor,
    *,
    dtype: torch.dtype,
    ridge: float = 1e-3,
) -> Restored:
    """Return the contract matrix of the kept rows that best repeats the output of all rows.

    Least squares on the second moments H of the hidden units, with C the dropped columns:
    W = W_K + (H_KK + λI)⁻¹ H_KC W_C, where λ = `ridge` · mean diag H. The ridge pulls towards the
    weights as they are, so that directions without evidence stay untouched. Where there is a bias,
    moments are central and the bias absorbs the means. The result is rounded to `dtype` before its
    error is measured; should it not beat the weights as they are, those are returned.

    Args:
        moments: What is known of the hidden units.
        contract_FD: Columns of the contract matrix, all rows.
        bias_D: Its bias, if it has one.
        kept_K: Rows that stay.
        dtype: The dtype in which the result will be stored.
        ridge: λ as a share of the mean diagonal.
    """
    weights_FD = contract_FD.double()
    second_FF = moments.behind(bias_D)
    kept_K = kept_K.to(second_FF.device)
    dropped_F = torch.ones(len(second_FF), dtype=torch.bool, device=second_FF.device)
    dropped_F[kept_K] = False
    damped_KK = second_FF[kept_K][:, kept_K]
    damped_KK.diagonal().add_(ridge * damped_KK.diagonal().mean().clamp_min(1e-30))
    cross_KD = second_FF[kept_K][:, dropped_F] @ weights_FD[dropped_F]
    change_KD = torch.cholesky_solve(cross_KD, torch.linalg.cholesky(damped_KK))
    solved_KD = (weights_FD[kept_K] + change_KD).to(dtype)
    before = _error(moments, weights_FD, bias_D, kept_K, weights_FD[kept_K], bias_D)
    bias = None if bias_D is None else _bias(moments, weights_FD, bias_D, kept_K, solved_KD)
    after = _error(moments, weights_FD, bias_D, kept_K, solved_KD.double(), bias)
    if not after < before:
        return Restored(contract_FD[kept_K], bias_D, before, before)
    return Restored(solved_KD, bias, after, before)


def _bias(
    moments: Moments, weights_FD: Tensor, bias_D: Tensor, kept_K: Tensor, solved_KD: Tensor
) -> Tensor:
    """Return the bias that keeps the mean output, rounded as `bias_D` is."""
    mean_D = moments.mean_F @ weights_FD - moments.mean_F[kept_K] @ solved_KD.double()
    return (bias_D.double() + mean_D).to(bias_D.dtype)


def _error(
    moments: Moments,
    weights_FD: Tensor,
    bias_D: Tensor | None,
    kept_K: Tensor,
    new_KD: Tensor,
    new_bias_D: Tensor | None,
) -> float:
    """Return the mean squared change of the output as a share of its mean square."""
    change_FD = weights_FD.clone()
    change_FD[kept_K] -= new_KD
    shift_D = torch.zeros(weights_FD.shape[1], dtype=torch.float64, device=weights_FD.device)
    if bias_D is not None and new_bias_D is not None:
        shift_D = bias_D.double() - new_bias_D.double()
    error = (change_FD * (moments.second_FF @ change_FD)).sum()
    error += 2 * (moments.mean_F @ change_FD) @ shift_D + shift_D.square().sum()
    total = (weights_FD * (moments.second_FF @ weights_FD)).sum()
    return float(error.clamp_min(0.0) / total.clamp_min(1e-300))
