"""`PolicyPruner`: fit a policy once, prune any model that it fits at any ratio."""

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import torch
from torch import Tensor, nn

from yopo.adapters import SOURCES, Ffn, check_weights, find_ffns
from yopo.adapters.attention import find_attention_units
from yopo.allocation import Spread
from yopo.budget import Budget, RatioOf, Widths
from yopo.calls import Verbatim, changed_arguments, lasting, written_call
from yopo.checkpoint import open_checkpoint
from yopo.decision import Decision, decide, weigh_losses, write_restored
from yopo.errors import InvalidArgumentError, NotFittedError, UnsupportedModelError
from yopo.evidence import Evidence
from yopo.plan import MultipleOf, PruningPlan, plan_widths, selected_layers
from yopo.policy import Policy, Recipe
from yopo.pruning_report import PruningReport, report_of
from yopo.ranks import check_agreement
from yopo.reinforce import Episode
from yopo.report import Sizes, sizes_of
from yopo.restore import Restored
from yopo.surgery import apply_plan, interrupts_held
from yopo.training import ModelReward, train
from yopo.writing import can_write

logger = logging.getLogger(__name__)

Allocation = Literal["uniform", "adaptive"]
Model = TypeVar("Model", bound=nn.Module)


class PolicyPruner:
    """Decide which FFN rows of a model stay, without any data, and remove the others.

    By default the model writes itself some text, rows are eliminated greedily by how much the
    FFN's output on it would change, and the contract matrices are re-solved for the rows that
    stay. Episodes of policy gradient on top of that are possible (`episodes=20`); measured, they
    do not improve it, so the default does not pay for them.

    Args:
        ratio: Share of the rows that training removes, in [0, 1). The trained policy prunes at any
            ratio.
        episodes: How often the policy draws and learns from what the draws earn: at least 0, and 1
            with the spectral reward. By default 0 with the output reward, else 20.
        learning_rate: AdamW's step size, positive.
        discount: γ in (0, 1]: layer i counts γ^i times as much as the first.
        samples: Draws an episode, at least 2; the others' mean is a draw's baseline. With the
            spectral reward they are sets of rows of a layer, else policies.
        reward: "output" for the error of the FFNs' output after restoring; "divergence" for that
            of the model's predictions, on text that it writes itself; "spectral" for the paper's
            distance between singular values. Or a function, which gets the model and kept rows
            `(M, K)` by FFN name, and returns what each set earns: `(M,)`, or `(L, M)` for each
            FFN its own, the more the better. M is `samples` + 1: the last rows are those of the
            present policy. The model is not cut then.
        evidence: What is known of the hidden units: "self" for text that the model writes itself,
            "weights" for inputs imagined from weights alone, "auto" for the first where the model
            can write and the second elsewhere. Token ids `(N, W)` work too, and are calibration
            on data.
        restore: Whether to re-solve the contract matrices on the evidence.
        multiple_of: Widths are rounded to a multiple of this; "auto" takes the largest of 256 …
            2 that moves the ratio by less than a percentage point, 1 none.
        allocation: "uniform" removes the same share of every FFN, and what is saved loads
            anywhere. "adaptive" removes more where the model loses less by it, and goes with any
            reward but the spectral; the widths then differ, and a saved model needs `yopo.load`.
        seed: Seed of all randomness, at least 0. The global generators are left as they were.

    Attributes:
        history: One `Episode` after another, with loss, reward, gradient norm and, with the
            spectral reward, Kolmogorov-Smirnov distance of each layer; empty where nothing was
            learned.

    Raises:
        InvalidArgumentError: If an argument is outside its range.

    Example:
        >>> pruner = yopo.PolicyPruner(ratio=0.3).fit(model)
        >>> smaller = pruner.prune(model, ratio=0.3)
    """

    def __init__(
        self,
        *,
        ratio: float = 0.3,
        episodes: int | None = None,
        learning_rate: float = 0.3,
        discount: float = 0.99,
        samples: int = 8,
        reward: str | ModelReward = "output",
        evidence: str | Tensor = "auto",
        restore: bool = True,
        multiple_of: MultipleOf = "auto",
        allocation: Allocation = "uniform",
        seed: int = 0,
    ) -> None:
        """Check and keep the hyperparameters; nothing is computed before `fit`."""
        self._evidence = Evidence(evidence, seed=seed)
        if reward == "custom":
            raise InvalidArgumentError(
                "`reward` of one's own is passed as a function, not by name."
            )
        self._reward = reward if callable(reward) else None
        self._recipe = Recipe(
            method="features",
            ratio=ratio,
            episodes=(0 if reward == "output" else 20) if episodes is None else episodes,
            learning_rate=learning_rate,
            discount=discount,
            samples=samples,
            reward="custom" if callable(reward) else reward,  # type: ignore[arg-type]
            evidence="tokens" if isinstance(evidence, Tensor) else evidence,
            restore=restore,
            multiple_of=multiple_of,
            seed=seed,
            allocation=allocation,
        )
        self._policy: Policy | None = None
        self._origin: str | None = None
        self._fit_seconds: float | None = None
        self._report: PruningReport | None = None
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
        random both in training and at prune time, widths are exactly `int((1 - ratio) * n)`, and
        nothing is restored. Differs from the paper: where experts share a tensor and their width is
        a multiple of 8, it stays one, as grouped products need.

        Args:
            ratio: As for `PolicyPruner`.
            episodes: As for `PolicyPruner`, at least 1.
            learning_rate: As for `PolicyPruner`.
            discount: As for `PolicyPruner`.
            kl: Whether to add the published pull towards keep probabilities of ½.
            attention: Whether to cut the heads of the attention too, with the same policy. The
                authors advise against it: it harms the model far more than it saves.
            seed: As for `PolicyPruner`.

        Raises:
            InvalidArgumentError: If an argument is outside its range.
        """
        recipe = Recipe(
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
        return cls._with_recipe(recipe)

    @classmethod
    def lean(
        cls,
        *,
        ratio: float = 0.3,
        restore: bool = True,
        multiple_of: MultipleOf = "auto",
        seed: int = 0,
    ) -> Self:
        """Return a pruner for models larger than memory: weights alone, one FFN at a time.

        Rows go in four rounds, each time those by whose loss the FFN's output on imagined inputs
        changes least, and the contract matrices are re-solved on the same inputs. There are
        T = 4096 of them, or as many as the model is wide where that is more: half are embeddings
        of tokens to which each layer adds what its FFN puts out, half are Gaussian. Nothing is
        learned: `fit` only checks the model, and `plan` and `prune` walk through it once.

        On trained models of 3 million parameters it loses 8 to 20 % of what random rows lose at a
        ratio of 0.3, with `evidence="weights"` 9 to 21 % are lost, by default 3 to 8 %. Where there
        are fewer inputs than rows, as in large models, it has not been measured.

        An FFN of F rows in a model of width D takes about 4 · (F · T + 3 · T² + 4 · T · D) bytes
        while it is decided on, beside its weights, where the second moments of the default recipe
        and the work on them take more than 48 · F².

        Args:
            ratio: As for `PolicyPruner`.
            restore: As for `PolicyPruner`.
            multiple_of: As for `PolicyPruner`.
            seed: As for `PolicyPruner`.

        Raises:
            InvalidArgumentError: If an argument is outside its range.

        Example:
            >>> pruner = yopo.PolicyPruner.lean(ratio=0.3).fit(model)
            >>> smaller = pruner.prune(model, ratio=0.3)
        """
        recipe = Recipe(
            method="lean",
            ratio=ratio,
            episodes=0,
            learning_rate=1.0,
            discount=1.0,
            samples=1,
            reward="output",
            evidence="weights",
            restore=restore,
            multiple_of=multiple_of,
            seed=seed,
        )
        return cls._with_recipe(recipe)

    @classmethod
    def from_policy(
        cls,
        path: str | Path,
        *,
        evidence: str | Tensor | None = None,
        allocation: Allocation | None = None,
    ) -> Self:
        """Return a pruner with the policy that `save_policy` wrote into the folder `path`.

        Args:
            path: The folder.
            evidence: As for `PolicyPruner`; by default what the policy was trained with.
            allocation: As for `PolicyPruner`; by default as the policy was saved.

        Raises:
            PolicyFileError: If the files are missing, damaged, foreign or of a newer format.
            InvalidArgumentError: If the policy was trained on tokens of the caller, which it does
                not hold, and none are given, or it does not go with `allocation`.
        """
        policy = Policy.load(path)
        if evidence is None and policy.recipe.evidence == "tokens":
            raise InvalidArgumentError(
                f"the policy in `{path}` was fitted on your tokens, which it does not hold: pass "
                "them as `evidence`, or a way to do without, such as `evidence='self'`."
            )
        changes: dict[str, Any] = {}
        if evidence is not None:
            changes["evidence"] = "tokens" if isinstance(evidence, Tensor) else evidence
        if allocation is not None:
            changes["allocation"] = allocation
        recipe = replace(policy.recipe, **changes)
        pruner = cls._with_recipe(recipe, evidence)
        pruner._policy = replace(policy, recipe=recipe)
        told = Verbatim("tokens") if isinstance(evidence, Tensor) else evidence
        pruner._origin = written_call(
            "yopo.PolicyPruner.from_policy", str(path), evidence=told, allocation=allocation
        )
        return pruner

    def fit(self, model: nn.Module | str | Path) -> Self:
        """Train the policy on `model`, which is neither changed nor copied.

        Ctrl-C ends training early: the best policy so far is kept, and a warning says so. Where
        `torchrun` has started several processes, each calls this, and all end with one policy.

        Args:
            model: A `PreTrainedModel` with FFNs, or a folder of safetensors files, of which one
                FFN at a time is read. What has to run a model cannot be trained on a folder.

        Returns:
            This pruner.

        Raises:
            UnsupportedModelError: If the model cannot be pruned, has weights that are missing, NaN
                or infinite, or cannot serve as the evidence asked for.
            InvalidArgumentError: If the ratio keeps no row.
            PolicyMismatchError: If the method needs rows of one width and the model has several.
        """
        opened = _opened(model)
        ffns = find_ffns(opened)
        recipe = self._recipe
        if recipe.episodes or opened not in SOURCES:  # what is on a disk is read but once
            check_weights(ffns)
        episodes = train(opened, ffns, recipe, evidence=self._evidence, own_reward=self._reward)
        self.history, self._origin, started = [], None, time.perf_counter()
        if recipe.episodes == 0:
            self._policy = Policy.at_start(recipe)
            return self
        try:
            for episode, policy in episodes:
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
        self._fit_seconds = time.perf_counter() - started
        return self

    def plan(
        self,
        model: nn.Module | str | Path,
        ratio: float | None = None,
        *,
        ratio_of: RatioOf = "ffn",
        parameters: float | None = None,
        bytes: float | None = None,
        layers: Iterable[int | str] | None = None,
        sample: bool | None = None,
    ) -> PruningPlan:
        """Decide which rows of `model` stay, without changing it.

        How much goes is said by at most one of `ratio`, `parameters` and `bytes`. A size is met
        with the smallest ratio of rows whose rounded widths do; `ratio_reached` of the plan tells
        the share of rows that it took.

        Args:
            model: Any `PreTrainedModel` that the policy fits, or a folder of safetensors files; not
                only the one it was trained on.
            ratio: Share to remove, in [0, 1); by default the ratio of training.
            ratio_of: What `ratio` is a share of: "ffn" for the rows of the FFNs, "model" for all
                parameters of the model, of which at least that share goes.
            parameters: How many parameters the whole model may have afterwards, tied ones counted
                once. A model that has no more is left whole.
            bytes: How many bytes its parameters may take.
            layers: Only these layers: numbers, or patterns of FFN names such as
                `"model.layers.1?.*"`. The widths then differ, and a saved model needs `yopo.load`.
            sample: Whether to draw the rows from the policy, seeded, instead of taking those it
                prefers. By default False, and True for `prunenet`, as published.

        Raises:
            NotFittedError: If there is no policy yet.
            PolicyMismatchError: If the policy scores rows of another width.
            UnsupportedModelError: If the model cannot be pruned, has weights that are missing, NaN
                or infinite, or cannot serve as the evidence asked for.
            InvalidArgumentError: If `ratio` is outside [0, 1) or keeps nothing, a size cannot be
                reached, more than one of them is given, or `layers` selects nothing.
        """
        budget = self.budget(ratio, ratio_of=ratio_of, parameters=parameters, bytes=bytes)
        return self.decide(_opened(model), budget, layers=layers, sample=sample, restore=False).plan

    def prune(
        self,
        model: Model,
        ratio: float | None = None,
        *,
        ratio_of: RatioOf = "ffn",
        parameters: float | None = None,
        bytes: float | None = None,
        layers: Iterable[int | str] | None = None,
        sample: bool | None = None,
    ) -> Model:
        """Remove rows from `model` in place, restore what is left, and return it.

        The config follows, so `save_pretrained` writes an ordinary checkpoint. Should the cut
        fail, it does so before the first tensor changes. `report` then tells what was removed.

        Args:
            model: As for `plan`.
            ratio: As for `plan`.
            ratio_of: As for `plan`.
            parameters: As for `plan`.
            bytes: As for `plan`.
            layers: As for `plan`.
            sample: As for `plan`.

        Raises:
            NotFittedError: As `plan`.
            PolicyMismatchError: As `plan`.
            UnsupportedModelError: As `plan`, or if the result could not be loaded again.
            InvalidArgumentError: As `plan`.

        Example:
            >>> smaller = pruner.prune(model, bytes=8e9)
        """
        if isinstance(model, str | Path):
            raise InvalidArgumentError(
                f"`model` must be a model in memory, got {str(model)!r}. For files, call "
                "`yopo.prune_checkpoint(source, target, ratio, pruner=…)`."
            )
        layers = lasting(layers)
        budget = self.budget(ratio, ratio_of=ratio_of, parameters=parameters, bytes=bytes)
        started = time.perf_counter()
        decision = self.decide(model, budget, layers=layers, sample=sample)
        decided = time.perf_counter()
        plan = decision.plan
        sizes = sizes_of(model, decision.ffns), sizes_of(model, decision.ffns, plan.widths)
        with interrupts_held():
            apply_plan(model, plan, ffns=decision.ffns)
            write_restored(decision.ffns, decision.restored)
        asked = {"parameters": parameters, "bytes": bytes, "layers": layers, "sample": sample}
        told = None if ratio_of == "ffn" else ratio_of
        self.note(
            model,
            plan,
            sizes=sizes,
            call=written_call(f"{self!r}.prune", Verbatim("model"), ratio, ratio_of=told, **asked),
            seconds={"decide": decided - started, "cut": time.perf_counter() - decided},
        )
        return model

    @property
    def report(self) -> PruningReport:
        """Return the report of the last cut by this pruner, of a model or of a checkpoint on disk.

        Raises:
            NotFittedError: If nothing has been pruned yet.
        """
        if self._report is None:
            raise NotFittedError(
                "there is no report, because this pruner has pruned nothing yet. Call "
                "`prune(model)`; that of a checkpoint on disk is `PruningReport.load(folder)`."
            )
        return self._report

    def note(
        self,
        model: nn.Module,
        plan: PruningPlan,
        *,
        sizes: tuple[Sizes, Sizes],
        call: str,
        source: str | Path | None = None,
        seconds: dict[str, float],
    ) -> PruningReport:
        """Make the report of a cut by this pruner, for `report`, and return it.

        Args:
            model: The model that has been cut.
            plan: What was applied.
            sizes: Those before and after.
            call: What made it.
            source: Where the model was loaded from; by default where its config says.
            seconds: How long each step took.
        """
        recipe, used = self._recipe, {}
        if recipe.evidence == "auto" and (recipe.restore or recipe.needs_evidence):
            used["evidence_used"] = "self" if can_write(model) else "weights"
        fitted = {} if self._fit_seconds is None else {"fit": self._fit_seconds}
        self._report = report_of(
            model,
            plan,
            sizes=sizes,
            call=call,
            source=source,
            recipe=asdict(recipe) | used,
            history=self.history,
            seconds=fitted | seconds,
        )
        return self._report

    def __repr__(self) -> str:
        """Return the call that makes this pruner, and fits it where it has been."""
        if self._origin is not None:
            return self._origin
        recipe = self._recipe
        values = asdict(recipe)
        if recipe.episodes == (0 if recipe.reward == "output" else 20):
            values["episodes"] = None
        if recipe.reward == "custom":
            values["reward"] = Verbatim("reward")
        if recipe.evidence == "tokens":
            values["evidence"] = Verbatim("tokens")
        make: Callable[..., PolicyPruner] = PolicyPruner
        name = "yopo.PolicyPruner"
        if recipe.method != "features":
            make, name = getattr(PolicyPruner, recipe.method), f"{name}.{recipe.method}"
        call = written_call(name, **changed_arguments(make, values) | {"seed": recipe.seed})
        return f"{call}.fit(model)" if self.is_fitted else call

    @property
    def is_fitted(self) -> bool:
        """Tell whether there is a policy."""
        return self._policy is not None

    @property
    def runs_model(self) -> bool:
        """Tell whether what is left to do runs the model, so that its weights have to be there."""
        recipe = self._recipe
        learns = not self.is_fitted and recipe.episodes > 0 and recipe.reward != "spectral"
        return learns or recipe.reads_text

    def budget(
        self,
        ratio: float | None = None,
        *,
        ratio_of: RatioOf = "ffn",
        parameters: float | None = None,
        bytes: float | None = None,
    ) -> Budget:
        """Return what a caller asks for; the ratio of training where that is nothing.

        Args:
            ratio: As for `plan`.
            ratio_of: As for `plan`.
            parameters: As for `plan`.
            bytes: As for `plan`.

        Raises:
            InvalidArgumentError: If more than one is given, or one is outside its range.
        """
        if ratio is None and parameters is None and bytes is None:
            ratio = self._recipe.ratio
        return Budget(ratio=ratio, ratio_of=ratio_of, parameters=parameters, bytes=bytes)

    def decide(
        self,
        model: nn.Module,
        budget: Budget,
        *,
        layers: Iterable[int | str] | None = None,
        sample: bool | None = None,
        restore: bool | None = None,
        put_away: Callable[[str, Restored], None] | None = None,
    ) -> Decision:
        """Return what `prune` would do: the plan, and the re-solved contract matrices.

        Args:
            model: As for `plan`, but no folder.
            budget: How much goes.
            layers: As for `plan`.
            sample: As for `plan`.
            restore: Whether to re-solve contract matrices; by default as the recipe says.
            put_away: Gets each re-solved matrix with its FFN's name as soon as it is there, by the
                rank that has made it. They are not returned then, so that no more than one of them
                is held.

        Raises:
            NotFittedError: As `plan`.
            PolicyMismatchError: As `plan`.
            UnsupportedModelError: As `plan`.
            InvalidArgumentError: As `plan`.
        """
        recipe, evidence = self._recipe, self._evidence
        self._check_sample(sample)
        ffns = self._find(model)
        selected = selected_layers(ffns, layers)
        chosen = [ffn for ffn in ffns if selected[ffn.name]]
        losses = None
        widths_of: Widths = partial(plan_widths, chosen, multiple_of=recipe.multiple_of)
        if recipe.allocation == "adaptive":
            losses = weigh_losses(model, chosen, evidence)
            widths_of = Spread.over(chosen, losses, multiple_of=recipe.multiple_of).widths
        ratio, widths = budget.meet(model, chosen, widths_of)
        check_agreement("prune", recipe, widths)
        sample = recipe.method == "prunenet" if sample is None else sample
        return decide(
            model,
            ffns,
            policy=self._require_policy(),
            evidence=evidence,
            ratio=ratio,
            widths={ffn.name: ffn.rows for ffn in ffns} | widths,
            restore=recipe.restore if restore is None else restore,
            generator=torch.Generator().manual_seed(recipe.seed) if sample else None,
            losses=losses,
            put_away=put_away,
        )

    def save_policy(self, path: str | Path) -> None:
        """Write the policy into the folder `path`, all or nothing.

        Raises:
            NotFittedError: If there is no policy yet.
            PolicyFileError: If the folder cannot be written.
        """
        self._require_policy().save(path)

    @classmethod
    def _with_recipe(cls, recipe: Recipe, evidence: str | Tensor | None = None) -> Self:
        pruner = cls(seed=recipe.seed, evidence=recipe.evidence if evidence is None else evidence)
        pruner._recipe = recipe
        return pruner

    def _require_policy(self) -> Policy:
        if self._policy is None:
            raise NotFittedError(
                "this pruner has no policy yet. Call `fit(model)`, or load one with "
                "`PolicyPruner.from_policy(path)`."
            )
        return self._policy

    def _check_sample(self, sample: bool | None) -> None:
        if sample and self._recipe.method == "lean":
            raise InvalidArgumentError(
                "`sample=True` draws rows from a policy, but the lean recipe has none to draw "
                "from: leave `sample` out, or use `PolicyPruner()`."
            )

    def _find(self, model: nn.Module) -> list[Ffn]:
        """Return what the recipe cuts: the FFNs, and the heads in the attention variant."""
        self._require_policy()
        ffns = find_ffns(model)
        if self._recipe.attention and model in SOURCES:
            raise UnsupportedModelError(
                "`attention=True` cuts heads, which are not read from a checkpoint on disk. Load "
                "the model with its weights, or use `attention=False`."
            )
        check_weights(ffns)
        return ffns + find_attention_units(model) if self._recipe.attention else ffns


def _opened(model: Any) -> Any:
    """Return a model, that of a folder on the meta device."""
    return open_checkpoint(model).model if isinstance(model, str | Path) else model
