"""Model cards: what the hub reads at the top of a `README.md`, and where an older card goes."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from yopo.upkeep import loading_arguments

logger = logging.getLogger(__name__)

MARK = "<!-- Written by yopo, which overwrites this file for as long as this line is in it. -->"

_TAKEN_OVER = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""What a card says of its model that is true of a pruned one too."""

_CACHED = re.compile(r"models--([^/\\]+)[/\\]snapshots[/\\][^/\\]+[/\\]?$")
"""How the path of a model in the cache of the hub ends."""


def base_name(source: str | Path) -> str:
    """Return what a model that was loaded from `source` is called.

    That is its name on the hub, also where `source` is its folder in the cache; else the name of
    the folder, because the path to it is nobody's business.
    """
    if found := _CACHED.search(str(source)):
        return found[1].replace("--", "/")
    return Path(source).resolve().name if str(source) and Path(source).is_dir() else str(source)


def read_metadata(source: str | Path) -> dict[str, Any]:
    """Return what the card of a model says of its licence, languages and task.

    Args:
        source: A folder, or the name of a model on the hub, whose card is read where it has been
            downloaded already.
    """
    from huggingface_hub.repocard import metadata_load

    file = _find_card(source)
    try:
        found = metadata_load(file) if file is not None else None
    except Exception as error:  # whatever a foreign card holds, it must not keep from pruning
        logger.warning(
            f"The card `{file}` cannot be read, so its licence is not taken over: {error}"
        )
        return {}
    return {
        key: value for key in _TAKEN_OVER if (value := (found or {}).get(key)) and _is_text(value)
    }


def front_matter(fields: Mapping[str, Any]) -> str:
    """Return the block of YAML that begins a card; what is empty is left out."""
    from huggingface_hub.repocard_data import CardData

    return f"---\n{CardData(**{k: v for k, v in fields.items() if v}).to_yaml()}\n---"


def loading_code(model_class: str, *, needs_yopo: bool) -> str:
    """Return how a pruned model is loaded.

    Args:
        model_class: Its class.
        needs_yopo: Whether its config cannot express its widths.
    """
    if needs_yopo:
        arguments = loading_arguments('"path/to/this/folder"', model_class)
        return f'import yopo\n\nmodel = yopo.load({arguments}, dtype="auto")'
    if model_class.endswith(("ForCausalLM", "LMHeadModel")):
        model_class = "AutoModelForCausalLM"
    return (
        f"from transformers import {model_class}\n\n"
        f'model = {model_class}.from_pretrained("path/to/this/folder", dtype="auto")'
    )


def set_aside(file: Path) -> None:
    """Give a file, if it is there, a name that says whose it is: `README.dense.md`.

    What has that name already, as where a model is cut again, becomes `README.dense.2.md`, and so
    on.
    """
    _move_on(file, 0)


def _move_on(file: Path, number: int) -> None:
    """Rename the file of a number to that of the next, which goes out of its way."""
    here, there = (_numbered(file, n) for n in (number, number + 1))
    if here.exists():
        _move_on(file, number + 1)
        here.rename(there)


def _numbered(file: Path, number: int) -> Path:
    part = ("", ".dense")[number] if number < 2 else f".dense.{number}"
    return file.with_name(f"{file.stem}{part}{file.suffix}")


def _find_card(source: str | Path) -> Path | None:
    if not str(source):
        return None
    if Path(source).is_dir():
        file = Path(source) / "README.md"
        return file if file.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(str(source), "README.md")
    except ValueError:  # no name that the hub could have
        return None
    return Path(found) if isinstance(found, str) else None


def _is_text(value: object) -> bool:
    values = value if isinstance(value, list) else [value]
    return all(isinstance(one, str) for one in values)
