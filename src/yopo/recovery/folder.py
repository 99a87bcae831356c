"""The folder that makes a recovery resumable: what is being done, checkpoints, the adapter.

Shapes: N windows, W tokens a window.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from yopo.errors import InvalidArgumentError, PolicyFileError, YopoError
from yopo.files import read_folder, write_folder
from yopo.ranks import on_first_rank
from yopo.recovery.adapter import Trained, save_adapter

logger = logging.getLogger(__name__)

_KIND = "recovery"
_ADAPTER = "adapter"
BEST = "best.safetensors"
"""The best adapter so far, in each checkpoint and beside the adapter."""

_CHECKSUMS = "checksums.json"
"""Those of all other files of a checkpoint, written last of all: what has it was whole."""

GOES_ON = (
    "The model is as it was. Free some space and call `recover` again with this `output`: it goes "
    "on from the last checkpoint."
)


class RecoveryFolder:
    """Keep a recovery in a folder, and find what an earlier call has left there.

    Args:
        path: The folder; it need not exist.
        description: What is being done, as JSON has it. A folder that holds another is refused.

    Raises:
        InvalidArgumentError: If the folder holds something else.
        PolicyFileError: If its files are damaged.
    """

    def __init__(self, path: str | Path, description: Mapping[str, Any]) -> None:
        """Look into the folder."""
        self.path = Path(path)
        self._description = dict(description)
        self.text: dict[str, Tensor] | None = None
        if not self.path.exists():
            return
        if not self.path.is_dir() or not (self.path / f"{_KIND}_config.json").exists():
            if self.path.is_dir() and not any(self.path.iterdir()):
                return
            raise InvalidArgumentError(
                f"`output` {self.path} exists and holds no recovery: name another folder."
            )
        found, self.text = read_folder(self.path, _KIND)
        for key, value in self._description.items():
            if found.get(key) != value:
                raise InvalidArgumentError(
                    f"`output` {self.path} holds a recovery with another `{key}`: "
                    f"{_shown(found.get(key), value)}. Name another folder, or delete this one."
                )

    @property
    def trained(self) -> Trained | None:
        """Return what an earlier call has finished, None if there is more to do."""
        file = self.path / _ADAPTER / BEST
        return Trained.load(file) if file.exists() else None

    def begin(self, text: Mapping[str, Tensor]) -> None:
        """Write down what is being done, and the text, unless an earlier call has.

        Raises:
            YopoError: If it cannot be written.
        """
        if self.text is None:
            on_first_rank(lambda: write_folder(self.path, _KIND, self._description, text))

    def last_checkpoint(self) -> Path | None:
        """Return the newest whole checkpoint, None if there is none; newer ones are deleted.

        Raises:
            PolicyFileError: If one is damaged, and there is none before it.
        """
        return on_first_rank(self._last_checkpoint)

    def _last_checkpoint(self) -> Path | None:
        damaged: list[Path] = []
        for folder in sorted(self.path.glob("checkpoint-*"), key=_number, reverse=True):
            file = _damaged_file(folder)
            if not (folder / _CHECKSUMS).exists():  # whoever was writing it has been interrupted
                shutil.rmtree(folder, ignore_errors=True)
            elif file is not None:
                damaged.append(file)
            else:
                for file in damaged:
                    logger.warning("`%s` is damaged: going on from the checkpoint before.", file)
                    shutil.rmtree(file.parent, ignore_errors=True)
                return folder
        if damaged:
            raise PolicyFileError(
                f"`{damaged[0]}` is damaged, and no checkpoint before it is whole. Delete all "
                f"`checkpoint-*` in `{self.path}`, and the same call begins anew."
            )
        return None

    def finish(self, adapted: Any, trained: Trained) -> None:
        """Write the adapter as peft does, all or nothing, and drop the checkpoints.

        Raises:
            YopoError: If it cannot be written.
        """

        def work() -> None:
            partial = self.path / f".{_ADAPTER}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            try:
                save_adapter(adapted, partial)
                trained.save(partial / BEST)
                partial.rename(self.path / _ADAPTER)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            for folder in self.path.glob("checkpoint-*"):
                with suppress(OSError):
                    shutil.rmtree(folder)

        try:
            on_first_rank(work)
        except YopoError as error:
            raise YopoError(
                f"cannot write the adapter into `{self.path}`: {error}. {GOES_ON}"
            ) from error


def seal(checkpoint: Path) -> None:
    """Write down that a checkpoint is whole, with checksums of its files."""
    sums = {file.name: _sha256(file) for file in checkpoint.iterdir()}
    (checkpoint / _CHECKSUMS).write_text(json.dumps(sums), encoding="utf-8")


def _damaged_file(checkpoint: Path) -> Path | None:
    """Return a file of a checkpoint that is not as it was written, None if all are."""
    file = checkpoint / _CHECKSUMS
    try:
        sums: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))
        for name, found in sums.items():
            file = checkpoint / name
            if _sha256(file) != found:
                return file
    except (OSError, ValueError):
        return file
    return None


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def checksum(tokens: Tensor) -> str:
    """Return a checksum of token ids."""
    shape = str(tuple(tokens.shape)).encode()
    return hashlib.sha256(shape + tokens.contiguous().cpu().numpy().tobytes()).hexdigest()


def _shown(found: Any, wanted: Any) -> str:
    """Return how two entries of a description differ, fields of settings one by one."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        differ = [key for key in wanted if found.get(key) != wanted[key]]
        return ", ".join(f"`{key}` {found.get(key)} instead of {wanted[key]}" for key in differ)
    return f"{found!r:.20} instead of {wanted!r:.20}"
