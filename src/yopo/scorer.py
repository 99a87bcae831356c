"""The published network from rows to log-odds of keeping.

Shapes: F rows of the scored matrix, D its columns, N hidden units of the network.

PruneNet's scorer is a linear map D → N, a linear map N → 1 and a sigmoid. Nothing non-linear lies
between the maps, so the log-odds of row w are w · v + c with v = Aᵀs and c = b · s: one vector and
one scalar, whatever N is. Training moves A, b and s, whose AdamW steps v and c alone would not
repeat; scoring, and the saved policy, need only v and c.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from yopo.sampling import uniform_noise


class PruneNetScorer(nn.Module):
    """Score rows of width D as published (arXiv 2501.15296), at the cost of two products.

    Args:
        columns: D, the width of the scored matrices.
        hidden: N; the reference uses the number of rows.
        generator: Source of the initial values, distributed as the reference's.
    """

    def __init__(self, columns: int, hidden: int, *, generator: torch.Generator) -> None:
        """Draw A and b as `nn.Linear` does, and s uniform in [0, 1)."""
        super().__init__()
        bound = columns**-0.5

        def uniform(*shape: int) -> Tensor:
            return torch.rand(
                shape, generator=generator, device=generator.device, dtype=torch.float32
            )

        self.weight_ND = nn.Parameter(uniform(hidden, columns).mul_(2).sub_(1).mul_(bound))
        self.bias_N = nn.Parameter(uniform(hidden).mul_(2).sub_(1).mul_(bound))
        self.row_vector_N = nn.Parameter(uniform(hidden))

    def collapsed(self) -> tuple[Tensor, Tensor]:
        """Return v `(D,)` and c, differentiable."""
        return self.row_vector_N @ self.weight_ND, self.row_vector_N @ self.bias_N

    @torch.no_grad()
    def set_gradients(self, vector_D: Tensor, constant: Tensor) -> float:
        """Set the gradients of A, b and s to what those of v and c make them; return their norm.

        They are s ⊗ ∂v, s ∂c and A ∂v + b ∂c: written into the tensors that hold them, since
        memory that is as large as A and new in each step costs as much as the step.

        Args:
            vector_D: Gradient of v.
            constant: Gradient of c, a scalar.
        """
        for parameter in self.parameters():
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
        device = self.row_vector_N.device
        vector_D, constant = vector_D.to(device), constant.to(device)
        weight_ND, bias_N, row_vector_N = (parameter.grad for parameter in self.parameters())
        assert weight_ND is not None
        assert bias_N is not None
        assert row_vector_N is not None
        torch.outer(self.row_vector_N, vector_D, out=weight_ND)
        torch.mul(self.row_vector_N, constant, out=bias_N)
        torch.addmv(self.bias_N * constant, self.weight_ND, vector_D, out=row_vector_N)
        length = self.row_vector_N.norm()
        norms = [length * vector_D.norm(), length * constant, row_vector_N.norm()]
        return float(torch.stack(norms).norm())

    def forward(self, weight_FD: Tensor) -> Tensor:
        """Return the log-odds `(F,)` of keeping each row of `weight_FD`, on its device."""
        vector_D, constant = (value.to(weight_FD.device) for value in self.collapsed())
        return weight_FD @ vector_D + constant


def noisy_log_odds(
    log_odds_F: Tensor, uniform_F: Tensor | None = None, *, generator: torch.Generator | None = None
) -> Tensor:
    """Return log-odds with logistic noise, log(e) - log(1 - e) for e uniform in (0, 1).

    The reference's keep probabilities are their sigmoid (the reparameterised Bernoulli of
    Maddison et al. 2017). Staying with log-odds avoids its log(0).

    Args:
        log_odds_F: Log-odds of keeping.
        uniform_F: The noise e; drawn from `generator` if absent.
        generator: Source of the noise.
    """
    if uniform_F is None:
        assert generator is not None
        uniform_F = uniform_noise(log_odds_F.shape, generator=generator)
    uniform_F = uniform_F.to(log_odds_F.device)
    return log_odds_F + torch.logit(uniform_F).to(log_odds_F.dtype)


def kl_to_fair_coin(log_odds_F: Tensor) -> Tensor:
    """Return the published regulariser, summed over rows.

    With α = sigmoid(log-odds) it is Σ -(1 - α) log α - α log(1 - α) + log ½, the reference's
    `calculate_KLD`. Differs from KL(Bernoulli(α) ‖ Bernoulli(½)) in sign and in which probability
    weighs which logarithm; it is least at α = ½ all the same.
    """
    keep_F = torch.sigmoid(log_odds_F)
    log_keep_F, log_drop_F = logsigmoid(log_odds_F), logsigmoid(-log_odds_F)
    return (-(1 - keep_F) * log_keep_F - keep_F * log_drop_F + math.log(0.5)).sum()
