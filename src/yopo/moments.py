"""Means and second moments of hidden units.

Shapes: F rows of an FFN, D model width, T tokens.

A hidden unit is an input of the contract matrix. All that selection and restoring need of the units
are means and second moments over tokens, so states are summed up as they come and never stored.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from yopo.adapters import Ffn
from yopo.errors import UnsupportedModelError
from yopo.watching import Watch, eager_experts, without_head
from yopo.writing import with_progress

_BATCH = 16


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Hold what is known of the hidden units of one FFN.

    Attributes:
        second_FF: Mean of hᵀh over tokens, float64.
        mean_F: Mean of h over tokens, float64.
        tokens: How many tokens were seen, or imagined; 0 where no token of a text comes by.
    """

    second_FF: Tensor
    mean_F: Tensor
    tokens: int

    def covariance(self) -> Tensor:
        """Return the covariance of h, `(F, F)` in float64."""
        return self.second_FF - torch.outer(self.mean_F, self.mean_F)

    def behind(self, bias_D: Tensor | None) -> Tensor:
        """Return what counts of the moments in front of a bias, `(F, F)` in float64.

        A bias absorbs means, so behind one it is the covariance; else the second moments.
        """
        return self.second_FF if bias_D is None else self.covariance()


def read_moments(
    model: nn.Module, ffns: Sequence[Ffn], inputs: dict[str, Tensor]
) -> dict[str, Moments]:
    """Run `model` on `inputs` and return the moments of the hidden units of `ffns`, by name.

    Args:
        model: The model that holds `ffns`.
        ffns: FFNs whose moments fit into memory together: F² numbers each.
        inputs: Keyword arguments of the model, batch first.

    Raises:
        UnsupportedModelError: If hidden units are NaN or infinite.
    """
    sums = {ffn.name: MomentSums.zeros(ffn) for ffn in ffns}
    watched = [(ffn.contract_weight(), ffn.contract.expert, sums[ffn.name].add) for ffn in ffns]
    model = without_head(model, [ffn.path for ffn in ffns])
    device = next(model.parameters()).device
    rows = len(next(iter(inputs.values())))
    training = model.training
    try:
        model.eval()
        with eager_experts(model), torch.no_grad(), Watch(watched):
            for start in with_progress(range(0, rows, _BATCH), "read"):
                batch = {key: value[start : start + _BATCH] for key, value in inputs.items()}
                model(**{key: value.to(device) for key, value in batch.items()}, use_cache=False)
    finally:
        model.train(training)
    found = {name: total.moments() for name, total in sums.items()}
    for name, moments in found.items():
        if not torch.isfinite(moments.second_FF.diagonal()).all():
            raise UnsupportedModelError(
                f"the hidden units of `{name}` are NaN or infinite on this text, so it cannot "
                "serve as evidence. Load the model in a wider `dtype`, or use `evidence='weights'`."
            )
    return found


class MomentSums:
    """Sum up hidden units and their products.

    Units are taken around the mean of the first batch, so that products in float32 hold the
    variance also of a unit whose mean is a thousand times larger.
    """

    def __init__(self, second_FF: Tensor, first_F: Tensor) -> None:
        """Start from sums that are all zero, float64."""
        self.second_FF, self.first_F, self.tokens = second_FF, first_F, 0
        self.centre_F = first_F.float()

    @classmethod
    def zeros(cls, ffn: Ffn) -> Self:
        """Return empty sums for the hidden units of `ffn`, where its weights lie."""
        device = ffn.device
        first_F = torch.zeros(ffn.rows, dtype=torch.float64, device=device)
        return cls(first_F.new_zeros(ffn.rows, ffn.rows), first_F)

    def add(self, hidden_TF: Tensor) -> None:
        """Add hidden units `(…, F)` of any dtype."""
        hidden_TF = hidden_TF.detach().reshape(-1, hidden_TF.shape[-1]).float()
        if self.tokens == 0 and len(hidden_TF):
            self.centre_F = hidden_TF.mean(dim=0)
        hidden_TF = hidden_TF - self.centre_F
        self.second_FF += hidden_TF.T @ hidden_TF
        self.first_F += hidden_TF.sum(dim=0, dtype=torch.float64)
        self.tokens += len(hidden_TF)

    def moments(self) -> Moments:
        """Return the moments; the sums are used up."""
        count, centre_F = max(self.tokens, 1), self.centre_F.double()
        mean_F = self.first_F / count
        second_FF = self.second_FF.div_(count)
        second_FF.addr_(mean_F + centre_F, centre_F).addr_(centre_F, mean_F)
        return Moments(second_FF, mean_F + centre_F, self.tokens)
