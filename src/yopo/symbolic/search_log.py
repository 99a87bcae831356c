"""What a search has evaluated, on disk: one line each, so that a killed search goes on.

A search depends on nothing but its seed and what is measured. Done once more with what was measured
at hand, it comes by the same way to where it was.
"""

import json
import os
from collections.abc import Mapping
from math import inf
from pathlib import Path
from typing import Any

from yopo.errors import InvalidArgumentError, PolicyFileError
from yopo.files import FORMAT
from yopo.ranks import on_first_rank, rank_and_count
from yopo.symbolic.history import Candidate

LOG_FILE = "evaluations.jsonl"

_KIND = "yopo-evaluations"


class SearchLog:
    """Know what was evaluated, and write it down where there is a folder.

    The first rank reads and writes, and tells the others what it has read.

    Args:
        folder: Where to; None keeps it in memory.
        job: What is being done, as JSON has it. A folder that holds another job is refused.

    Attributes:
        known: The fitness by signature.

    Raises:
        InvalidArgumentError: If the folder holds something else.
        PolicyFileError: If the log is damaged, or cannot be written.
        YopoError: Either, on ranks other than the first.
    """

    def __init__(self, folder: str | Path | None, job: Mapping[str, Any]) -> None:
        """Read what an earlier call has left."""
        self.known: dict[str, float] = {}
        self._file: Path | None = None
        if folder is None:
            return
        file = Path(folder) / LOG_FILE
        self.known = on_first_rank(lambda: _opened(file, job))
        if rank_and_count()[0] == 0:
            self._file = file

    def add(self, candidate: Candidate, search: str) -> None:
        """Remember an evaluation, on disk before this returns.

        Args:
            candidate: What was evaluated.
            search: By which search.

        Raises:
            PolicyFileError: If it cannot be written.
        """
        self.known[candidate.signature] = candidate.fitness
        if self._file is not None:
            _append(self._file, {"search": search, **candidate.to_dict()})


def check_folder(folder: Path) -> None:
    """Check that a search may be written into a folder, or go on from there.

    Args:
        folder: Where to.

    Raises:
        InvalidArgumentError: If it holds something else.
    """
    is_taken = folder.exists() and (folder.is_file() or any(folder.iterdir()))
    if is_taken and not (folder / LOG_FILE).exists():
        raise InvalidArgumentError(
            f"`folder` {folder} exists and holds no search: name another folder."
        )


def _opened(file: Path, job: Mapping[str, Any]) -> dict[str, float]:
    """Return what is in the log, ready to be added to; a new one where there is none."""
    header = json.loads(json.dumps({"kind": _KIND, "format": FORMAT, **job}))
    folder = file.parent
    check_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with file.open("a+b") as stream:
            stream.seek(0)
            whole = stream.read().rpartition(b"\n")[0]
            # A line without an end is what a killed process was about to write.
            stream.truncate(len(whole) + 1 if whole else 0)
    except OSError as error:
        raise PolicyFileError(f"cannot write `{file}`: {error}.") from error
    if not whole:
        _append(file, header)
        return {}
    lines = whole.split(b"\n")
    _check_header(file, _parsed(file, 1, lines[0]), header)
    known = {}
    for number, line in enumerate(lines[1:], 2):
        entry = _parsed(file, number, line)
        try:
            fitness = entry["fitness"]
            known[str(entry["signature"])] = inf if fitness is None else float(fitness)
        except (KeyError, TypeError, ValueError) as error:
            raise PolicyFileError(f"line {number} of `{file}` is damaged: {error!r}.") from error
    return known


def _append(file: Path, entry: Mapping[str, Any]) -> None:
    """Add a line, all at once, and wait until the disk has it."""
    try:
        with file.open("ab") as stream:
            stream.write(json.dumps(entry).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise PolicyFileError(f"cannot write `{file}`: {error}.") from error


def _parsed(file: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise PolicyFileError(f"line {number} of `{file}` is damaged: {error}.") from error
    if not isinstance(entry, dict):
        raise PolicyFileError(f"line {number} of `{file}` is damaged: it is {entry!r:.20}.")
    return entry


def _check_header(file: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Check that a log is that of the job at hand."""
    if found.get("kind") != _KIND:
        raise PolicyFileError(f"`{file}` was not written by yopo as the log of a search.")
    if not isinstance(found.get("format"), int) or found["format"] > FORMAT:
        raise PolicyFileError(
            f"`{file}` has format {found.get('format')!r}, this yopo reads up to {FORMAT}. "
            "Update yopo (`pip install --upgrade yopo-prune`)."
        )
    found, wanted = ({**job, **job.get("settings", {})} for job in (found, wanted))
    for key in wanted:
        if key not in ("settings", "format") and found.get(key) != wanted[key]:
            raise InvalidArgumentError(
                f"`folder` {file.parent} holds a search with another `{key}`: "
                f"{found.get(key)!r} instead of {wanted[key]!r}. Name another folder, or delete "
                "this one."
            )
