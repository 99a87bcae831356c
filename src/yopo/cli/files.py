"""What commands write, and where they may."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from yopo.errors import InvalidArgumentError, YopoError
from yopo.ranks import rank_and_count
from yopo.staging import staged


def check_output(folder: Path) -> None:
    """Check that nothing is in the way of what is to be written into a folder.

    Raises:
        InvalidArgumentError: If it is not empty, or no folder.
    """
    if folder.exists() and not folder.is_dir():
        raise InvalidArgumentError(f"`--output {folder}` exists and is no folder.")
    if folder.exists() and any(folder.iterdir()):
        raise InvalidArgumentError(f"`--output {folder}` exists and is not empty.")


@contextmanager
def written(target: Path) -> Iterator[Path | None]:
    """Give the first rank a folder that becomes `target` when the block ends, and others none.

    Raises:
        InvalidArgumentError: If another process is writing the same target.
        YopoError: If it cannot be written.
    """
    if rank_and_count()[0] > 0:
        yield None
        return
    try:
        with staged(target) as folder:
            yield folder
    except SafetensorError as error:  # which says in words alone that the disk is full
        raise YopoError(f"cannot write `{target}`: {error}.") from error


def check_json(file: Path | None) -> None:
    """Check that a file can be written.

    Raises:
        InvalidArgumentError: If its folder does not exist.
    """
    if file is not None and not file.absolute().parent.is_dir():
        raise InvalidArgumentError(f"`--json {file}` is in a folder that does not exist.")


def write_json(file: Path, values: dict[str, Any]) -> None:
    """Write figures into a file."""
    file.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def copy_tokenizer(source: str, target: Path) -> None:
    """Write the tokenizer of `source`, if it has one, beside the pruned model."""
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(source).save_pretrained(target)
    except (OSError, ValueError, KeyError):
        print(f"{source} has no tokenizer to copy.")
