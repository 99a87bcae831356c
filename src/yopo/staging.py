"""A folder that is there whole or not at all.

What is written goes into a hidden folder beside the place that it is for, which gets its name at
the end. Killed before, a process leaves only that hidden folder, which the next one clears away.
"""

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
    with _locked(folder, target) as lock:
        try:
            for left in folder.iterdir():  # by a process that was killed
                if left != lock:
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield folder
            lock.unlink()
            with suppress(OSError):  # an empty folder there is in nobody's way, but on Windows
                target.rmdir()
            folder.rename(target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(folder: Path, target: Path) -> Iterator[Path]:
    """Make a folder, and hold a lock in it that ends with this process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The one before may have moved or removed the folder in the meantime.
                is_there = os.fstat(lock.fileno()).st_ino == Path(lock.name).stat().st_ino
            except OSError:
                is_there = False
            if not is_there:
                raise InvalidArgumentError(
                    f"another process is writing `{target}` at this moment. Wait for it, or name "
                    "another folder."
                )
        yield Path(lock.name)
