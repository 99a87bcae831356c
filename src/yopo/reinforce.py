"""Episodes of policy gradient: draw, see what the drawn rows earn, make the better draws likelier.

Shapes: L layers, F rows, D columns, K kept rows, M draws, P features.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from yopo.adapters import Ffn
from yopo.errors import InvalidArgumentError
from yopo.features import row_features
from yopo.parallel import map_on_threads, on_one_thread
from yopo.policy import Policy, Recipe
from yopo.ranks import gather, own
from yopo.reward import PERFECT, Reward
from yopo.sampling import best_rows, draw_log_probability, draw_rows

_SPREAD = 0.5
"""Standard deviation of the weights of policies that are drawn, around the present ones."""


@dataclass(frozen=True, slots=True)
class Episode:
    """Record one episode; every tuple has one entry a layer.

    Where policies are drawn, not rows, loss and gradient norm are the same in every layer.

    Attributes:
        number: Counted from 0.
        loss: The policy-gradient loss.
        reward: What the draws earned on average, before the discount.
        gradient_norm: Euclidean norm of the loss's gradient, before clipping.
        ks: Kolmogorov-Smirnov distance of the draws on average, in [0, 1]; empty where another
            reward is learned.
        best_ks: The distance of the rows that the policy prefers, no draw; empty where the method
            never looks.
    """

    number: int
    loss: tuple[float, ...]
    reward: tuple[float, ...]
    gradient_norm: tuple[float, ...]
    ks: tuple[float, ...] = ()
    best_ks: tuple[float, ...] = ()


@torch.inference_mode(False)  # gradients, whatever mode the caller is in
def learn(
    ffns: Sequence[Ffn], recipe: Recipe, widths: Mapping[str, int], reward: Reward
) -> Iterator[tuple[Episode, Policy]]:
    """Train a policy on features of the rows by drawing rows, and yield it after each episode.

    Each episode draws M sets of rows a layer, without replacement. Their advantage is the reward
    minus the mean reward of the layer's other draws, in units of their spread; the loss is minus
    the advantage times the exact log-probability of the draw. Gradients are clipped to norm 1
    before AdamW moves. What is yielded is the policy whose preferred rows had the least mean
    distance so far, so it never falls below the start.

    Args:
        ffns: The FFNs to learn on.
        recipe: Hyperparameters.
        widths: How many rows each FFN keeps, by name.
        reward: Tells what draws earn in each FFN: the inverse of a distance.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    features = gather(map_on_threads(_loaded_features, own(ffns)))
    layers = [(found, widths[ffn.name]) for found, ffn in zip(features, ffns, strict=True)]
    weights_P = nn.Parameter(Policy.at_start(recipe).tensors["weights_P"].clone())
    optimizer = torch.optim.AdamW([weights_P], lr=recipe.learning_rate, weight_decay=0.0)
    best = (float("inf"), weights_P.detach().clone())

    def earned(*drawn: list[Tensor]) -> Tensor:
        """Return what draws `(M, K)` of all FFNs earn, `(L, M)`, the preferred rows last."""
        nonlocal best
        together = [torch.cat(draws).sort().values for draws in zip(*drawn, strict=True)]
        kept = {ffn.name: kept_MK for ffn, kept_MK in zip(ffns, together, strict=True)}
        reward_LM = _checked(reward(kept), layers=len(ffns), draws=len(together[0]))
        ks = float(_distances(reward_LM[:, -1]).sum())
        best = min(best, (ks, weights_P.detach().clone()), key=lambda pair: pair[0])
        return reward_LM

    for number in range(recipe.episodes):
        logits = [features_FP @ weights_P.to(features_FP.device) for features_FP, _ in layers]
        drawn = [
            draw_rows(logits_F, keep=keep, draws=recipe.samples, generator=generator)
            for logits_F, (_, keep) in zip(logits, layers, strict=True)
        ]
        reward_LM = earned(drawn, _preferred(weights_P, layers))
        losses, gradient_LP = on_one_thread(
            partial(_gradients_of, weights_P, logits, drawn, reward_LM, recipe.discount)
        )
        weights_P.grad = gradient_LP.mean(dim=0)
        nn.utils.clip_grad_norm_([weights_P], 1.0)
        optimizer.step()
        if number == recipe.episodes - 1:  # no later episode will look at the last step
            earned(_preferred(weights_P, layers))
        ks_LM = _distances(reward_LM)
        episode = Episode(
            number=number,
            loss=tuple(losses),
            reward=tuple(reward_LM[:, :-1].mean(dim=1).tolist()),
            gradient_norm=tuple(gradient_LP.norm(dim=1).tolist()),
            ks=tuple(ks_LM[:, :-1].mean(dim=1).tolist()),
            best_ks=tuple(ks_LM[:, -1].tolist()),
        )
        yield episode, Policy(recipe, {"weights_P": best[1]})


