"""Texts to measure perplexity on: by name, from a local file, or given; and their tokens.

Shapes: T tokens.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from yopo.errors import InvalidArgumentError, missing_extra

logger = logging.getLogger(__name__)

_FEWEST = 0.9
"""A tokenizer has at least this share of tokens as its model has embeddings, which are padded."""


def _wikitext2(load_dataset: Any) -> str:
    rows = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")
    return "\n\n".join(rows["text"])


def _ptb(load_dataset: Any) -> str:
    rows = load_dataset(
        "ptb-text-only/ptb_text_only", split="test", revision="refs/convert/parquet"
    )
    return " ".join(rows["sentence"])


def _c4(load_dataset: Any) -> str:
    file = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
    rows = load_dataset("allenai/c4", data_files=file, split="validation[:1100]")
    return " ".join(rows["text"])


def _alpaca(load_dataset: Any) -> str:
    rows = load_dataset("tatsu-lab/alpaca", split="train")
    return "\n\n".join(rows.train_test_split(test_size=0.2, seed=42)["test"]["text"])


NAMED: dict[str, Callable[[Any], str]] = {
    "wikitext2": _wikitext2,
    "ptb": _ptb,
    "c4": _c4,
    "alpaca": _alpaca,
}
"""Texts on the hub, put together as the papers of the field do.

WikiText-2: the raw test split, lines joined by blank lines. PTB: the test split, joined by spaces.
C4: the first 1100 documents of the first validation shard, joined by spaces. Alpaca: the prompts
with their answers of the fifth that SliceGPT sets apart, joined by blank lines."""


def read_text(source: str | Path, *, field: str = "text") -> str:
    """Return a text.

    Args:
        source: "wikitext2", "ptb", "c4" or "alpaca", which are downloaded; or the path of a local
            file: text, or JSON, a list of strings or of objects, or one such a line (`.jsonl`).
            What a JSON file holds is joined by blank lines.
        field: Which entry of JSON objects holds the text.

    Raises:
        InvalidArgumentError: If the file is missing, damaged or empty, or objects have no `field`.
        YopoError: If a name needs `datasets`, which is not installed.
        OSError: If it cannot be downloaded.
    """
    if str(source) in NAMED:
        return _downloaded(str(source))
    file = Path(source)
    if not is_file(source):
        raise InvalidArgumentError(
            f"{str(source)!r:.80} is no file, and none of the texts that have a name: "
            f"{', '.join(NAMED)}."
        )
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix in (".json", ".jsonl"):
            text = "\n\n".join(_entries(text, file.suffix == ".jsonl", field))
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidArgumentError(
            f"`{file}` cannot be read as {file.suffix or 'text'}: {error!r}. JSON must hold "
            f"strings, or objects with a string under {field!r}."
        ) from error
    if not text.strip():
        raise InvalidArgumentError(f"`{file}` holds no text.")
    return text


def is_file(source: str | Path) -> bool:
    """Tell whether there is such a file; a text in the place of a path is too long to be one."""
    try:
        return Path(source).is_file()
    except OSError:
        return False


def tokens_of(source: Tensor | str | Path, tokenizer: Any) -> Tensor:
    """Return a row of token ids `(T,)`.

    Args:
        source: Token ids, as `(T,)` or `(1, T)`; a path; or a string: the name of a text, or the
            text itself.
        tokenizer: Turns text into tokens; special ones that it adds are kept.

    Raises:
        InvalidArgumentError: If there is no text, or no tokenizer for it.
        YopoError: As `read_text`.
        OSError: As `read_text`.
    """
    if isinstance(source, Tensor):
        if source.dtype != torch.int64 or source.dim() not in (1, 2):
            raise InvalidArgumentError(
                "tokens must be int64 ids of shape (T,), got "
                f"{source.dtype} of shape {tuple(source.shape)}."
            )
        if source.dim() == 2 and len(source) > 1:
            raise InvalidArgumentError(
                f"tokens must be one row of ids, got {len(source)}: for rows that belong to one "
                "text, pass `tokens.flatten()`."
            )
        return source.flatten()
    if not isinstance(source, str | Path):
        raise InvalidArgumentError(
            f"a text must be a string, a `Path` or token ids, got {type(source).__name__}. Join "
            "several by blank lines."
        )
    text = read_text(source) if isinstance(source, Path) or source in NAMED else source
    if not text.strip():
        raise InvalidArgumentError("the text is empty.")
    if tokenizer is None:
        raise InvalidArgumentError("`tokenizer` is needed for text; or pass token ids.")
    # A tokenizer warns of texts longer than the model reads, which is cut into windows here.
    ids = tokenizer(text, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64, device="cpu")


def check_tokenizer(model: nn.Module, tokenizer: Any) -> None:
    """Check that a model has an embedding for every token of a tokenizer.

    If the tokenizer has far fewer tokens than there are embeddings, the log warns.

    Raises:
        InvalidArgumentError: If it has fewer.
    """
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    rows, tokens = len(embeddings.weight), len(tokenizer)
    if tokens > rows:
        raise InvalidArgumentError(
            f"`tokenizer` has {tokens} tokens, but the model has embeddings for {rows}: it is not "
            "the model's own."
        )
    if tokens < _FEWEST * rows:
        logger.warning(
            f"`tokenizer` has {tokens} tokens, but the model has embeddings for {rows}. Is it the "
            "model's own?"
        )


def _downloaded(name: str) -> str:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise missing_extra(
            f"{name!r} is downloaded by datasets; pass a file or a text of your own, or install it",
            "eval",
        ) from error
    try:
        return NAMED[name](load_dataset)
    except ConnectionError as error:
        raise OSError(
            f"{name!r} cannot be downloaded: {error}. On a machine without a network, pass the "
            "path of a file that holds it."
        ) from error


def _entries(text: str, by_line: bool, field: str) -> list[str]:
    """Return the texts that JSON holds."""
    found = [json.loads(line) for line in text.splitlines() if line.strip()] if by_line else None
    entries = json.loads(text) if found is None else found
    if not isinstance(entries, list):
        raise TypeError("not a list")
    texts = [entry if isinstance(entry, str) else entry[field] for entry in entries]
    if not all(isinstance(entry, str) for entry in texts):
        raise TypeError("not text")
    return texts
