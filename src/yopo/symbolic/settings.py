"""How an evolution goes on: the paper's figures, and what the paper leaves open."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from yopo.errors import InvalidArgumentError
from yopo.symbolic.growing import MAX_DEPTH, MIN_DEPTH
from yopo.symbolic.names import TERMINALS

Selection = Literal["topk", "tournament"]
Replacement = Literal["worst", "append", "oldest"]

DEEPEST_GROWN = 17
"""Edges of the deepest trees that may be bred: full ones grow by a quarter with each more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvolutionSettings:
    """Say how expressions are bred and chosen.

    Published are a population of 50, 300 iterations with one crossover each, depths of three to
    five levels, two parents out of the 10 best, and a mutation with probability 0.5. The released
    code contains no search, so the rest is reconstructed: what a child replaces, the kinds of
    mutation, and the rules by which expressions are simplified.

    Attributes:
        population: Random expressions to begin with, at least 2.
        iterations: Children that are evaluated, one after another, at least 0.
        min_depth: Edges from the root to the leaves of a random expression, at least.
        max_depth: Edges of any expression, in [`min_depth`, 17]. The paper's levels are one more.
        parents: Out of how many of the best two parents are drawn, at least 2.
        selection: "topk" takes the best of the population, "tournament" those of two fifths of it,
            drawn anew for each child.
        mutation: Probability in [0, 1] that a child is mutated after crossover.
        replacement: What leaves the population for a child: the "worst", which may be the child,
            the "oldest", or nothing where it is "append".
        simplify: Whether expressions are simplified before they are evaluated.
        approximate: Whether exp and log count as opposites there, which their guards make untrue.
        required: Terminals of which each expression has to use at least one; none where empty. None
            is `W` where that is a terminal at all, as an expression without weights says nothing
            of them.
        offspring: Children that are made from one population before the first of them joins it,
            at least 1: so many processes can be kept busy. The result depends on it.
        random_search: Whether to evaluate as many expressions at random too. There are few ways to
            rank weights by short expressions, so good ones are found by chance often enough that a
            search has to be compared with it.

    Raises:
        InvalidArgumentError: If one is outside its range.
    """

    population: int = 50
    iterations: int = 300
    min_depth: int = MIN_DEPTH
    max_depth: int = MAX_DEPTH
    parents: int = 10
    selection: Selection = "topk"
    mutation: float = 0.5
    replacement: Replacement = "worst"
    simplify: bool = True
    approximate: bool = True
    required: tuple[str, ...] | None = None
    offspring: int = 1
    random_search: bool = True

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, least in {
            "population": 2,
            "iterations": 0,
            "min_depth": 0,
            "max_depth": 0,
            "parents": 2,
            "offspring": 1,
        }.items():
            check_integer(name, getattr(self, name), least)
        if not self.min_depth <= self.max_depth <= DEEPEST_GROWN:
            raise InvalidArgumentError(
                f"`max_depth` must be in [`min_depth`, {DEEPEST_GROWN}], which is "
                f"[{self.min_depth}, {DEEPEST_GROWN}], got {self.max_depth}."
            )
        _check_choice("selection", self.selection, ("topk", "tournament"))
        _check_choice("replacement", self.replacement, ("worst", "append", "oldest"))
        is_number = isinstance(self.mutation, int | float) and not isinstance(self.mutation, bool)
        if not is_number or not 0 <= self.mutation <= 1:
            raise InvalidArgumentError(f"`mutation` must be in [0, 1], got {self.mutation!r}.")
        for name in ("simplify", "approximate", "random_search"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidArgumentError(
                    f"`{name}` must be True or False, got {getattr(self, name)!r}."
                )
        if self.required is not None:
            required = check_terminals("required", self.required)
            object.__setattr__(self, "required", required)

    def required_of(self, terminals: Collection[str]) -> frozenset[str]:
        """Return the terminals of which each expression has to use at least one; none if empty.

        Args:
            terminals: Those that expressions are made of.

        Raises:
            InvalidArgumentError: If one that is required is not among them.
        """
        if self.required is None:
            return frozenset({"W"} & set(terminals))
        missing = [name for name in self.required if name not in terminals]
        if missing:
            raise InvalidArgumentError(
                f"`required` names `{missing[0]}`, which is none of the `terminals`: "
                f"{', '.join(terminals)}."
            )
        return frozenset(self.required)


def settings_of(settings: object) -> EvolutionSettings:
    """Return settings that were given, by default what is published.

    Raises:
        InvalidArgumentError: If they are something else.
    """
    if settings is None:
        return EvolutionSettings()
    if not isinstance(settings, EvolutionSettings):
        raise InvalidArgumentError(f"`settings` must be `EvolutionSettings`, got {settings!r}.")
    return settings


def check_integer(name: str, value: object, least: int) -> None:
    """Check that an argument is a whole number.

    Raises:
        InvalidArgumentError: If it is not, or is less than `least`.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InvalidArgumentError(
            f"`{name}` must be a whole number of at least {least}, got {value!r}."
        )


def check_terminals(name: str, terminals: Any) -> tuple[str, ...]:
    """Return terminals as a tuple.

    Raises:
        InvalidArgumentError: If there is none of such a name, or one is given twice.
    """
    if isinstance(terminals, str) or not isinstance(terminals, Collection):
        raise InvalidArgumentError(
            f"`{name}` must be several names of terminals, got {terminals!r}."
        )
    # The order decides what is drawn, and that of a set is another in every process.
    given = (
        tuple(sorted(terminals, key=str))
        if isinstance(terminals, set | frozenset)
        else (tuple(terminals))
    )
    for terminal in given:
        if terminal not in TERMINALS:
            raise InvalidArgumentError(
                f"`{name}` may name {', '.join(TERMINALS)}, got {terminal!r}."
            )
    if len(set(given)) < len(given):
        raise InvalidArgumentError(f"`{name}` names a terminal twice: {', '.join(given)}.")
    return given


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        told = ", ".join(f'"{choice}"' for choice in choices[:-1])
        raise InvalidArgumentError(f'`{name}` must be {told} or "{choices[-1]}", got {value!r}.')