@torch.inference_mode(False)
def explore(
    ffns: Sequence[Ffn],
    recipe: Recipe,
    widths: Mapping[str, int],
    reward: Reward,
    orders: Mapping[str, Tensor],
) -> Iterator[tuple[Episode, Policy]]:
    """Train a policy on features of the rows by drawing policies, and yield it after each episode.

    One number for a whole model says little of each of thousands of drawn rows, but much of ten
    weights. So an episode draws M policies from a Gaussian around the present one, in opposite
    pairs, and each keeps the rows that it prefers: policy gradients with parameter-based
    exploration (Sehnke et al. 2010). Advantage, loss, clipping and AdamW are as in `learn`; a
    policy's reward is the mean over FFNs. What is yielded is the best policy of all that were
    tried, the start among them.

    Args:
        ffns: The FFNs to learn on.
        recipe: Hyperparameters.
        widths: How many rows each FFN keeps, by name.
        reward: Tells what kept rows earn.
        orders: The elimination order of each FFN by name.

    Raises:
        InvalidArgumentError: If `reward` returns anything but finite numbers, one for each draw.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    layers = [(row_features(ffn, orders[ffn.name]), widths[ffn.name]) for ffn in ffns]
    weights_P = nn.Parameter(Policy.at_start(recipe).tensors["weights_P"].clone())
    optimizer = torch.optim.AdamW([weights_P], lr=recipe.learning_rate, weight_decay=0.0)
    discount_L1 = recipe.discount ** torch.arange(len(ffns), device="cpu")[:, None]
    best = (-float("inf"), weights_P.detach().clone())
    for number in range(recipe.episodes):
        half_MP = _SPREAD * torch.randn(
            (recipe.samples + 1) // 2, len(weights_P), generator=generator, device="cpu"
        )
        noise_MP = torch.cat([half_MP, -half_MP])[: recipe.samples]
        tried_MP = torch.cat([weights_P.detach() + noise_MP, weights_P.detach()[None]])
        preferred = zip(*(_preferred(tried_P, layers) for tried_P in tried_MP), strict=True)
        kept = {
            f.name: torch.cat(rows).sort().values for f, rows in zip(ffns, preferred, strict=True)
        }
        reward_LM = _checked(reward(kept), layers=len(ffns), draws=len(tried_MP))
        return_M = (discount_L1 * reward_LM).mean(dim=0)
        most, at = return_M.max(dim=0)
        best = max(best, (float(most), tried_MP[at].clone()), key=lambda pair: pair[0])
        advantage_M = leave_one_out(return_M[:-1]).to(weights_P)
        log_p_M = -(tried_MP[:-1] - weights_P).square().sum(dim=1) / (2 * _SPREAD**2)
        loss = -(advantage_M * log_p_M).mean()
        (weights_P.grad,) = torch.autograd.grad(loss, weights_P)
        norm = float(nn.utils.clip_grad_norm_([weights_P], 1.0))
        optimizer.step()
        episode = Episode(
            number=number,
            loss=(loss.item(),) * len(ffns),
            reward=tuple(reward_LM[:, :-1].mean(dim=1).tolist()),
            gradient_norm=(norm,) * len(ffns),
        )
        yield episode, Policy(recipe, {"weights_P": best[1]})


def _loaded_features(ffn: Ffn) -> Tensor:
    with ffn.loaded():
        return row_features(ffn)


def _preferred(weights_P: Tensor, layers: Sequence[tuple[Tensor, int]]) -> list[Tensor]:
    """Return the rows `(1, K)` that a policy prefers in each FFN."""
    return [
        best_rows(features_FP @ weights_P.detach().to(features_FP.device), keep=keep)[None]
        for features_FP, keep in layers
    ]


def _gradients_of(
    weights_P: Tensor,
    logits: Sequence[Tensor],
    drawn: Sequence[Tensor],
    reward_LM: Tensor,
    discount: float,
) -> tuple[list[float], Tensor]:
    """Return the loss of each FFN, and its gradient `(L, P)`."""
    losses: list[float] = []
    gradients: list[Tensor] = []
    for depth, (logits_F, drawn_MK) in enumerate(zip(logits, drawn, strict=True)):
        log_p_M = draw_log_probability(logits_F, drawn_MK)
        advantage_M = discount**depth * leave_one_out(reward_LM[depth, : len(drawn_MK)])
        loss = -(advantage_M.to(log_p_M) * log_p_M).mean()
        gradients += torch.autograd.grad(loss, weights_P)
        losses.append(loss.item())
    return losses, torch.stack(gradients)


def _checked(reward: object, *, layers: int, draws: int) -> Tensor:
    """Return what a reward function has returned as float64 `(L, M)`."""
    shapes = ((draws,), (layers, draws))
    if not isinstance(reward, Tensor) or reward.shape not in shapes or not reward.isfinite().all():
        raise InvalidArgumentError(
            f"`reward` must return finite numbers, a tensor of shape ({draws},), or ({layers}, "
            f"{draws}) for the draws of each FFN, got {reward!r}."
        )
    return reward.detach().double().cpu().expand(layers, draws)


def _distances(reward: Tensor) -> Tensor:
    """Return the distances behind spectral rewards."""
    return torch.where(reward == PERFECT, 0.0, 1.0 / reward)


def leave_one_out(reward_M: Tensor) -> Tensor:
    """Return advantages `(M,)`: rewards minus the mean of the others, divided by their spread.

    The baseline of a draw does not depend on it, so it leaves the gradient unbiased (Kool et al.
    2019, "Buy 4 REINFORCE samples, get a baseline for free!"). The spread makes the step
    independent of the reward's unit; a draw has a part in it, a bias that fades as draws get many.
    """
    count = len(reward_M)
    advantage_M = (reward_M - reward_M.mean()) * count / (count - 1)
    return advantage_M / reward_M.std().clamp_min(1e-12)
