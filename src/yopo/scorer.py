"""The published network from rows to log-odds of keeping, and how it moves.

Shapes: F rows of the scored matrix, D its columns, E = D + 1, N hidden units of the network.

PruneNet's scorer is a linear map D → N, a linear map N → 1 and a sigmoid. Nothing non-linear lies
between the maps, so the log-odds of row w are w · v + c with v = Aᵀs and c = b · s: one vector and
one scalar, whatever N is. Training moves A, b and s, whose AdamW steps v and c alone would not
repeat; scoring, and the saved policy, need only v and c.

AdamW moves each number by itself. So A and b are held as one matrix [A b], v and c as one vector,
and hidden units are moved in blocks, by all threads and ranks; only v and c are told around. The
gradient s ⊗ ∂v of A is as large as A: it is made for one block at a time.
"""

import math
from collections.abc import Sequence
from functools import partial, reduce

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, pad

from yopo.parallel import map_on_threads
from yopo.ranks import gather_vectors, own, rank_and_count
from yopo.sampling import uniform_noise

_UNITS, _UNITS_OF_ACCELERATOR = 512, 4096
"""Hidden units of a block: few enough to stay near a core, enough to fill an accelerator."""

_CHUNK = 1024
"""Rows that are widened at a time."""


class HiddenUnits:
    """Hold some hidden units of a scorer, and the optimiser that moves them.

    Args:
        weight_NE: Their rows of [A b].
        row_vector_N: Their entries of s.
        learning_rate: AdamW's.
    """

    def __init__(self, weight_NE: Tensor, row_vector_N: Tensor, *, learning_rate: float) -> None:
        """Make them trainable."""
        self.weight_NE = nn.Parameter(weight_NE)
        self.row_vector_N = nn.Parameter(row_vector_N)
        parameters = [self.weight_NE, self.row_vector_N]
        self._optimizer = torch.optim.AdamW(parameters, lr=learning_rate, fused=True)

    @torch.no_grad()
    def collapsed(self) -> Tensor:
        """Return their part of v and c, `(E,)`."""
        return self.row_vector_N @ self.weight_NE

    @torch.no_grad()
    def set_gradients(self, gradient_E: Tensor) -> Tensor:
        """Set their gradients to what one of v and c makes them; return the squared norm.

        Args:
            gradient_E: That of v and c, on whatever device the scored rows are.
        """
        gradient_E = gradient_E.to(self.weight_NE.device)
        self.weight_NE.grad = torch.outer(self.row_vector_N, gradient_E)
        self.row_vector_N.grad = self.weight_NE @ gradient_E
        norms = [self.row_vector_N.norm() * gradient_E.norm(), self.row_vector_N.grad.norm()]
        return torch.stack(norms).square().sum()

    def step(self, gradient_E: Tensor) -> Tensor:
        """Take a step of AdamW down a gradient of v and c.

        Returns:
            `(E + 1,)`: their part of v and c, and the squared norm of the gradients.
        """
        squared_norm = self.set_gradients(gradient_E)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return torch.cat([self.collapsed(), squared_norm[None]])


class PruneNetScorer:
    """Score rows of width D as published (arXiv 2501.15296), at the cost of one product.

    Where several ranks work together each holds some of the hidden units, and all know v and c.

    Args:
        columns: D, the width of the scored matrices.
        hidden: N; the reference uses the number of rows.
        generator: Source of the initial values, distributed as the reference's.
        learning_rate: AdamW's.
        device: Where the hidden units are.

    Attributes:
        units: The hidden units of this rank, in blocks.
        collapsed_E: v and c.
    """

    def __init__(
        self,
        columns: int,
        hidden: int,
        *,
        generator: torch.Generator,
        learning_rate: float,
        device: torch.device,
    ) -> None:
        """Draw A and b as `nn.Linear` does, and s uniform in [0, 1)."""
        bound = columns**-0.5

        def uniform(*shape: int) -> Tensor:
            return torch.rand(
                shape, generator=generator, device=generator.device, dtype=torch.float32
            )

        weight_ND = uniform(hidden, columns).mul_(2).sub_(1).mul_(bound)
        bias_N = uniform(hidden).mul_(2).sub_(1).mul_(bound)
        row_vector_N = uniform(hidden)
        size = _UNITS if device.type == "cpu" else _UNITS_OF_ACCELERATOR
        blocks = [slice(start, start + size) for start in range(0, hidden, size)]
        self._blocks, self._size, self._device = len(blocks), columns + 2, device
        self.units = [
            HiddenUnits(
                torch.cat([weight_ND[block], bias_N[block, None]], dim=1).to(device),
                row_vector_N[block].clone().to(device),
                learning_rate=learning_rate,
            )
            for block in own(blocks)
        ]
        parts = map_on_threads(HiddenUnits.collapsed, self.units)
        self.collapsed_E = self._sum([pad(part_E, (0, 1)) for part_E in parts])[:-1]

    def step(self, gradient_E: Tensor) -> float:
        """Take a step of AdamW down a gradient of v and c.

        Returns:
            The norm of the gradient of A, b and s.
        """
        found = self._sum(
            map_on_threads(partial(HiddenUnits.step, gradient_E=gradient_E), self.units)
        )
        self.collapsed_E = found[:-1]
        return float(found[-1].sqrt())

    def log_odds(self, weight_FD: Tensor) -> Tensor:
        """Return the log-odds `(F,)` of keeping each row of `weight_FD`, on its device."""
        vector_E = self.collapsed_E.to(weight_FD.device)
        vector_D, constant = vector_E[:-1], vector_E[-1]
        parts = map_on_threads(
            lambda part_FD: part_FD.float() @ vector_D, torch.split(weight_FD, _CHUNK)
        )
        return torch.cat(parts) + constant

    @staticmethod
    def gradient(weight_FD: Tensor, gradient_F: Tensor) -> Tensor:
        """Return the gradient `(E,)` of v and c, given that of the log-odds of some rows."""
        parts = map_on_threads(
            lambda pair: torch.cat([pair[0] @ pair[1].float(), pair[0].sum()[None]]),
            zip(torch.split(gradient_F, _CHUNK), torch.split(weight_FD, _CHUNK), strict=True),
        )
        return reduce(torch.add, parts)

    def _sum(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the sum of what all blocks give, in one order however many ranks there are."""
        found = gather_vectors(parts, pieces=self._blocks, size=self._size)
        return reduce(torch.add, found).to(self._device)


def scorer_bytes(columns: int, hidden: int) -> int:
    """Return how many bytes a rank's hidden units take, AdamW's two moments included."""
    return 3 * 4 * (columns + 1) * -(-hidden // rank_and_count()[1])


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
