"""Episodes of policy gradient: draw rows, see what they earn, make the better draws likelier.

Shapes: L layers, F rows, D columns, K kept rows, M draws, P features.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from yopo.adapters import Ffn
from yopo.elimination import ffn_elimination_order
from yopo.features import row_features
from yopo.moments import Moments
from yopo.policy import Policy, Recipe
from yopo.reward import discounted, output_reward, spectral_reward
from yopo.sampling import best_rows, draw_log_probability, draw_rows
from yopo.scorer import PruneNetScorer, kl_to_fair_coin, noisy_log_odds
from yopo.spectrum import Spectrum

_Earn = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From kept rows `(M, K)` to rewards and distances, each `(M,)`."""


@dataclass(frozen=True, slots=True)
class Episode:
    """Record one episode; every tuple has one entry a layer.

    Attributes:
        number: Counted from 0.
        loss: The policy-gradient loss.
        reward: What the draws earned on average, before the discount.
        ks: Kolmogorov-Smirnov distance of the draws on average, in [0, 1].
        gradient_norm: Euclidean norm of the loss's gradient, before clipping.
        best_ks: The distance of the rows that the policy prefers, no draw; empty where the method
            never looks.
    """

    number: int
    loss: tuple[float, ...]
    reward: tuple[float, ...]
    ks: tuple[float, ...]
    gradient_norm: tuple[float, ...]
    best_ks: tuple[float, ...] = ()


