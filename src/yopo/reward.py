"""What an episode earns for the rows that it keeps.

Shapes: M draws, K kept rows.
"""

import torch
from torch import Tensor

from yopo.spectrum import Spectrum, ks_distance

PERFECT = 99999.0
"""The published reward where the two spectra do not differ at all."""


def spectral_reward(spectrum: Spectrum, kept_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Return the published reward and the distance behind it, each `(M,)` in float64.

    The reward is 1 / KS, with KS in [0, 1] the Kolmogorov-Smirnov distance between the singular
    values of the matrix and of its kept rows (arXiv 2501.15296, eq. 4), and 99999 at KS 0.
    """
    ks_M = ks_distance(spectrum.singular_values_S, spectrum.of_rows(kept_MK))
    return torch.where(ks_M > 0, 1.0 / ks_M, PERFECT), ks_M


def discounted(rewards: Tensor, discount: float) -> Tensor:
    """Return layer rewards `(L, …)` times γ^layer, as the reference weighs them.

    Differs from the paper: its text gives later layers a stronger incentive, its code a weaker one.
    """
    exponents = torch.arange(len(rewards), dtype=rewards.dtype, device=rewards.device)
    return rewards * (discount**exponents).view(-1, *[1] * (rewards.dim() - 1))
