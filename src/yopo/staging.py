"""A folder that is there whole or not at all.

What is written goes into a hidden folder beside the place that it is for, which gets its name at
the end. Killed before, a process leaves only that hidden folder, which the next one clears away.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from yopo.errors import InvalidArgumentError

try:
    import fcntl
except ImportError:  # Windows, where nobody is told that two processes write one folder
    fcntl = None  # type: ignore[assignment]

_SPARE = 2**20
"""Bytes that must stay free on the disk."""


def check_target(target: Path, source: Path) -> None:
    """Check that a folder can be written at `target`.

    Raises:
        InvalidArgumentError: If something is there, or it lies inside the source.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise InvalidArgumentError(f"`{target}` exists and is no folder.")
    if target.is_dir() and any(target.iterdir()):
        raise InvalidArgumentError(f"`{target}` exists and is not empty. Name another folder.")
    if source.resolve() in (target.resolve(), *target.resolve().parents):
        raise InvalidArgumentError(f"`{target}` lies inside the source `{source}`.")


def check_space(folder: Path, needed: int) -> None:
    """Check that the disk of a folder holds so many bytes more.

    Raises:
        OSError: If it does not.
    """
    needed, free = needed + _SPARE, shutil.disk_usage(folder).free
    if free < needed:
        told = f"the pruned checkpoint takes {_size(needed)}, and {_size(free)} are free"
        raise OSError(errno.ENOSPC, told, str(folder.parent))


def _size(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def staging_folder(target: Path) -> Path:
    """Return where what is meant for `target` is written until it is complete."""
    target = target.absolute()
    return target.parent / f".{target.name}.partial"


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Give an empty folder that becomes `target` when the block ends without an error.

    After an error, or Ctrl-C, nothing is left of it.

    Raises:
        InvalidArgumentError: If another process is writing the same target.
        OSError: If the folder cannot be written.
    """
    folder = staging_folder(target)
    with _locked(folder.with_suffix(".lock"), target):
        if folder.exists():  # left by a process that was killed
            shutil.rmtree(folder)
        folder.mkdir()
        try:
            yield folder
            with suppress(OSError):  # an empty folder there is in nobody's way, but on Windows
                target.rmdir()
            folder.rename(target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(file: Path, target: Path) -> Iterator[None]:
    """Hold a lock that ends with this process, however it ends, and leave no folder empty.

    It lies beside the folder that it guards: inside, it would have to go before that is complete.
    """
    new = [parent for parent in file.parents if not parent.exists()]
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lock:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The one before may have removed the file in the meantime.
                is_ours = os.fstat(lock.fileno()).st_ino == file.stat().st_ino
            except (BlockingIOError, FileNotFoundError):
                is_ours = False
            except OSError:  # a disk without locks, where nobody is told either
                is_ours = True
            if not is_ours:
                raise InvalidArgumentError(
                    f"another process is writing `{target}` at this moment. Wait for it, or name "
                    "another folder."
                )
        try:
            yield
        finally:
            with suppress(OSError):  # Windows removes no file that is open
                file.unlink()
            for parent in new:
                with suppress(OSError):  # it holds the target, or what others have put there
                    parent.rmdir()
