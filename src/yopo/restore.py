"""Re-solve the contract matrix for the rows that stay, so that the FFN's output changes least.

Shapes: F rows, K kept rows, C dropped rows, D model width.
"""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from yopo.damping import damped_cholesky
from yopo.moments import Moments

logger = logging.getLogger(__name__)

_NEGLIGIBLE = 1e-6
"""Errors below this are not worth a warning: rows that are always silent leave such."""


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
    name: str = "the FFN",
) -> Restored:
    """Return the contract matrix of the kept rows that best repeats the output of all rows.

    Least squares on the second moments H of the hidden units, with C the dropped columns:
    W = W_K + (H_KK + λI)⁻¹ H_KC W_C, where λ = `ridge` · mean diag H_KK. The ridge pulls towards
    the weights as they are, so that directions without evidence stay untouched. Where there is a
    bias, moments are central and the bias absorbs the means. The result is rounded to `dtype`
    before its error is measured; should it not beat the weights as they are, those are returned,
    and the log says so.

    Args:
        moments: What is known of the hidden units.
        contract_FD: Columns of the contract matrix, all rows.
        bias_D: Its bias, if it has one.
        kept_K: Rows that stay.
        dtype: The dtype in which the result will be stored.
        ridge: λ as a share of the mean diagonal of H_KK.
        name: What the log calls the FFN.
    """
    second_FF = moments.behind(bias_D)
    weights_FD = contract_FD.to(second_FF)
    kept_K = kept_K.to(second_FF.device)
    is_dropped_F = torch.ones(len(second_FF), dtype=torch.bool, device=second_FF.device)
    is_dropped_F[kept_K] = False
    dropped_C = is_dropped_F.nonzero()[:, 0]
    kept_KF = second_FF.index_select(0, kept_K)
    factor_KK = damped_cholesky(kept_KF.index_select(1, kept_K), ridge)
    cross_KD = kept_KF.index_select(1, dropped_C) @ weights_FD[dropped_C]
    solved_KD = (weights_FD[kept_K] + torch.cholesky_solve(cross_KD, factor_KK)).to(dtype)
    bias = None if bias_D is None else _bias(moments, weights_FD, bias_D, kept_K, solved_KD)
    before, after = _errors(moments, weights_FD, bias_D, dropped_C, kept_K, solved_KD, bias)
    if moments.tokens < len(kept_K):
        logger.info(
            "The evidence for `%s`, %d tokens, is less than the %d rows that stay, so the ridge "
            "decides much of what is restored.",
            name,
            moments.tokens,
            len(kept_K),
        )
    if not after < before:
        tell_not_restored(name, before)
        return Restored(contract_FD[kept_K.to(contract_FD.device)], bias_D, before, before)
    return Restored(solved_KD, bias, after, before)


def tell_not_restored(name: str, error: float) -> None:
    """Warn that the weights of an FFN are left as they are, unless the error is negligible.

    Args:
        name: What the log calls the FFN.
        error: Its error with those weights.
    """
    if error > _NEGLIGIBLE:
        logger.warning(
            "Restoring would not bring the output of `%s` nearer to what it was, so the weights "
            "of the rows that stay are left as they are.",
            name,
        )


def _bias(
    moments: Moments, weights_FD: Tensor, bias_D: Tensor, kept_K: Tensor, solved_KD: Tensor
) -> Tensor:
    """Return the bias that keeps the mean output, rounded as `bias_D` is."""
    mean_D = moments.mean_F @ weights_FD - moments.mean_F[kept_K] @ solved_KD.double()
    return (bias_D.double() + mean_D).to(bias_D.dtype)


def _errors(
    moments: Moments,
    weights_FD: Tensor,
    bias_D: Tensor | None,
    dropped_C: Tensor,
    kept_K: Tensor,
    solved_KD: Tensor,
    new_bias_D: Tensor | None,
) -> tuple[float, float]:
    """Return the mean squared change of the output without and with the solution.

    Both are shares of the output's mean square.
    """
    dropped_CC = moments.second_FF.index_select(0, dropped_C).index_select(1, dropped_C)
    before = _energy(dropped_CC, weights_FD[dropped_C])
    change_FD = weights_FD.clone()
    change_FD[kept_K] -= solved_KD.double()
    after = _energy(moments.second_FF, change_FD)
    if bias_D is not None and new_bias_D is not None:
        shift_D = bias_D.double() - new_bias_D.double()
        after += 2 * (moments.mean_F @ change_FD) @ shift_D + shift_D.square().sum()
    total = _energy(moments.second_FF, weights_FD).clamp_min(1e-300)
    return float(before.clamp_min(0.0) / total), float(after.clamp_min(0.0) / total)


def _energy(second_FF: Tensor, weights_FD: Tensor) -> Tensor:
    """Return the mean square of what `weights_FD` makes of the hidden units, over the outputs."""
    return (weights_FD * (second_FF @ weights_FD)).sum()
