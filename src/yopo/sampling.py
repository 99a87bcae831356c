"""From log-odds of keeping to kept rows: drawn without replacement, or the best.

Shapes: F rows, K kept rows, M draws.

Drawing K of F rows without replacement, each time with probability proportional to exp(logit)
among those left, is the Plackett-Luce distribution. Adding Gumbel noise to the logits and taking
the K largest draws from it exactly (Yellott 1977; Kool et al. 2019, "Stochastic Beams"), on any
device, without the underflow that probabilities have.
"""

import torch
from torch import Tensor


def draw_rows(logits_F: Tensor, *, keep: int, draws: int, generator: torch.Generator) -> Tensor:
    """Draw rows `(M, K)` without replacement, in the order in which they were drawn.

    Args:
        logits_F: Log-weights of the rows.
        keep: How many rows to draw, K in [1, F].
        draws: How many independent draws, M.
        generator: Source of the noise, on any device.
    """
    uniform_MF = uniform_noise((draws, len(logits_F)), generator=generator)
    return rows_drawn_by(uniform_MF, logits_F, keep=keep)


def uniform_noise(shape: tuple[int, ...], *, generator: torch.Generator) -> Tensor:
    """Return noise uniform in (0, 1), float64, on the generator's device."""
    noise = torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64)
    return noise.clamp_min_(torch.finfo(torch.float64).tiny)


def rows_drawn_by(uniform_MF: Tensor, logits_F: Tensor, *, keep: int) -> Tensor:
    """Return the rows `(M, K)` that given noise, uniform in (0, 1), draws without replacement.

    Args:
        uniform_MF: The noise of each draw.
        logits_F: Log-weights of the rows.
        keep: How many rows to draw, K in [1, F].
    """
    gumbel_MF = -torch.log(-torch.log(uniform_MF)).to(logits_F.device)
    return (logits_F.detach().double() + gumbel_MF).topk(keep, dim=1).indices


def best_rows(logits_F: Tensor, *, keep: int) -> Tensor:
    """Return the `keep` rows of largest logit, ascending; of equal ones those that come first."""
    order_F = logits_F.detach().argsort(descending=True, stable=True)
    return order_F[:keep].sort().values


def draw_log_probability(logits_F: Tensor, drawn_MK: Tensor) -> Tensor:
    """Return the log-probability `(M,)` of having drawn exactly these rows in this order.

    The i-th factor is exp(logit of the i-th row) over the sum of exp(logit) of all rows not drawn
    before it (Plackett 1975). Differentiable in `logits_F`.
    """
    drawn_logits_MK = logits_F[drawn_MK]
    rest_MF = torch.ones(len(drawn_MK), len(logits_F), dtype=torch.bool, device=logits_F.device)
    rest_MF.scatter_(1, drawn_MK, False)
    rest_M1 = logits_F.expand_as(rest_MF).masked_fill(~rest_MF, -torch.inf)
    rest_M1 = rest_M1.logsumexp(dim=1, keepdim=True)
    from_last = torch.cat([rest_M1, drawn_logits_MK.flip(1)], dim=1).logcumsumexp(dim=1)
    return (drawn_logits_MK - from_last[:, 1:].flip(1)).sum(dim=1)
