"""Train a policy as its recipe says: which reward, which way to learn from it.

Shapes: L FFNs, M draws, K kept rows.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from yopo.adapters import Ffn
from yopo.divergence import Divergence
from yopo.elimination import ffn_elimination_order
from yopo.errors import InvalidArgumentError, PolicyMismatchError, UnsupportedModelError
from yopo.evidence import Evidence
from yopo.plan import plan_widths
from yopo.policy import Policy, Recipe
from yopo.published import learn_as_published
from yopo.ranks import check_agreement, gather, own
from yopo.reinforce import Episode, explore, learn
from yopo.reward import Reward, output_rewards, spectral_rewards

ModelReward = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]
"""From a model and draws of kept rows `(M, K)`, by FFN, to what they earn: `(M,)` or `(L, M)`."""


def train(
    model: nn.Module,
    ffns: Sequence[Ffn],
    recipe: Recipe,
    *,
    evidence: Evidence,
    own_reward: ModelReward | None,
) -> Iterator[tuple[Episode, Policy]]:
    """Check that `recipe` can be followed, and return its episodes, each with the policy so far.

    Args:
        model: The model to learn on, which is left as it was.
        ffns: Its FFNs.
        recipe: Hyperparameters.
        evidence: Gives the moments, where the reward needs them.
        own_reward: The reward where it is the caller's own.

    Raises:
        InvalidArgumentError: If the ratio keeps no row, a reward of the caller's is missing, or
            ranks differ in what they train.
        UnsupportedModelError: If the weights are on a disk and the reward has to run the model.
        PolicyMismatchError: If the method needs rows of one width and the model has several.
    """
    if recipe.reward == "custom" and own_reward is None:
        raise InvalidArgumentError(
            "the policy was trained with a reward function, which its files do not hold: make a "
            "new `PolicyPruner` with it as `reward`."
        )
    if recipe.episodes and recipe.reward != "spectral" and ffns[0].is_on_disk:
        raise UnsupportedModelError(
            f"`reward={recipe.reward!r}` looks at hidden units, but a checkpoint on disk is not "
            "run. Load the model with its weights, or use `reward='spectral'` or `episodes=0`."
        )
    if recipe.method == "prunenet":
        _check_one_width(ffns)
    widths = plan_widths(ffns, recipe.ratio, multiple_of=recipe.multiple_of)
    check_agreement("fit", recipe, [(ffn.name, ffn.rows) for ffn in ffns])
    return _with_progress(
        _episodes(model, ffns, recipe, widths, evidence, own_reward), recipe.episodes
    )


def _episodes(
    model: nn.Module,
    ffns: Sequence[Ffn],
    recipe: Recipe,
    widths: Mapping[str, int],
    evidence: Evidence,
    own_reward: ModelReward | None,
) -> Iterator[tuple[Episode, Policy]]:
    if recipe.method == "prunenet":
        yield from learn_as_published(ffns, recipe, widths)
        return
    if recipe.reward == "spectral":
        yield from learn(ffns, recipe, widths, spectral_rewards(ffns))
        return
    # A reward of the whole model is every rank's own; one of each FFN is shared out.
    at_hand = own(ffns) if recipe.reward == "output" else ffns
    moments = {ffn.name: found for ffn, found in evidence.moments(model, at_hand)}
    order_LF = gather([ffn_elimination_order(ffn, moments[ffn.name]).cpu() for ffn in own(ffns)])
    orders = dict(zip((ffn.name for ffn in ffns), order_LF, strict=True))
    if own_reward is not None:
        reward: Reward = partial(own_reward, model)
    elif recipe.reward == "divergence":
        reward = Divergence(model, ffns, moments if recipe.restore else None, seed=recipe.seed)
    else:
        reward = output_rewards(ffns, moments)
    yield from explore(ffns, recipe, widths, reward, orders)


def _check_one_width(ffns: Sequence[Ffn]) -> None:
    """Check that the published scorer, a vector of one width, fits every FFN."""
    widths = [ffn.expand_weights()[0].shape[1] for ffn in ffns]
    for ffn, width in zip(ffns, widths, strict=True):
        if width != widths[0]:
            raise PolicyMismatchError(
                f"the published policy scores rows of one width, but `{ffns[0].name}` has width "
                f"{widths[0]} and `{ffn.name}` {width}. Use `PolicyPruner()`."
            )


def _with_progress(
    episodes: Iterable[tuple[Episode, Policy]], total: int
) -> Iterator[tuple[Episode, Policy]]:
    """Yield `episodes` under the progress bar of transformers, which users can switch off."""
    from transformers.utils.logging import tqdm

    progress: Any = tqdm(episodes, total=total, desc="fit", unit="episode")
    for episode, policy in progress:
        name, values = ("ks", episode.ks) if episode.ks else ("reward", episode.reward)
        progress.set_postfix_str(f"{name} {sum(values) / len(values):.4f}", refresh=False)
        yield episode, policy
