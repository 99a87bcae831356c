"""The genetic search for a symbolic metric, and the random search that it has to beat.

Pruner-Zero publishes a population of 50, 300 iterations, two parents out of the 10 best, one
crossover, a mutation with probability 0.5, and that children are simplified before they are
evaluated and added. Its released code contains no search. What a child replaces, what happens to
children that are like known ones, and the kinds of mutation are reconstructed; `EvolutionSettings`
and `yopo.symbolic.growing` say how.
"""

import logging
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from math import inf, isfinite
from pathlib import Path
from typing import Any

from yopo.errors import InvalidArgumentError, YopoError
from yopo.ranks import check_agreement, rank_and_count
from yopo.symbolic.breeding import MOST_DRAWS, Breeder
from yopo.symbolic.evaluating import Evaluator, Fitness, check_fitness, signature_of
from yopo.symbolic.history import Candidate, Evolution
from yopo.symbolic.search_log import SearchLog
from yopo.symbolic.settings import (
    EvolutionSettings,
    Replacement,
    check_integer,
    check_terminals,
    settings_of,
)

logger = logging.getLogger(__name__)


def evolve(
    fitness: Fitness,
    *,
    settings: EvolutionSettings | None = None,
    terminals: Iterable[str] = ("W", "G", "X"),
    seed: int = 0,
    folder: str | Path | None = None,
    workers: int = 1,
) -> Evolution:
    """Search for the expression of the lowest fitness, by evolution and then at random.

    The result depends on the fitness, the settings, the terminals and the seed, not on how many
    processes share the work. Where `torchrun` has started several, each calls this, and all end
    with the same.

    Ctrl-C ends the search early once it has evaluated its first population: the best so far is
    returned, and a warning says so. Under `torchrun` it ends the run.

    Args:
        fitness: From an expression to a number, the lower the better, such as a perplexity. Where
            it is not finite, or an `InvalidArgumentError` is raised, the expression counts as the
            worst there is; any other error ends the search. A method `signature` may tell, as
            bytes, which expressions need no evaluation of their own, as they prune the same
            weights, and with None which are worth none; without it those of the same text do not.
            An attribute `fingerprint`, a text, tells it from others when a search is continued.
        settings: How to go on; by default what is published.
        terminals: What expressions are made of, of `yopo.symbolic.TERMINALS`.
        seed: Seed of all randomness, at least 0. The global generators are left as they were.
        folder: Where each evaluation is written as soon as it is done. The same call goes on from
            there, whatever has ended the one before, and comes to the same end; with more
            `iterations` it goes further. Where there is an end, `Evolution.load` reads it. Give a
            fitness of several measures a `fingerprint`: nothing else tells that it has changed.
        workers: How many processes evaluate at once, each with a copy of `fitness`, at least 1.
            More than `offspring` have nothing to do but at the beginning and in the random search.
            They use as many threads as this one, `torch.get_num_threads()`, as figures may depend
            on it in their last digits.

    Raises:
        InvalidArgumentError: If an argument is outside its range, there are hardly any expressions
            to choose from, `folder` holds another search, or ranks are about to do different
            things.
        PolicyFileError: If what is in `folder` is damaged, or it cannot be written.
        YopoError: If no expression of the first population has a finite fitness, or a worker dies.

    Example:
        >>> fitness = yopo.symbolic.DivergenceFitness(model, 0.3)
        >>> terminals = yopo.symbolic.ROW_TERMINALS
        >>> evolution = yopo.symbolic.evolve(fitness, terminals=terminals, folder="search")
        >>> print(evolution.expression, evolution.best.fitness)
    """
    from transformers.utils.logging import tqdm

    check_fitness(fitness)
    settings = settings_of(settings)
    terminals = check_terminals("terminals", terminals)
    if not terminals:
        raise InvalidArgumentError("`terminals` is empty: there is nothing to make expressions of.")
    check_integer("seed", seed, 0)
    check_integer("workers", workers, 1)
    settings.required_of(terminals)
    job = _job(fitness, settings, terminals, seed)
    check_agreement("evolve", job, settings)
    log = SearchLog(folder, job)
    total = settings.population + settings.iterations * (1 + settings.random_search)
    with (
        Evaluator(fitness, workers=workers, log=log) as evaluator,
        tqdm(total=total, desc="evolve", unit="expression") as progress,
    ):
        search = _Search(fitness, settings, terminals, seed, evaluator, progress)
        _run(search, settings)
    evolution = Evolution(tuple(search.history), tuple(search.random), settings, terminals, seed)
    if folder is not None and rank_and_count()[0] == 0:
        evolution.save(folder)
    return evolution


def _job(
    fitness: Fitness, settings: EvolutionSettings, terminals: Sequence[str], seed: int
) -> dict[str, Any]:
    """Return what two searches have to share for one to go on where the other has ended."""
    fingerprint = getattr(fitness, "fingerprint", None)
    further = ("iterations", "random_search")  # how far a search goes changes nothing before
    return {
        "settings": {key: value for key, value in asdict(settings).items() if key not in further},
        "terminals": list(terminals),
        "seed": seed,
        "fingerprint": None if fingerprint is None else str(fingerprint),
    }


