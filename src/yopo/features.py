"""Intrinsic features of rows that mean the same in every model, whatever d_model and d_ff are.

Shapes: F rows, D model width, P features.
"""

import torch
from torch import Tensor

from yopo.adapters import Ffn, norm_gain_and_bias

FEATURES = (
    "log_norm_gate",
    "log_norm_up",
    "log_norm_contract",
    "log_norm_product",
    "log_norm_gate_without_gain",
    "log_leverage_gate",
    "log_leverage_contract",
    "log_spectral_weight",
    "bias",
    "elimination",
)
"""Names of the features, in the order of their columns."""

_TINY = 1e-12
_SAME = 1e-3
"""Values that spread by less than this are one value and its rounding."""


def row_features(ffn: Ffn, order_F: Tensor | None = None) -> Tensor:
    """Return the features `(F, P)` of the rows of an FFN, float32, each standardised over the rows.

    "gate" is the first expand matrix (fc1 where there is only one) and "up" the second; expand
    matrices are taken with the gain of the preceding norm folded in, because that is what they
    multiply normalised inputs with. Leverage is wᵀ(WᵀW)⁻¹w, the share of a row in spanning the
    row space; the spectral weight wᵀ(WᵀW)w / wᵀw tells how far a row lies along the strong
    directions. A feature that an FFN does not have, or that is the same for all its rows, such as
    the leverage where rows are fewer than columns, is 0.

    Args:
        ffn: The FFN.
        order_F: Its rows in the order in which greedy elimination drops them, whose positions are
            the last feature. It is the only one that looks at more than weights.
    """
    gate_FD, *others = [scaled(weight) for weight in ffn.expand_weights()]
    contract_FD = scaled(ffn.contract_weight())
    gain_D = scaled(norm_gain_and_bias(ffn, gate_FD.shape[1])[0].to(gate_FD.device))
    folded_FD = scaled(gate_FD * gain_D)
    log_gate_F, log_contract_F = _log_norm(folded_FD), _log_norm(contract_FD)
    log_up_F = _log_norm(scaled(others[0] * gain_D)) if others else torch.zeros_like(log_gate_F)
    columns = [
        log_gate_F,
        log_up_F,
        log_contract_F,
        log_gate_F + log_up_F + log_contract_F,
        _log_norm(gate_FD),
        _log_leverage(folded_FD),
        _log_leverage(contract_FD),
        _log_spectral_weight(gate_FD),
        scaled(_bias(ffn, log_gate_F)),
        torch.zeros_like(log_gate_F) if order_F is None else order_F.argsort().float(),
    ]
    return _standardised(torch.stack(columns, dim=1))


def leverage_scores(weight_FD: Tensor) -> Tensor:
    """Return the leverage wᵀ(WᵀW)⁻¹w `(F,)` of each row of a matrix, float32, in [0, 1].

    A ridge makes rank-deficient matrices safe. It has to exceed the rounding of the product, which
    grows with the largest eigenvalue.
    """
    weight_FD = scaled(weight_FD)
    gram_DD = (weight_FD.T @ weight_FD).double()
    ridge = 1e-6 * gram_DD.norm().clamp_min(_TINY)
    gram_DD.diagonal().add_(ridge)
    factor_DD = torch.linalg.cholesky(gram_DD)
    whitened_DF = torch.linalg.solve_triangular(
        factor_DD.to(weight_FD.dtype), weight_FD.T, upper=False
    )
    leverage_F: Tensor = whitened_DF.square().sum(dim=0)
    return leverage_F


def scaled(weight: Tensor) -> Tensor:
    """Return float32 values in [-1, 1]: their squares stay in range, and no feature minds."""
    weight = weight.float()
    return weight / weight.abs().max().clamp_min(torch.finfo(torch.float32).tiny)


def _log_norm(weight_FD: Tensor) -> Tensor:
    norm_F: Tensor = weight_FD.norm(dim=1)
    return norm_F.clamp_min(_TINY).log()


def _log_leverage(weight_FD: Tensor) -> Tensor:
    return leverage_scores(weight_FD).clamp_min(_TINY).log()


def _log_spectral_weight(weight_FD: Tensor) -> Tensor:
    energy_F = weight_FD.square().sum(dim=1)
    spread_F = ((weight_FD @ (weight_FD.T @ weight_FD)) * weight_FD).sum(dim=1)
    return (spread_F.clamp_min(_TINY) / energy_F.clamp_min(_TINY)).log()


def _bias(ffn: Ffn, like_F: Tensor) -> Tensor:
    """Return the bias of the first expand matrix, zeros where there is none."""
    gate = ffn.expand[0]
    for slot in ffn.vectors:
        if slot.name.endswith("bias") and slot.module is gate.module and slot.start == gate.start:
            return slot.read(ffn.rows).float()
    return torch.zeros_like(like_F)


def _standardised(features_FP: Tensor) -> Tensor:
    """Return columns of mean 0 and standard deviation 1; constant columns become 0."""
    centred_FP = features_FP - features_FP.mean(dim=0)
    deviation_P = centred_FP.square().mean(dim=0).sqrt()
    return torch.where(deviation_P > _SAME, centred_FP / deviation_P.clamp_min(_SAME), 0.0)
