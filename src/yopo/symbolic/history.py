"""What an evolution has found: every expression that was evaluated, and where each came from."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from math import inf, isfinite
from pathlib import Path
from typing import Any, Literal, Self

from yopo.errors import InvalidArgumentError, PolicyFileError
from yopo.files import read_folder, write_folder
from yopo.symbolic.expression import Expression
from yopo.symbolic.settings import EvolutionSettings

Operation = Literal["random", "crossover", "mutation"]

_KIND = "evolution"


@dataclass(frozen=True, slots=True)
class Candidate:
    """Hold an expression and its fitness.

    Attributes:
        number: Its place among those that were evaluated, counted from 0.
        expression: As it was evaluated.
        signature: What all expressions share that need no evaluation of their own, in hexadecimal.
        fitness: The lower, the better; infinite where there is no finite number.
        operation: What made it, last of all: drawn at "random", "crossover" of its parents, or
            "mutation" after that.
        parents: The numbers of the two that it was made from; empty where it is random.
        iteration: In which iteration it was made, counted from 1; 0 before the first.
    """

    number: int
    expression: Expression
    signature: str
    fitness: float = inf
    operation: Operation = "random"
    parents: tuple[int, ...] = ()
    iteration: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON has it; an infinite fitness is null."""
        return {
            "number": self.number,
            "expression": str(self.expression),
            "signature": self.signature,
            "fitness": self.fitness if isfinite(self.fitness) else None,
            "operation": self.operation,
            "parents": list(self.parents),
            "iteration": self.iteration,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return what `to_dict` has described.

        Args:
            values: That.
        """
        return cls(
            number=values["number"],
            expression=Expression.parse(values["expression"]),
            signature=values["signature"],
            fitness=inf if values["fitness"] is None else float(values["fitness"]),
            operation=values["operation"],
            parents=tuple(values["parents"]),
            iteration=values["iteration"],
        )


@dataclass(frozen=True, slots=True)
class Evolution:
    """Hold what a search has evaluated, and a random search beside it.

    Attributes:
        history: Every expression that the search has evaluated, in order; no two are alike.
        random: As many that a random search has evaluated; empty where there was none. It begins
            with the same ones as the search: those before the first iteration.
        settings: How the search went on.
        terminals: What expressions were made of.
        seed: Seed of all randomness.
    """

    history: tuple[Candidate, ...]
    random: tuple[Candidate, ...]
    settings: EvolutionSettings
    terminals: tuple[str, ...]
    seed: int

    @property
    def best(self) -> Candidate:
        """Return the first of the best that the search has found."""
        return min(self.history, key=lambda candidate: candidate.fitness)

    @property
    def expression(self) -> Expression:
        """Return the best expression that the search has found."""
        return self.best.expression

    def best_so_far(self) -> tuple[float, ...]:
        """Return the best fitness after each evaluation of the search."""
        return best_so_far(self.history)

    def family_tree(self) -> str:
        """Return the ancestors of the best expression as indented text, each once in full.

        Of a metric of weights it may read

            #61 6.881: mul(sqr(W), mms(G)), by mutation in iteration 12
              #40 6.954: mul(W, mms(G)), at random
              #17 7.262: sqr(W), at random

        Example:
            >>> fitness = yopo.symbolic.SpectralFitness(model, 0.3)
            >>> evolution = yopo.symbolic.evolve(fitness, terminals=yopo.symbolic.ROW_TERMINALS)
            >>> print(evolution.family_tree())
        """
        lines = []
        shown: set[int] = set()
        # A stack, as families may be older than Python's own stack is deep.
        waiting = [(self.best.number, 0)]
        while waiting:
            number, generation = waiting.pop()
            indent, found = "  " * generation, self.history[number]
            if number in shown:
                lines.append(f"{indent}#{number}, as above")
                continue
            shown.add(number)
            how = f"by {found.operation} in iteration {found.iteration}"
            if not found.parents:
                how = f"at random{f' in iteration {found.iteration}' if found.iteration else ''}"
            lines.append(f"{indent}#{number} {found.fitness:.4g}: {found.expression}, {how}")
            waiting += [(parent, generation + 1) for parent in reversed(found.parents)]
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Write it into the folder `path`.

        Raises:
            PolicyFileError: If the folder cannot be written.
        """
        config = {
            "settings": asdict(self.settings),
            "terminals": self.terminals,
            "seed": self.seed,
            "history": [candidate.to_dict() for candidate in self.history],
            "random": [candidate.to_dict() for candidate in self.random],
        }
        write_folder(path, _KIND, config, {})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote, or `evolve` when it was done.

        Args:
            path: The folder.

        Raises:
            PolicyFileError: If it is missing, damaged, foreign or of a newer format.
        """
        config, _ = read_folder(path, _KIND)
        try:
            return cls(
                history=tuple(map(Candidate.from_dict, config["history"])),
                random=tuple(map(Candidate.from_dict, config["random"])),
                settings=EvolutionSettings(**config["settings"]),
                terminals=tuple(config["terminals"]),
                seed=config["seed"],
            )
        except (KeyError, TypeError, ValueError, AttributeError, InvalidArgumentError) as error:
            raise PolicyFileError(f"`{path}` holds a damaged evolution: {error}.") from error


def best_so_far(candidates: Sequence[Candidate]) -> tuple[float, ...]:
    """Return the best fitness after each evaluation.

    Args:
        candidates: What was evaluated, in order.
    """
    return tuple(accumulate((candidate.fitness for candidate in candidates), min))