def _run(search: "_Search", settings: EvolutionSettings) -> None:
    """Search to the end, or until Ctrl-C."""
    search.begin()
    try:
        search.go_on()
        if settings.random_search:
            search.draw()
    except KeyboardInterrupt:
        if rank_and_count()[1] > 1:  # each was interrupted elsewhere
            raise
        logger.warning(
            "Interrupted after %d of %d iterations; the best expression so far is kept.",
            len(search.history) - len(search.first),
            settings.iterations,
        )


class _Search:
    """Do the parts of a search one after another; `history` and `random` tell how far it is."""

    def __init__(
        self,
        fitness: Fitness,
        settings: EvolutionSettings,
        terminals: Sequence[str],
        seed: int,
        evaluator: Evaluator,
        progress: Any,
    ) -> None:
        self._settings, self._evaluator, self._progress = settings, evaluator, progress
        rng = random.Random(seed)
        self._rng_apart = random.Random(rng.getrandbits(64))
        self._breeder_with = partial(
            Breeder,
            settings=settings,
            terminals=terminals,
            signature=partial(signature_of, fitness),
        )
        self._breeder = self._breeder_with(rng)
        self._best = inf
        self.first: list[Candidate] = []
        self.history: list[Candidate] = []
        self.random: list[Candidate] = []

    def begin(self) -> None:
        """Evaluate random expressions.

        Raises:
            InvalidArgumentError: If there are hardly any.
            YopoError: If none has a finite fitness.
        """
        drawn = self._breeder.draw(self._settings.population)
        if len(drawn) < 2:
            raise InvalidArgumentError(
                f"of {MOST_DRAWS} random expressions {len(drawn)} could be evaluated: all others "
                "are constant, lack what is `required`, or are refused by `fitness.signature`. "
                "Use more `terminals`, or a greater `max_depth`."
            )
        if len(drawn) < self._settings.population:
            logger.warning("There are hardly more than %d expressions to begin with.", len(drawn))
        self.first = self._evaluate(drawn, self.history)
        if not any(isfinite(candidate.fitness) for candidate in self.first):
            raise YopoError(
                f"none of the first {len(self.first)} expressions has a finite fitness. "
                "To see why, call `fitness(yopo.symbolic.Expression.parse("
                f"{str(self.first[0].expression)!r}))`."
            )

    def go_on(self) -> None:
        """Breed, evaluate, add and drop, as often as the settings say."""
        population = list(self.first)
        for start in range(0, self._settings.iterations, self._settings.offspring):
            most = min(self._settings.offspring, self._settings.iterations - start)
            bred = [self._breeder.breed(population) for _ in range(most)]
            children = [
                replace(child, iteration=start + number)
                for number, child in enumerate(bred, 1)
                if child is not None
            ]
            for child in self._evaluate(children, self.history):
                _add(population, child, self._settings.replacement)
            if len(children) < most:
                logger.warning("The search ends early: hardly any other expressions are left.")
                return

    def draw(self) -> None:
        """Evaluate as many random expressions as the search has evaluated, from its first ones on.

        They have a generator of their own: however the search goes on, they stay the same.
        """
        self.random += self.first
        known = [candidate.signature for candidate in self.first]
        breeder = self._breeder_with(self._rng_apart, known=known)
        drawn = breeder.draw(len(self.history) - len(self.first))
        for start in range(0, len(drawn), self._evaluator.at_once):
            self._evaluate(drawn[start : start + self._evaluator.at_once], self.random)
        found = min(self.random, key=lambda candidate: candidate.fitness)
        if found.fitness < min(candidate.fitness for candidate in self.history):
            logger.warning(
                "Random search has found a better expression than evolution, of fitness %.4g: %s",
                found.fitness,
                found.expression,
            )

    def _evaluate(
        self, candidates: Sequence[Candidate], evaluated: list[Candidate]
    ) -> list[Candidate]:
        """Measure candidates, add them to those that were, numbered, and return them."""
        numbered = [
            replace(candidate, number=number)
            for number, candidate in enumerate(candidates, len(evaluated))
        ]
        search = "evolution" if evaluated is self.history else "random"
        done = []
        for candidate in self._evaluator.evaluate(numbered, search=search):
            done.append(candidate)
            self._best = min(self._best, candidate.fitness)
            self._progress.set_postfix_str(f"best {self._best:.4g}", refresh=False)
            self._progress.update()
        done.sort(key=lambda candidate: candidate.number)
        evaluated += done
        return done


def _add(population: list[Candidate], child: Candidate, replacement: Replacement) -> None:
    """Let a child join a population, and another leave it."""
    population.append(child)
    if replacement == "oldest":
        del population[0]
    elif replacement == "worst":
        population.remove(max(population, key=lambda other: (other.fitness, other.number)))
