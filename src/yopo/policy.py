"""A trained policy: the little that scores rows of any model it fits, and how it came to be.

Shapes: F rows, D columns of the scored matrix, P features.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from yopo.adapters import Ffn
from yopo.errors import InvalidArgumentError, PolicyFileError, PolicyMismatchError
from yopo.features import FEATURES, row_features
from yopo.files import read_folder, write_folder
from yopo.plan import MultipleOf, check_multiple_of, check_ratio

_START = 4.0
"""Weight of the closed form at the start: policies drawn around it differ in few rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Say how a policy is trained and used. `PolicyPruner` documents each field."""

    method: Literal["features", "prunenet", "lean"]
    ratio: float
    episodes: int
    learning_rate: float
    discount: float
    samples: int
    seed: int
    multiple_of: MultipleOf
    reward: Literal["output", "divergence", "spectral", "custom"] = "spectral"
    evidence: str = "auto"
    restore: bool = False
    kl: bool = False
    attention: bool = False
    allocation: Literal["uniform", "adaptive"] = "uniform"

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            InvalidArgumentError: If one is outside its range.
        """
        if self.method not in ("features", "prunenet", "lean"):
            raise InvalidArgumentError(
                f'`method` must be "features", "prunenet" or "lean", got {self.method!r}.'
            )
        object.__setattr__(self, "ratio", check_ratio(self.ratio))
        check_multiple_of(self.multiple_of)
        if self.reward not in ("output", "divergence", "spectral", "custom"):
            raise InvalidArgumentError(
                '`reward` must be "output", "divergence", "spectral" or a function, got '
                f"{self.reward!r}."
            )
        if self.evidence not in ("auto", "self", "weights", "tokens"):
            raise InvalidArgumentError(
                f'`evidence` must be "auto", "self", "weights" or token ids, got {self.evidence!r}.'
            )
        _check_integer("episodes", self.episodes, 1 if self.reward == "spectral" else 0)
        _check_integer("samples", self.samples, 2 if self.method == "features" else 1)
        _check_integer("seed", self.seed, 0)
        if self.seed >= 2**63:
            raise InvalidArgumentError(f"`seed` must be below 2**63, got {self.seed}.")
        if not _is_number(self.learning_rate) or not 0 < self.learning_rate < float("inf"):
            raise InvalidArgumentError(
                f"`learning_rate` must be positive and finite, got {self.learning_rate!r}."
            )
        if not _is_number(self.discount) or not 0 < self.discount <= 1:
            raise InvalidArgumentError(f"`discount` must be in (0, 1], got {self.discount!r}.")
        for name in ("restore", "kl", "attention"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidArgumentError(
                    f"`{name}` must be True or False, got {getattr(self, name)!r}."
                )
        if self.allocation not in ("uniform", "adaptive"):
            raise InvalidArgumentError(
                f'`allocation` must be "uniform" or "adaptive", got {self.allocation!r}.'
            )
        if self.method == "lean":
            self._check_lean()
        if self.allocation == "adaptive" and not self.needs_evidence:
            raise InvalidArgumentError(
                '`allocation="adaptive"` weighs what the output of FFNs loses, of which the '
                'spectral reward knows nothing: use `reward="output"`, or `allocation="uniform"`.'
            )

    def _check_lean(self) -> None:
        if self.episodes != 0:
            raise InvalidArgumentError(
                f"`episodes` must be 0 for the lean recipe, which learns nothing, got "
                f"{self.episodes!r}."
            )
        if self.evidence != "weights":
            raise InvalidArgumentError(
                '`evidence` must be "weights" for the lean recipe, which knows nothing else, got '
                f"{self.evidence!r}."
            )
        if self.allocation == "adaptive":
            raise InvalidArgumentError(
                '`allocation="adaptive"` compares what all FFNs lose before it cuts any, which the '
                "lean recipe, one FFN at a time, cannot: use `PolicyPruner()`, or "
                '`allocation="uniform"`.'
            )

    @property
    def needs_evidence(self) -> bool:
        """Tell whether scores depend on moments of the hidden units, not on the weights alone."""
        return self.method == "features" and self.reward != "spectral"

    @property
    def reads_text(self) -> bool:
        """Tell whether rows or contract matrices depend on text that the model writes or reads."""
        return self.evidence != "weights" and (self.restore or self.needs_evidence)


@dataclass(frozen=True, slots=True, eq=False)
class Policy:
    """Score the rows of FFNs: the parameters of a trained scorer, and its recipe.

    Attributes:
        recipe: How it was trained.
        tensors: `{"weights_P"}` for features; `{"vector_D", "constant"}` for PruneNet; none for the
            lean recipe, which scores nothing: `yopo.lean` chooses the rows.
    """

    recipe: Recipe
    tensors: Mapping[str, Tensor]

    @classmethod
    def at_start(cls, recipe: Recipe) -> Self:
        """Return the policy from which learning sets out.

        It follows greedy elimination, in closed form; with the spectral reward, which elimination
        knows nothing of, all rows are alike to it.
        """
        if recipe.method == "lean":
            return cls(recipe, {})
        weights_P = torch.zeros(len(FEATURES), dtype=torch.float32, device="cpu")
        if recipe.needs_evidence:
            weights_P[FEATURES.index("elimination")] = _START
        return cls(recipe, {"weights_P": weights_P})

    @property
    def needs_evidence(self) -> bool:
        """Tell whether scores depend on moments of the hidden units, not on the weights alone."""
        return self.recipe.needs_evidence

    def log_odds(self, ffn: Ffn, order_F: Tensor | None = None) -> Tensor:
        """Return the log-odds `(F,)` of keeping each row of `ffn`, on the device of its weights.

        Args:
            ffn: The FFN.
            order_F: Its elimination order, for a policy that needs evidence.

        Raises:
            PolicyMismatchError: If the policy scores rows of another width.
        """
        if self.recipe.method == "features":
            features_FP = row_features(ffn, order_F)
            return features_FP @ self.tensors["weights_P"].to(features_FP.device)
        gate_FD = torch.stack(ffn.expand_weights()[: ffn.scored]).float().mean(dim=0)
        vector_D = self.tensors["vector_D"].to(gate_FD.device)
        if gate_FD.shape[1] != len(vector_D):
            raise PolicyMismatchError(
                f"this policy scores rows of width {len(vector_D)}, but `{ffn.name}` has width "
                f"{gate_FD.shape[1]}. Fit a new policy on this model."
            )
        return gate_FD @ vector_D + self.tensors["constant"].to(gate_FD.device)

    def save(self, path: str | Path) -> None:
        """Write `policy.safetensors`, `policy_config.json` and a card into the folder `path`.

        Raises:
            PolicyFileError: If the folder cannot be written.
        """
        config = {"recipe": asdict(self.recipe), "features": list(FEATURES)}
        write_folder(path, "policy", config, self.tensors, card=self._card())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a policy that `save` wrote.

        Raises:
            PolicyFileError: If the files are missing, damaged, foreign, of a newer format, or the
                policy looks at features that this version does not compute.
        """
        config, tensors = read_folder(path, "policy")
        try:
            settings = {"allocation": "uniform"} | config["recipe"]  # older policies have none
            recipe = Recipe(**{field.name: settings[field.name] for field in fields(Recipe)})
        except (KeyError, TypeError, InvalidArgumentError) as error:
            raise PolicyFileError(f"`{path}` holds a damaged policy: {error}.") from error
        _check_tensors(path, recipe, config, tensors)
        return cls(recipe, {name: tensor.float() for name, tensor in tensors.items()})

    def _card(self) -> str:
        rows = "\n".join(f"| {key} | {value} |" for key, value in asdict(self.recipe).items())
        return (
            "---\nlibrary_name: yopo\ntags: [pruning, policy]\n---\n\n"
            "# A pruning policy\n\nScores the hidden units of feed-forward networks. Use it with "
            "`pip install yopo-prune`:\n\n"
            "```python\nimport yopo\n\n"
            'yopo.PolicyPruner.from_policy("path/to/this/folder").prune(model, ratio=0.3)\n```\n\n'
            f"| trained with | |\n|---|---|\n{rows}\n"
        )


def _check_tensors(
    path: str | Path, recipe: Recipe, config: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    if recipe.method == "features" and config.get("features") != list(FEATURES):
        raise PolicyFileError(
            f"the policy in `{path}` looks at other features than this version of yopo computes. "
            "Fit it again."
        )
    width = tensors["vector_D"].numel() if "vector_D" in tensors else 0
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "features": {"weights_P": (len(FEATURES),)},
        "prunenet": {"vector_D": (width,), "constant": ()},
        "lean": {},
    }
    wanted = shapes[recipe.method]
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != wanted or not all(
        tensor.is_floating_point() and torch.isfinite(tensor).all() for tensor in tensors.values()
    ):
        needed = f"finite {', '.join(sorted(wanted))}" if wanted else "no tensors"
        raise PolicyFileError(f"`{path}` holds a damaged policy: it needs {needed}.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_integer(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InvalidArgumentError(
            f"`{name}` must be an integer of at least {least}, got {value!r}."
        )
