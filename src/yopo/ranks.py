"""Several processes that do one job together, as `torchrun` starts them.

Every rank calls the same function with the same arguments, does its share of the pieces, and hears
of the others what they have found, so that all end with the same. Piece n belongs to rank n modulo
their number. Without `torchrun` there is one rank, and it owns everything.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed

from yopo.errors import InvalidArgumentError, YopoError

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def rank_and_count() -> tuple[int, int]:
    """Return the number of this process and how many there are.

    A process that `torchrun` has started joins the others here, unless it has done so already.
    """
    if not distributed.is_available():
        return 0, 1
    if not distributed.is_initialized():
        if not distributed.is_torchelastic_launched():
            return 0, 1
        distributed.init_process_group()
    return distributed.get_rank(), distributed.get_world_size()


def own(pieces: Sequence[Piece]) -> list[Piece]:
    """Return the pieces that belong to this rank."""
    rank, count = rank_and_count()
    return list(pieces[rank::count])


def gather(found: Sequence[Piece]) -> list[Piece]:
    """Return what all ranks have found for their own pieces, in the order of all pieces.

    Args:
        found: What this rank has found, one for each of its own pieces.
    """
    _, count = rank_and_count()
    if count == 1:
        return list(found)
    shares: list[Any] = [None] * count
    distributed.all_gather_object(shares, list(found))
    return [shares[n % count][n // count] for n in range(sum(map(len, shares)))]


def gather_vectors(found: Sequence[Tensor], *, pieces: int, size: int) -> list[Tensor]:
    """Return what `gather` returns, at less cost, where it is vectors of one size.

    Args:
        found: What this rank has found, one for each of its own pieces, each `(size,)` in float32.
        pieces: How many all ranks have found.
        size: Numbers of a vector.
    """
    _, count = rank_and_count()
    if count == 1:
        return list(found)
    on_cpu = "cpu" in distributed.get_backend_config()
    device = torch.device("cpu") if on_cpu else torch.accelerator.current_accelerator()
    mine = torch.zeros(-(-pieces // count), size, device=device, dtype=torch.float32)
    for number, vector in enumerate(found):
        mine[number] = vector
    shares = [torch.empty_like(mine) for _ in range(count)]
    distributed.all_gather(shares, mine)
    return [shares[n % count][n // count] for n in range(pieces)]


def on_first_rank(work: Callable[[], Result]) -> Result:
    """Let the first rank do some work that all wait for, and return to all what it gives.

    Raises:
        YopoError: If it fails, on all ranks.
    """
    found: Result | None = None
    failed: Exception | None = None
    if rank_and_count()[0] == 0:
        try:
            found = work()
        except Exception as error:
            failed = error
    found, told = gather([(found, None if failed is None else str(failed))])[0]
    if isinstance(failed, YopoError):
        raise failed
    if told is not None:
        raise YopoError(told) from failed
    return cast(Result, found)


@contextmanager
def failing_together() -> Iterator[None]:
    """Wait at the end of a block for all ranks, and fail on all if one has failed within it.

    Inside, ranks must not ask for what others have found.

    Raises:
        YopoError: If another rank has failed; its own error is raised on the rank itself.
    """
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    texts = gather([None if failed is None else str(failed)])
    told = [text for text in texts if text is not None]
    if failed is not None:
        raise failed
    if told:
        raise YopoError(f"another rank of this run failed: {told[0]}")


def check_agreement(job: str, *arguments: object) -> None:
    """Check that all ranks are about to do the same.

    Raises:
        InvalidArgumentError: If they are not.
    """
    rank, count = rank_and_count()
    if count == 1:
        return
    jobs: list[Any] = [None] * count
    distributed.all_gather_object(jobs, repr((job, arguments)))
    if other := next((n for n in range(count) if jobs[n] != jobs[rank]), None):
        raise InvalidArgumentError(
            f"rank {rank} and rank {other} of this run do different things: `{job}` shares its "
            "work out over all ranks, so each has to call it with the same model and arguments. "
            "For one model a rank, run without `torchrun` and without a process group."
        )
