"""`PolicyPruner`: fit a policy once, prune any model that it fits at any ratio."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from yopo.adapters import Ffn, check_weights, find_ffns
from yopo.adapters.attention import find_attention_units
from yopo.errors import NotFittedError, PolicyMismatchError
from yopo.plan import MultipleOf, PruningPlan, plan_widths, selected_layers
from yopo.policy import Policy, Recipe
from yopo.reinforce import Episode, learn, learn_as_published
from yopo.sampling import best_rows, draw_rows
from yopo.scorer import noisy_log_odds
from yopo.surgery import apply_plan

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)


class PolicyPruner:
    """Learn which FFN rows of a model to keep, from its weights alone, and remove the others.

    Args:
        ratio: Share of the rows that training removes, in [0, 1). The trained policy prunes at any
            ratio.
        episodes: How often the policy draws rows and learns from what they earn, at least 1.
        learning_rate: AdamW's step size, positive.
        discount: γ in (0, 1]: layer i counts γ^i times as much as the first.
        samples: Draws a layer and episode, at least 2; the others' mean is a draw's baseline.
        multiple_of: Widths are rounded to a multiple of this; "auto" takes the largest of 256 …
            2 that moves the ratio by less than a percentage point, 1 none.
        seed: Seed of all randomness, at least 0. The global generators are never touched.

    Attributes:
        history: One `Episode` after another, with loss, reward, Kolmogorov-Smirnov distance and
            gradient norm of each layer.

    Raises:
        InvalidArgumentError: If an argument is outside its range.

    Example:
        >>> pruner = yopo.PolicyPruner(ratio=0.3, episodes=5).fit(model)
        >>> smaller = pruner.prune(model, ratio=0.3)
    """

    def __init__(
        self,
        *,
        ratio: float = 0.3,
        episodes: int = 20,
        learning_rate: float = 0.3,
        discount: float = 0.99,
        samples: int = 8,
        multiple_of: MultipleOf = "auto",
        seed: int = 0,
    ) -> None:
        """Check and keep the hyperparameters; nothing is computed before `fit`."""
        self._recipe = Recipe(
            method="features",
            ratio=ratio,
            episodes=episodes,
            learning_rate=learning_rate,
            discount=discount,
            samples=samples,
            multiple_of=multiple_of,
            seed=seed,
        )
        self._policy: Policy | None = None
        self.history: list[Episode] = []

    @classmethod
    def prunenet(
        cls,
        *,
        ratio: float = 0.3,
        episodes: int = 20,
        learning_rate: float = 5e-4,
        discount: float = 0.99,
        kl: bool = False,
        attention: bool = False,
        seed: int = 0,
    ) -> Self:
        """Return a pruner that does what PruneNet published, quirks included, for comparison.

        Its scorer is a linear probe of the rows of the gate matrix (fc1), its rows are drawn at
        random both in training and at prune time, and widths are exactly `int((1 - ratio) * n)`.

        Args:
            ratio: As for `PolicyPruner`.
            episodes: As for `PolicyPruner`.
            learning_rate: As for `PolicyPruner`.
            discount: As for `PolicyPruner`.
            kl: Whether to add the published pull towards keep probabilities of ½.
            attention: Whether to cut the heads of the attention too, with the same policy. The
                authors advise against it: it harms the model far more than it saves.
            seed: As for `PolicyPruner`.

        Raises:
            InvalidArgumentError: If an argument is outside its range.
        """
        pruner = cls(seed=seed)
        pruner._recipe = Recipe(
            method="prunenet",
            ratio=ratio,
            episodes=episodes,
            learning_rate=learning_rate,
            discount=discount,
            samples=1,
            multiple_of=1,
            seed=seed,
            kl=kl,
            attention=attention,
        )
        if attention:
            logger.warning(
                "Cutting the attention harms a model far more than it saves; the authors of "
                "PruneNet advise against it."
            )
        return pruner

    @classmethod
    def from_policy(cls, path: str | Path) -> Self:
        """Return a pruner with the policy that `save_policy` wrote into the folder `path`.

        Raises:
            PolicyFileError: If the files are missing, damaged, foreign or of a newer format.
        """
        policy = Policy.load(path)
        pruner = cls(seed=policy.recipe.seed)
        pruner._recipe, pruner._policy = policy.recipe, policy
        return pruner

    def fit(self, model: nn.Module) -> Self:
        """Train the policy on the weights of `model`, which is neither changed nor copied.

        Ctrl-C ends training early: the best policy so far is kept, and a warning says so.

        Args:
            model: A `PreTrainedModel` with FFNs.

        Returns:
            This pruner.

        Raises:
            UnsupportedModelError: If the model cannot be pruned, or has weights that are missing,
                NaN or infinite.
            InvalidArgumentError: If the ratio keeps no row.
            PolicyMismatchError: If the method needs rows of one width and the model has several.
        """
        ffns = find_ffns(model)
        check_weights(ffns)
        recipe = self._recipe
        if recipe.method == "prunenet":
            _check_one_width(ffns)
        widths = plan_widths(ffns, recipe.ratio, multiple_of=recipe.multiple_of)
        train = learn_as_published if recipe.method == "prunenet" else learn
        self.history = []
        try:
            for episode, policy in _with_progress(train(ffns, recipe, widths), recipe.episodes):
                self.history.append(episode)
                self._policy = policy
        except KeyboardInterrupt:
            if not self.history:
                raise
            logger.warning(
                "Interrupted after %d of %d episodes; the best policy so far is kept.",
                len(self.history),
                recipe.episodes,
            )
        return self

    def plan(
        self,
        model: nn.Module,
        ratio: float | None = None,
        *,
        layers: Iterable[int | str] | None = None,
        sample: bool | None = None,
    ) -> PruningPlan:
        """Decide which rows of `model` stay, without changing it.

        Args:
            model: Any `PreTrainedModel` that the policy fits; not only the one it was trained on.
            ratio: Share of the rows to remove, in [0, 1); by default the ratio of training.
            layers: Only these layers: numbers, or patterns of FFN names such as
                `"model.layers.1?.*"`. The widths then differ, and a saved model needs `yopo.load`.
            sample: Whether to draw the rows from the policy, seeded, instead of taking those it
                prefers. By default False, and True for `prunenet`, as published.

        Raises:
            NotFittedError: If there is no policy yet.
            PolicyMismatchError: If the policy scores rows of another width.
            UnsupportedModelError: If the model cannot be pruned, or has weights that are missing,
                NaN or infinite.
            InvalidArgumentError: If `ratio` is outside [0, 1) or keeps nothing, or `layers`
                selects nothing.
        """
        self._require_policy()
        return self._plan(self._find(model), ratio, layers, sample)

    def prune(
        self,
        model: Model,
        ratio: float | None = None,
        *,
        layers: Iterable[int | str] | None = None,
        sample: bool | None = None,
    ) -> Model:
        """Remove rows from `model` in place, and return it.

        The config follows, so `save_pretrained` writes an ordinary checkpoint. Should the cut
        fail, it does so before the first tensor changes.

        Args:
            model: As for `plan`.
            ratio: As for `plan`.
            layers: As for `plan`.
            sample: As for `plan`.

        Raises:
            NotFittedError: As `plan`.
            PolicyMismatchError: As `plan`.
            UnsupportedModelError: As `plan`, or if the result could not be loaded again.
            InvalidArgumentError: As `plan`.
        """
        self._require_policy()
        ffns = self._find(model)
        apply_plan(model, self._plan(ffns, ratio, layers, sample), ffns=ffns)
        return model

    def save_policy(self, path: str | Path) -> None:
        """Write the policy into the folder `path`, all or nothing.

        Raises:
            NotFittedError: If there is no policy yet.
            PolicyFileError: If the folder cannot be written.
        """
        self._require_policy().save(path)

    def _find(self, model: nn.Module) -> list[Ffn]:
        """Return what the recipe cuts: the FFNs, and the heads in the attention variant."""
        ffns = find_ffns(model)
        return ffns + find_attention_units(model) if self._recipe.attention else ffns

    def _require_policy(self) -> Policy:
        if self._policy is None:
            raise NotFittedError(
                "this pruner has no policy yet. Call `fit(model)`, or load one with "
                "`PolicyPruner.from_policy(path)`."
            )
        return self._policy

    def _plan(
        self,
        ffns: Sequence[Ffn],
        ratio: float | None,
        layers: Iterable[int | str] | None,
        sample: bool | None,
    ) -> PruningPlan:
        policy = self._require_policy()
        ratio = self._recipe.ratio if ratio is None else ratio
        widths = plan_widths(ffns, ratio, multiple_of=self._recipe.multiple_of)
        selected = selected_layers(ffns, layers)
        check_weights(ffns)
        if sample is None:
            sample = self._recipe.method == "prunenet"
        generator = torch.Generator().manual_seed(self._recipe.seed)
        kept = {}
        for ffn in ffns:
            if not selected[ffn.name]:
                kept[ffn.name] = torch.arange(ffn.rows)
                continue
            with torch.no_grad():
                log_odds_F = policy.log_odds(ffn)
            kept[ffn.name] = self._rows(log_odds_F, widths[ffn.name], generator if sample else None)
        return PruningPlan(kept=kept, rows={ffn.name: ffn.rows for ffn in ffns}, ratio=ratio)

    def _rows(self, log_odds_F: Tensor, keep: int, generator: torch.Generator | None) -> Tensor:
        """Return the kept rows: drawn where there is a generator, else the preferred ones."""
        if generator is None:
            return best_rows(log_odds_F, keep=keep).cpu()
        if self._recipe.method == "prunenet":
            log_odds_F = logsigmoid(noisy_log_odds(log_odds_F, generator=generator))
        return draw_rows(log_odds_F, keep=keep, draws=1, generator=generator)[0].sort().values.cpu()


def _check_one_width(ffns: Sequence[Ffn]) -> None:
    """Check that the published scorer, a vector of one width, fits every FFN."""
    first = ffns[0].expand_weights()[0].shape[1]
    for ffn in ffns:
        if (width := ffn.expand_weights()[0].shape[1]) != first:
            raise PolicyMismatchError(
                f"the published policy scores rows of one width, but `{ffns[0].name}` has width "
                f"{first} and `{ffn.name}` {width}. Use `PolicyPruner()`."
            )


def _with_progress(
    episodes: Iterable[tuple[Episode, Policy]], total: int
) -> Iterable[tuple[Episode, Policy]]:
    """Yield `episodes` under the progress bar of transformers, which users can switch off."""
    from transformers.utils.logging import tqdm

    progress: Any = tqdm(episodes, total=total, desc="fit", unit="episode")
    for episode, policy in progress:
        mean = sum(episode.ks) / len(episode.ks)
        progress.set_postfix_str(f"ks {mean:.4f}", refresh=False)
        yield episode, policy
