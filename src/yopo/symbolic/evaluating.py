"""Evaluate expressions, each once: here, in other processes, or shared out over ranks."""

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from hashlib import blake2b
from math import inf, isfinite
from multiprocessing.connection import Connection
from typing import Any, Self

import torch

from yopo.errors import InvalidArgumentError, YopoError
from yopo.ranks import gather, own, rank_and_count
from yopo.symbolic.expression import Expression
from yopo.symbolic.history import Candidate
from yopo.symbolic.search_log import SearchLog

Fitness = Callable[[Expression], float]
"""From an expression to a number, the lower the better.

It may have a method `signature`, from an expression to bytes, the same for all expressions that
need no evaluation of their own, or None for one that is not worth any; and an attribute
`fingerprint`, a text that tells it from others, so that a search is not continued with another.
"""


def check_fitness(fitness: object) -> None:
    """Check that what was given as `fitness` can be called.

    Raises:
        InvalidArgumentError: If it cannot.
    """
    if not callable(fitness):
        raise InvalidArgumentError(
            f"`fitness` must be a function from an expression to a number, got {fitness!r}."
        )


def fitness_of(fitness: Fitness, expression: Expression) -> float:
    """Return the fitness of an expression, infinite where there is no finite one.

    Args:
        fitness: What measures it. That it raises an `InvalidArgumentError` means that it cannot be
            measured.
        expression: What to measure.

    Raises:
        InvalidArgumentError: If it returns something that is no number.
    """
    try:
        value: Any = fitness(expression)
    except InvalidArgumentError:
        return inf
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(
            f"`fitness` must return a number, the lower the better, got {value!r} for "
            f"`{expression}`."
        ) from error
    return number if isfinite(number) else inf


def signature_of(fitness: Fitness, expression: Expression) -> str | None:
    """Return in hexadecimal what expressions share that need no evaluation of their own.

    It is what the method `signature` of the fitness says, without one a checksum of the text.

    Args:
        fitness: What measures expressions.
        expression: One of them.

    Returns:
        None for an expression that is not worth an evaluation.

    Raises:
        InvalidArgumentError: If the method returns something else than bytes or None.
    """
    method = getattr(fitness, "signature", None)
    if method is None:
        return blake2b(str(expression).encode(), digest_size=16).hexdigest()
    found = method(expression)
    if found is None:
        return None
    if not isinstance(found, bytes):
        raise InvalidArgumentError(
            f"`fitness.signature` must return bytes or None, got {found!r} for `{expression}`."
        )
    return found.hex()


class Evaluator:
    """Measure expressions that were not measured before, and write down what was.

    Use it as a context: at its end other processes end as well, whatever they are doing.

    Args:
        fitness: What measures them.
        workers: How many processes do it at once, in each rank; 1 is this one alone.
        log: What was measured before, and where to write what is.
    """

    def __init__(self, fitness: Fitness, *, workers: int, log: SearchLog) -> None:
        """Start nothing yet."""
        self._fitness, self._workers, self._log = fitness, workers, log
        self._pool: ProcessPoolExecutor | None = None
        self._lifeline: Connection | None = None
        self._futures: list[Future[float]] = []

    def __enter__(self) -> Self:
        """Return this."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the other processes, at once where they are still at work."""
        if self._pool is None or self._lifeline is None:
            return
        if not all(future.done() for future in self._futures):
            self._lifeline.close()
        self._pool.shutdown(cancel_futures=True)
        self._lifeline.close()

    @property
    def at_once(self) -> int:
        """Return how many expressions are measured at once, by all ranks together."""
        return self._workers * rank_and_count()[1]

    def evaluate(self, candidates: Sequence[Candidate], *, search: str) -> Iterator[Candidate]:
        """Yield candidates with their fitness, those that are known first, others as they are done.

        Args:
            candidates: Of different signatures, the same on all ranks.
            search: What the log calls the search.

        Raises:
            YopoError: If a process has died, or ranks differ in what they measure.
        """
        known = self._log.known
        new = [candidate for candidate in candidates if candidate.signature not in known]
        for candidate in candidates:
            if candidate.signature in known:
                yield replace(candidate, fitness=known[candidate.signature])
        for candidate, fitness in self._shared(new):
            done = replace(candidate, fitness=fitness)
            self._log.add(done, search)
            yield done

    def _shared(self, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, float]]:
        """Measure candidates, each on one rank."""
        if rank_and_count()[1] == 1:
            yield from self._here(candidates)
            return
        for start in range(0, len(candidates), self.at_once):
            batch = candidates[start : start + self.at_once]
            mine = {candidate.signature: fitness for candidate, fitness in self._here(own(batch))}
            found = gather([(each.signature, mine[each.signature]) for each in own(batch)])
            if [signature for signature, _ in found] != [each.signature for each in batch]:
                raise YopoError(
                    "the ranks of this run measure different expressions: `fitness.signature` "
                    "says one thing on one and another on another."
                )
            yield from zip(batch, (fitness for _, fitness in found), strict=True)

    def _here(self, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, float]]:
        """Measure candidates on this rank."""
        if self._workers == 1:
            for candidate in candidates:
                yield candidate, fitness_of(self._fitness, candidate.expression)
            return
        try:
            waiting = {self._submit(candidate): candidate for candidate in candidates}
            for future in as_completed(waiting):
                yield waiting[future], future.result()
        except BrokenProcessPool as error:
            raise YopoError(
                f"one of {self._workers} worker processes has died: out of memory, perhaps, or the "
                'script that started them lacks `if __name__ == "__main__":`. What was evaluated '
                "is in `folder`, if there is one: the same call goes on from there."
            ) from error

    def _submit(self, candidate: Candidate) -> "Future[float]":
        if self._pool is None:
            self._pool, self._lifeline = _pool(self._fitness, self._workers)
        self._futures = [future for future in self._futures if not future.done()]
        future = self._pool.submit(_in_worker, candidate.expression)
        self._futures.append(future)
        return future


def _pool(fitness: Fitness, workers: int) -> tuple[ProcessPoolExecutor, Connection]:
    """Return processes with a fitness of their own, and the pipe at whose end they end."""
    try:
        # Pickled here, as what `multiprocessing` pickles shares the memory of its tensors: workers
        # would prune one and the same model.
        pickled = pickle.dumps(fitness)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise InvalidArgumentError(
            f"`workers={workers}` sends `fitness` to other processes, and it cannot be pickled: "
            f"{error}. Make it a function or a class of a module, or use `workers=1`."
        ) from error
    context = multiprocessing.get_context("spawn")
    end, lifeline = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(
        workers,
        mp_context=context,
        initializer=_begin_worker,
        initargs=(pickled, end, torch.get_num_threads()),
    )
    return pool, lifeline


_own_fitness: list[Fitness] = []
"""In a worker, what it measures with."""


def _begin_worker(pickled: bytes, end: Connection, threads: int) -> None:
    """Set up a worker, which ends when the process that started it does, or lets go of the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is up to that process

    def follow() -> None:
        end.poll(None)
        os._exit(0)

    threading.Thread(target=follow, daemon=True).start()
    torch.set_num_threads(threads)  # what is measured may depend on it in the last digits
    _own_fitness.append(pickle.loads(pickled))


def _in_worker(expression: Expression) -> float:
    return fitness_of(_own_fitness[0], expression)