@torch.inference_mode(False)  # gradients, whatever mode the caller is in
def learn(
    ffns: Sequence[Ffn],
    recipe: Recipe,
    widths: dict[str, int],
    moments: Mapping[str, Moments] | None = None,
) -> Iterator[tuple[Episode, Policy]]:
    """Train a policy on features of the rows, and yield it after each episode.

    Each episode draws M sets of rows a layer, without replacement. Their advantage is the reward
    minus the mean reward of the layer's other draws, in units of their spread; the loss is minus
    the advantage times the exact log-probability of the draw. Gradients are clipped to norm 1
    before AdamW moves. What is yielded is the policy whose preferred rows were best so far (by
    mean distance with the spectral reward, by mean reward otherwise), so it never falls below the
    start.

    Args:
        ffns: The FFNs to learn on.
        recipe: Hyperparameters.
        widths: How many rows each FFN keeps, by name.
        moments: The hidden units of each FFN by name, which the output reward needs.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    layers = [_prepared(ffn, None if moments is None else moments[ffn.name]) for ffn in ffns]
    weights_P = nn.Parameter(Policy.at_start(recipe).tensors["weights_P"].clone())
    optimizer = torch.optim.AdamW([weights_P], lr=recipe.learning_rate, weight_decay=0.0)
    best = (float("inf"), weights_P.detach().clone())
    for number in range(recipe.episodes):
        trials = []
        gradient_P = torch.zeros_like(weights_P)
        for depth, (ffn, (features_FP, earn)) in enumerate(zip(ffns, layers, strict=True)):
            logits_F = features_FP @ weights_P.to(features_FP.device)
            weight = recipe.discount**depth
            trial = _try(logits_F, earn, widths[ffn.name], recipe.samples, weight, generator)
            (layer_gradient_P,) = torch.autograd.grad(trial.loss, weights_P)
            gradient_P += layer_gradient_P / len(layers)
            trials.append((trial, float(layer_gradient_P.norm())))
        missed = [
            float(trial.ks_M[-1] if moments is None else -trial.reward_M[-1]) for trial, _ in trials
        ]
        best = min(best, (sum(missed), weights_P.detach().clone()), key=lambda pair: pair[0])
        weights_P.grad = gradient_P
        nn.utils.clip_grad_norm_([weights_P], 1.0)
        optimizer.step()
        episode = Episode(
            number=number,
            loss=tuple(trial.loss.item() for trial, _ in trials),
            reward=tuple(trial.reward_M[:-1].mean().item() for trial, _ in trials),
            ks=tuple(trial.ks_M[:-1].mean().item() for trial, _ in trials),
            gradient_norm=tuple(norm for _, norm in trials),
            best_ks=tuple(trial.ks_M[-1].item() for trial, _ in trials),
        )
        yield episode, Policy(recipe, {"weights_P": best[1]})


@dataclass(frozen=True, slots=True, eq=False)
class _Trial:
    """What M draws and, last, the preferred rows of one layer earned."""

    loss: Tensor
    reward_M: Tensor
    ks_M: Tensor


def _try(
    logits_F: Tensor,
    earn: _Earn,
    keep: int,
    samples: int,
    weight: float,
    generator: torch.Generator,
) -> _Trial:
    """Draw rows of one layer, see what they earn, and return the loss that reinforces them."""
    drawn_MK = draw_rows(logits_F, keep=keep, draws=samples, generator=generator)
    tried_MK = torch.cat([drawn_MK.sort().values, best_rows(logits_F, keep=keep)[None]])
    reward_M, ks_M = earn(tried_MK)
    advantage_M = weight * leave_one_out(reward_M[:-1]).to(logits_F.dtype)
    loss = -(advantage_M * draw_log_probability(logits_F, drawn_MK)).mean()
    return _Trial(loss, reward_M, ks_M)


def _prepared(ffn: Ffn, moments: Moments | None) -> tuple[Tensor, _Earn]:
    """Return the features of the rows of one layer, and what tells rewards and distances."""
    spectrum = Spectrum.of(ffn.expand_weights()[0])
    if moments is None:
        return row_features(ffn), partial(spectral_reward, spectrum)
    second_FF = moments.behind(ffn.contract_bias())
    contract_FD = ffn.contract_weight()

    def earn(kept_MK: Tensor) -> tuple[Tensor, Tensor]:
        return output_reward(second_FF, contract_FD, kept_MK), spectral_reward(spectrum, kept_MK)[1]

    return row_features(ffn, ffn_elimination_order(ffn, moments)), earn


@torch.inference_mode(False)
def learn_as_published(
    ffns: Sequence[Ffn], recipe: Recipe, widths: dict[str, int]
) -> Iterator[tuple[Episode, Policy]]:
    """Train PruneNet's policy as its reference code does, and yield it after each episode.

    The reference is LCS2-IIITD/PruneNet, experiments/prunenet.py.

    Kept on purpose: one draw an episode, no baseline, the sum of log keep probabilities instead of
    the log-probability of the draw, other noise in the loss than in the draw, one AdamW step a
    layer, no clipping that acts, and the last policy rather than the best. Left out because it
    changes nothing but the cost: the copies of the model, the singular vectors, the product with a
    matrix of rank one. Log-odds replace probabilities, so that log(0) cannot happen.
    """
    device = ffns[0].contract.parameter.device
    generator = torch.Generator().manual_seed(recipe.seed)
    weights = [ffn.expand_weights()[0] for ffn in ffns]
    spectra = [Spectrum.of(weight_FD) for weight_FD in weights]
    scorer = PruneNetScorer(weights[0].shape[1], weights[0].shape[0], generator=generator)
    scorer.to(device)
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=recipe.learning_rate)
    for number in range(recipe.episodes):
        kept, earned, distances = [], [], []
        for ffn, weight_FD, spectrum in zip(ffns, weights, spectra, strict=True):
            with torch.no_grad():
                noisy_F = noisy_log_odds(scorer(weight_FD.float()), generator=generator)
            drawn_1K = draw_rows(
                logsigmoid(noisy_F), keep=widths[ffn.name], draws=1, generator=generator
            )
            reward_1, ks_1 = spectral_reward(spectrum, drawn_1K.sort().values)
            kept.append(drawn_1K[0])
            earned.append(reward_1[0].cpu())  # layers may lie on different devices
            distances.append(float(ks_1))
        returns_L = discounted(torch.stack(earned), recipe.discount)
        losses, norms = [], []
        for weight_FD, kept_K, value in zip(weights, kept, returns_L.tolist(), strict=True):
            log_odds_F = scorer(weight_FD.float())
            log_keep_F = logsigmoid(noisy_log_odds(log_odds_F, generator=generator))
            loss = -log_keep_F[kept_K].sum() * value
            losses.append(loss.item())
            if recipe.kl:
                loss = loss + kl_to_fair_coin(log_odds_F)
            optimizer.zero_grad()
            loss.backward()
            norms.append(float(nn.utils.get_total_norm(_gradients(scorer))))
            optimizer.step()
        rewards = [float(reward) for reward in earned]
        vector_D, constant = (value.detach().clone() for value in scorer.collapsed())
        episode = Episode(number, *map(tuple, (losses, rewards, distances, norms)))
        yield episode, Policy(recipe, {"vector_D": vector_D, "constant": constant})


def leave_one_out(reward_M: Tensor) -> Tensor:
    """Return advantages `(M,)`: rewards minus the mean of the others, divided by their spread.

    The baseline of a draw does not depend on it, so it leaves the gradient unbiased (Kool et al.
    2019, "Buy 4 REINFORCE samples, get a baseline for free!"). The spread makes the step
    independent of the reward's unit; a draw has a part in it, a bias that fades as draws get many.
    """
    count = len(reward_M)
    advantage_M = (reward_M - reward_M.mean()) * count / (count - 1)
    return advantage_M / reward_M.std().clamp_min(1e-12)


def _gradients(module: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
