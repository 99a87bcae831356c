"""Text to learn from: given as files, strings or data sets, or written by the dense model.

Shapes: T tokens, N windows, W tokens a window.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from yopo.errors import InvalidArgumentError
from yopo.evaluation.texts import check_tokenizer, is_file, read_text
from yopo.ranks import gather, own
from yopo.writing import SEQUENCES, positions_of, split_into, write_tokens

Data = str | Path | Sequence[str] | Tensor | Any

_BETWEEN = "\n\n"
"""What stands between two texts, as in the published script."""

_FIRST_SEED = 2
"""By how much the seeds of what is written differ from those of evidence and of a reward."""


def write_windows(teacher: nn.Module, *, windows: int, length: int, seed: int) -> Tensor:
    """Return text `(N, W)` that `teacher` writes, each rank a share of it.

    Raises:
        UnsupportedModelError: As `write_tokens`.
    """
    blocks = list(enumerate(split_into(windows, SEQUENCES)))
    written = [
        write_tokens(teacher, sequences=count, length=length, seed=seed + _FIRST_SEED + number)
        for number, count in own(blocks)
    ]
    return torch.cat(gather([inputs["input_ids"].cpu() for inputs in written]))


def read_windows(
    data: Data, name: str, *, tokenizer: Any, model: nn.Module, most: int, length: int
) -> Tensor:
    """Return the first windows `(N, W)` of `data`, at most so many, side by side.

    Args:
        data: A path, strings, a data set with a column `text`, or token ids `(N, W)` or `(T,)`.
        name: The argument that it was passed as.
        tokenizer: Turns text into tokens.
        model: The model that is to read them.
        most: N at most.
        length: W.

    Raises:
        InvalidArgumentError: If there is no text, less than a window of it, no column `text`, or
            tokens that the model does not have.
    """
    if isinstance(data, Tensor):
        tokens_T = _checked_tokens(data, name)
    else:
        if tokenizer is None:
            raise InvalidArgumentError(
                f"`tokenizer` is needed for the text of `{name}`; or pass token ids."
            )
        check_tokenizer(model, tokenizer)
        tokens_T = _tokens(_texts(data, name), name, tokenizer, most * length)
    _check_vocabulary(tokens_T, name, model)
    if len(tokens_T) < length:
        raise InvalidArgumentError(
            f"`{name}` holds {len(tokens_T)} tokens, fewer than one window of {length}: pass more "
            "text, or a smaller `window` in the `settings`."
        )
    count = min(most, len(tokens_T) // length)
    return tokens_T[: count * length].view(count, length)


def is_self(data: Data) -> bool:
    """Tell whether the teacher writes the text."""
    return isinstance(data, str) and data == "self"


def readable_length(model: Any, length: int) -> int:
    """Return `length`, or less where the model has fewer positions."""
    return min(length, positions_of(model.config) or length)


def find_tokenizer(model: Any, tokenizer: Any) -> Any:
    """Return `tokenizer`, or that of the folder or hub page that `model` came from, or None."""
    if tokenizer is not None:
        return tokenizer
    from transformers import AutoTokenizer

    name = getattr(model, "name_or_path", "")
    try:
        return AutoTokenizer.from_pretrained(name) if name else None
    except (OSError, ValueError, KeyError):
        return None


def _checked_tokens(data: Tensor, name: str) -> Tensor:
    if data.dtype != torch.int64 or data.dim() not in (1, 2) or data.numel() == 0:
        raise InvalidArgumentError(
            f"`{name}` tokens must be int64 ids of shape (N, W) or (T,), got {data.dtype} of shape "
            f"{tuple(data.shape)}."
        )
    return data.flatten().cpu()


def _check_vocabulary(tokens_T: Tensor, name: str, model: Any) -> None:
    words = len(model.get_input_embeddings().weight)
    if tokens_T.min() < 0 or tokens_T.max() >= words:
        raise InvalidArgumentError(
            f"`{name}` has tokens from {int(tokens_T.min())} to {int(tokens_T.max())}, but the "
            f"model has embeddings for {words}: the tokenizer is not the model's own."
        )


def _tokens(texts: Iterator[str], name: str, tokenizer: Any, most: int) -> Tensor:
    """Return the first tokens of `texts`, at most so many.

    Raises:
        InvalidArgumentError: If there is no text.
    """
    ids: list[int] = []
    between: list[int] = []
    for text in texts:
        if not text.strip():
            continue
        ids += between + tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= most:
            break
        between = tokenizer(_BETWEEN, add_special_tokens=False)["input_ids"]
    if not ids:
        raise InvalidArgumentError(f"`{name}` holds no text.")
    return torch.tensor(ids[:most], dtype=torch.int64, device="cpu")


def _texts(data: Data, name: str) -> Iterator[str]:
    """Yield the texts of a file, of strings, or of the rows of a data set.

    Raises:
        InvalidArgumentError: If `data` is none of these.
    """
    if isinstance(data, str | Path):
        if not is_file(data):
            raise InvalidArgumentError(
                f"`{name}` must be a file, strings, a data set with a column 'text', or token ids, "
                f"got {str(data)!r:.80}, which is no file. For a text in memory pass `[text]`."
            )
        yield read_text(Path(data).absolute())
        return
    columns = getattr(data, "column_names", None)
    if isinstance(columns, Mapping):
        raise InvalidArgumentError(
            f"`{name}` has several splits: pass one of them, as `{name}[{next(iter(columns))!r}]`."
        )
    try:
        rows = iter(data)
    except TypeError as error:
        raise InvalidArgumentError(
            f"`{name}` must be a file, strings, a data set with a column 'text', or token ids, got "
            f"{type(data).__name__}."
        ) from error
    for row in rows:
        text = row.get("text") if isinstance(row, Mapping) else row
        if not isinstance(text, str):
            held = f"the columns {sorted(row)}" if isinstance(row, Mapping) else f"{row!r:.40}"
            raise InvalidArgumentError(
                f"`{name}` must hold strings, or rows with a string under 'text', got {held}. "
                "Rename the column with `rename_column`."
            )
        yield text
