"""What an episode earns for the rows that it keeps.

Shapes: L FFNs, F rows, D model width, M draws, K kept rows.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from yopo.adapters import Ffn
from yopo.memory import room_on_disk
from yopo.moments import Moments
from yopo.ranks import gather, own
from yopo.spectrum import spectra_of, spectral_distances

Reward = Callable[[Mapping[str, Tensor]], Tensor]
"""From draws of kept rows `(M, K)`, by FFN, to what they earn: `(M,)`, or `(L, M)` by FFN."""

PERFECT = 99999.0
"""The published reward where the two spectra do not differ at all."""


def spectral_rewards(ffns: Sequence[Ffn]) -> Reward:
    """Return what earns the published reward, each FFN its own.

    Where several ranks work together, each looks at its own FFNs.
    """
    spectra = spectra_of([ffn.gate for ffn in own(ffns)], room=room_on_disk(ffns))

    def reward(kept: Mapping[str, Tensor]) -> Tensor:
        found_LM = spectral_distances(spectra, own(list(kept.values())))
        return spectral_reward(torch.stack(gather(list(found_LM))))

    return reward


def output_rewards(ffns: Sequence[Ffn], moments: Mapping[str, Moments]) -> Reward:
    """Return what earns -log of the output error after restoring, each FFN its own.

    Where several ranks work together, each looks at its own FFNs.

    Args:
        ffns: All that rows are drawn of.
        moments: What is known of this rank's own, by name.
    """
    parts = {
        ffn.name: (moments[ffn.name].behind(ffn.contract_bias()), ffn.contract_weight())
        for ffn in own(ffns)
    }

    def reward(kept: Mapping[str, Tensor]) -> Tensor:
        found = [output_reward(*part, kept[name]).cpu() for name, part in parts.items()]
        return torch.stack(gather(found))

    return reward


def spectral_reward(ks: Tensor) -> Tensor:
    """Return the published reward of Kolmogorov-Smirnov distances, of any shape.

    The reward is 1 / KS, with KS in [0, 1] the distance between the singular values of the matrix
    and of its kept rows (arXiv 2501.15296, eq. 4), and 99999 at KS 0.
    """
    return torch.where(ks > 0, 1.0 / ks, PERFECT)


def output_reward(second_FF: Tensor, contract_FD: Tensor, kept_MK: Tensor) -> Tensor:
    """Return -log of the FFN's output error after restoring, `(M,)` in float64.

    The error is the mean squared change of the output, as a share of its mean square, once the
    contract matrix has been re-solved for the kept rows: tr WᵀSW / tr WᵀHW over the dropped rows,
    with S = H_CC - H_CK (H_KK)⁻¹ H_KC the Schur complement of the second moments H.

    Args:
        second_FF: Second moments of the hidden units, float64.
        contract_FD: Columns of the contract matrix.
        kept_MK: Kept rows of each draw.
    """
    weights_FD = contract_FD.to(second_FF.dtype)
    total = (weights_FD * (second_FF @ weights_FD)).sum().clamp_min(1e-300)
    errors = []
    for kept_K in kept_MK:
        dropped_F = torch.ones(len(second_FF), dtype=torch.bool, device=second_FF.device)
        dropped_F[kept_K] = False
        damped_KK = second_FF[kept_K][:, kept_K]
        damped_KK.diagonal().add_(1e-3 * damped_KK.diagonal().mean().clamp_min(1e-30))
        part_CD = weights_FD[dropped_F]
        known_KD = torch.linalg.solve_triangular(
            torch.linalg.cholesky(damped_KK), second_FF[kept_K][:, dropped_F] @ part_CD, upper=False
        )
        own = (part_CD * (second_FF[dropped_F][:, dropped_F] @ part_CD)).sum()
        errors.append((own - known_KD.square().sum()) / total)
    return -torch.stack(errors).clamp_min(1e-12).log()


def discounted(rewards: Tensor, discount: float) -> Tensor:
    """Return layer rewards `(L, …)` times γ^layer, as the reference weighs them.

    Differs from the paper: its text gives later layers a stronger incentive, its code a weaker one.
    """
    exponents = torch.arange(len(rewards), dtype=rewards.dtype, device=rewards.device)
    return rewards * (discount**exponents).view(-1, *[1] * (rewards.dim() - 1))
