"""New expressions for a search: drawn, or bred from the best, and none like one that was made."""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from yopo.symbolic.expression import Expression
from yopo.symbolic.growing import crossover, mutate, ramped_expressions
from yopo.symbolic.history import Candidate, Operation
from yopo.symbolic.settings import EvolutionSettings
from yopo.symbolic.simplifying import simplify

MOST_DRAWS = 1000
"""When so many random expressions in a row are like known ones, there are hardly any others."""

_RETRIES = 20
"""After so many children that are like known expressions a random one is drawn instead."""

_TOURNAMENT = 0.4
"""Share of the population that takes part in a tournament."""


class Breeder:
    """Make expressions that have not been made before, and are worth an evaluation.

    Whatever is made is simplified, and dropped if it is constant, too deep, lacks what is required,
    or has no signature or a known one.

    Args:
        rng: Where randomness comes from.
        settings: How to breed.
        terminals: What expressions are made of.
        signature: From an expression to what it shares with those that need no evaluation of their
            own, None where it is not worth any.
        known: Signatures that count as made already.
    """

    def __init__(
        self,
        rng: random.Random,
        settings: EvolutionSettings,
        *,
        terminals: Sequence[str],
        signature: Callable[[Expression], str | None],
        known: Iterable[str] = (),
    ) -> None:
        """Make nothing yet."""
        self._rng, self._settings, self._terminals = rng, settings, terminals
        self._required = settings.required_of(terminals)
        self._signature = signature
        self._known, self._met = set(known), set[Expression]()
        self._drawn = ramped_expressions(
            rng, terminals=terminals, max_depth=settings.max_depth, min_depth=settings.min_depth
        )

    def draw(self, count: int) -> list[Candidate]:
        """Return random expressions; fewer where hardly any others are left.

        Args:
            count: How many.
        """
        found: list[Candidate] = []
        failed = 0
        while len(found) < count and failed < MOST_DRAWS:
            candidate = self._new(next(self._drawn), "random")
            failed += 1
            if candidate is not None:
                found.append(candidate)
                failed = 0
        return found

    def breed(self, population: Sequence[Candidate]) -> Candidate | None:
        """Return a child of two of the best, or a random expression where all are known.

        Args:
            population: What to choose parents from, at least two.

        Returns:
            None where hardly any other expressions are left.
        """
        for _ in range(_RETRIES):
            first, second = self._parents(population)
            child, operation = self._child(first.expression, second.expression)
            candidate = self._new(child, operation)
            if candidate is not None:
                return replace(candidate, parents=(first.number, second.number))
        return next(iter(self.draw(1)), None)

    def _parents(self, population: Sequence[Candidate]) -> list[Candidate]:
        if self._settings.selection == "tournament":
            several = max(2, round(_TOURNAMENT * len(population)))
            population = self._rng.sample(population, several)
        best = sorted(population, key=lambda candidate: (candidate.fitness, candidate.number))
        return self._rng.sample(best[: self._settings.parents], 2)

    def _child(self, first: Expression, second: Expression) -> tuple[Expression, Operation]:
        deepest = self._settings.max_depth
        child = crossover(first, second, rng=self._rng, max_depth=deepest)
        if self._rng.random() >= self._settings.mutation:
            return child, "crossover"
        mutant = mutate(child, rng=self._rng, terminals=self._terminals, max_depth=deepest)
        return mutant, "mutation"

    def _new(self, expression: Expression, operation: Operation) -> Candidate | None:
        """Return an expression as a candidate, None where it is not to be evaluated."""
        if self._settings.simplify:
            simpler = simplify(expression, approximate=self._settings.approximate)
            if simpler is None:
                return None
            expression = simpler
        if expression in self._met or expression.depth > self._settings.max_depth:
            return None
        self._met.add(expression)  # a signature may take some time: one for each expression
        if self._required and not self._required & expression.terminals:
            return None
        signature = self._signature(expression)
        if signature is None or signature in self._known:
            return None
        self._known.add(signature)
        return Candidate(0, expression, signature, operation=operation)
