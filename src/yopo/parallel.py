"""Share work out over the threads of the processor, or over the units of an accelerator.

On the CPU a piece is done by one thread alone. Small matrices gain little from many threads each,
but all of it from a thread each, and what a piece gives depends on nothing else: not on how many
threads, or processes, share the work. An accelerator is filled by many small matrices at once.
"""

import os
import threading
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import torch

from yopo.memory import memory_left

_NAME = "yopo-worker"

Piece = TypeVar("Piece")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Place:
    """Say where a piece of work is done, and how many bytes it takes there.

    Pieces of one place and of one kind can be done together.
    """

    device: torch.device
    bytes: int
    kind: Hashable = None


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    """Return threads that stay: each new one would have memory and tables of its own to set up."""
    return ThreadPoolExecutor(workers, _NAME, initializer=torch.set_num_threads, initargs=(1,))


if hasattr(os, "register_at_fork"):  # a forked child has none of its parent's threads
    os.register_at_fork(after_in_child=_pool.cache_clear)


def map_on_threads(
    function: Callable[[Piece], Result], pieces: Iterable[Piece], *, at_most: int | None = None
) -> list[Result]:
    """Return `function` of each piece, in their order, each worked out by one thread alone.

    As many run at once as torch uses threads. An error, or Ctrl-C, ends the work: pieces that have
    begun are finished, no other is begun, and it is raised here.

    Args:
        function: Called from threads other than this one, several at once.
        pieces: What it is called with.
        at_most: How many may run at once, for pieces that take much memory.
    """
    if threading.current_thread().name.startswith(_NAME):  # one of ours, which waits for no other
        return [function(piece) for piece in pieces]
    threads = torch.get_num_threads()
    workers = max(1, threads if at_most is None else min(threads, at_most))
    futures = [_pool(workers).submit(function, piece) for piece in pieces]
    try:
        return [future.result() for future in futures]
    finally:
        wait([future for future in futures if not future.cancel()])
        torch.set_num_threads(threads)  # what a thread has set, later threads begin with


def on_one_thread(function: Callable[[], Result]) -> Result:
    """Return what `function` gives where torch uses one thread, as in `map_on_threads`."""
    (found,) = map_on_threads(lambda _: function(), [None])
    return found


def map_in_batches(
    function: Callable[[Sequence[Piece]], list[Result]],
    pieces: Sequence[Piece],
    place: Callable[[Piece], Place],
    *,
    at_most: int | None = None,
) -> list[Result]:
    """Return what `function` gives for the pieces, in their order.

    On the CPU each piece is a batch, done by one thread. An accelerator gets as many pieces of one
    place at a time as half of the memory left there holds.

    Args:
        function: From a batch of pieces to a result for each.
        pieces: What there is to do.
        place: Tells where a piece is done.
        at_most: How many batches may run at once on the CPU, where that is not for the memory left
            to tell.
    """
    groups: dict[Place, list[int]] = defaultdict(list)
    for number, piece in enumerate(pieces):
        groups[place(piece)].append(number)

    def run(numbers: Sequence[int]) -> list[Result]:
        return function([pieces[number] for number in numbers])

    results: dict[int, Result] = {}
    for where, numbers in groups.items():
        fit = max(1, memory_left(where.device) // (2 * max(where.bytes, 1)))
        workers = fit if at_most is None else min(fit, at_most)
        on_cpu = where.device.type == "cpu"
        step = 1 if on_cpu else fit
        batches = [numbers[start : start + step] for start in range(0, len(numbers), step)]
        found = map_on_threads(run, batches, at_most=workers) if on_cpu else map(run, batches)
        for batch, values in zip(batches, found, strict=True):
            results |= dict(zip(batch, values, strict=True))
    return [results[number] for number in range(len(pieces))]


Turn = AbstractContextManager[object]
"""What a thread enters for that part of its work that takes most memory."""


def in_pairs(room: int | None, pairs: Iterable[int]) -> tuple[int | None, Turn]:
    """Return how many threads may work at once in so many bytes, and what they enter in turn.

    For work of two parts that take about as long, the second one more memory: while one thread of a
    pair does the second, the other one does the first.

    Args:
        room: How many bytes there are; None where they are not counted.
        pairs: How many a pair takes, for each kind of work. One thread works in any case.
    """
    if room is None:
        return None, nullcontext()
    count = room // max(pairs, default=1)
    return max(1, 2 * count), threading.Semaphore(max(1, count))
