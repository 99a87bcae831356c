"""PruneNet's training as its reference code does it (LCS2-IIITD/PruneNet, experiments/prunenet.py).

Shapes: L layers, F rows, D columns, K kept rows.

Kept on purpose: one draw an episode, no baseline, the sum of log keep probabilities instead of the
log-probability of the draw, other noise in the loss than in the draw, one AdamW step a layer, no
clipping that acts, and the last policy rather than the best. Left out because it changes nothing
but the cost: the copies of the model, the singular vectors, the product with a matrix of rank one.
Log-odds replace probabilities, so that log(0) cannot happen.

The draws of an episode depend on nothing that the episode learns, so all layers are drawn and
measured at once, on all threads and ranks. The steps that follow are one after another, each of
them shared out by the scorer.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from yopo.adapters import Ffn
from yopo.memory import given_back_at_once, room_on_disk
from yopo.parallel import map_on_threads, on_one_thread
from yopo.policy import Policy, Recipe
from yopo.ranks import gather, own
from yopo.reinforce import Episode
from yopo.reward import discounted, spectral_reward
from yopo.sampling import rows_drawn_by, uniform_noise
from yopo.scorer import PruneNetScorer, kl_to_fair_coin, noisy_log_odds, scorer_bytes
from yopo.spectrum import spectra_of, spectral_distances


@torch.inference_mode(False)  # gradients, whatever mode the caller is in
def learn_as_published(
    ffns: Sequence[Ffn], recipe: Recipe, widths: Mapping[str, int]
) -> Iterator[tuple[Episode, Policy]]:
    """Train PruneNet's policy, and yield it after each episode.

    Args:
        ffns: The FFNs to learn on; the first expand matrix of each is scored and measured.
        recipe: Hyperparameters.
        widths: How many rows each FFN keeps, by name.
    """
    with given_back_at_once() if ffns[0].is_on_disk else nullcontext():
        yield from _episodes(ffns, recipe, widths)


def _episodes(
    ffns: Sequence[Ffn], recipe: Recipe, widths: Mapping[str, int]
) -> Iterator[tuple[Episode, Policy]]:
    generator = torch.Generator().manual_seed(recipe.seed)
    columns, hidden = ffns[0].expand_weights()[0].shape[1], ffns[0].rows
    room = room_on_disk(ffns, taken=scorer_bytes(columns, hidden))
    spectra = spectra_of([ffn.gate for ffn in own(ffns)], room=room)
    scorer = PruneNetScorer(
        columns,
        hidden,
        generator=generator,
        learning_rate=recipe.learning_rate,
        device=ffns[0].device,
    )
    for number in range(recipe.episodes):
        # Every rank draws the noise of every layer, so that all generators stay abreast.
        noise = [uniform_noise((2, ffn.rows), generator=generator) for ffn in ffns]
        draws = [
            (ffn, widths[ffn.name], noise_2F) for ffn, noise_2F in zip(ffns, noise, strict=True)
        ]
        mine = map_on_threads(partial(_draw, scorer), own(draws))
        ks_mine = spectral_distances(spectra, [kept_K[None] for kept_K in mine])
        found = gather([(kept_K.cpu(), ks_1) for kept_K, ks_1 in zip(mine, ks_mine, strict=True)])
        drawn, ks = zip(*found, strict=True)
        ks_L = torch.cat(ks)
        reward_L = spectral_reward(ks_L)
        noise = [uniform_noise((ffn.rows,), generator=generator) for ffn in ffns]
        returns = discounted(reward_L, recipe.discount).tolist()
        losses, norms = [], []
        for ffn, kept_K, noise_F, value in zip(ffns, drawn, noise, returns, strict=True):
            with ffn.gate() as gate_FD:
                log_odds_F = scorer.log_odds(gate_FD)
                loss, gradient_F = on_one_thread(
                    partial(_gradient, log_odds_F, kept_K, noise_F, value, kl=recipe.kl)
                )
                gradient_E = scorer.gradient(gate_FD, gradient_F)
            losses.append(loss)
            norms.append(scorer.step(gradient_E))
        vector_D, constant = scorer.collapsed_E[:-1].clone(), scorer.collapsed_E[-1].clone()
        episode = Episode(
            number, tuple(losses), tuple(reward_L.tolist()), tuple(norms), tuple(ks_L.tolist())
        )
        yield episode, Policy(recipe, {"vector_D": vector_D, "constant": constant})


@torch.no_grad()
def _draw(scorer: PruneNetScorer, draw: tuple[Ffn, int, Tensor]) -> Tensor:
    """Return the rows `(K,)` that the policy draws, ascending."""
    ffn, keep, (keep_noise_F, draw_noise_F) = draw
    with ffn.gate() as gate_FD:
        noisy_F = noisy_log_odds(scorer.log_odds(gate_FD), keep_noise_F)
    return rows_drawn_by(draw_noise_F[None], logsigmoid(noisy_F), keep=keep)[0].sort().values


def _gradient(
    log_odds_F: Tensor, kept_K: Tensor, noise_F: Tensor, value: float, *, kl: bool
) -> tuple[float, Tensor]:
    """Return the loss of one layer, and its gradient at the log-odds.

    Args:
        log_odds_F: Log-odds of keeping.
        kept_K: Drawn rows.
        noise_F: Uniform noise.
        value: Discounted reward.
        kl: Whether to add the published regulariser.
    """
    log_odds_F.requires_grad_()
    log_keep_F = logsigmoid(noisy_log_odds(log_odds_F, noise_F))
    loss = told = -log_keep_F[kept_K].sum() * value
    if kl:
        loss = loss + kl_to_fair_coin(log_odds_F)
    (gradient_F,) = torch.autograd.grad(loss, log_odds_F)
    return told.item(), gradient_F
