"""The text that statistics are collected on, as what makes a model read it.

Shapes: N sequences, W tokens a sequence, T tokens.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from yopo.errors import InvalidArgumentError, UnsupportedModelError
from yopo.evaluation.texts import NAMED, check_tokenizer, tokens_of
from yopo.evidence import check_rows_of_tokens, check_tokens
from yopo.symbolic.settings import check_integer
from yopo.writing import can_write, positions_of, write_tokens

Data = Tensor | str | Path
"""Token ids `(N, W)`, a text, a file that holds one, or "self"."""


def is_self(data: Data) -> bool:
    """Tell whether `data` is text that the model writes itself."""
    return isinstance(data, str) and data == "self"


def name_of(data: Data) -> str:
    """Return what `data` is called in a record of it: its name, or else "given"."""
    has_name = isinstance(data, Path) or is_self(data) or (isinstance(data, str) and data in NAMED)
    return str(data) if has_name else "given"


def inputs_of(
    model: nn.Module, data: Data, *, tokenizer: Any, sequences: int, length: int, seed: int
) -> dict[str, Tensor]:
    """Return the inputs `(N, W)` that make `model` read `data`, as for `collect_statistics`.

    Raises:
        InvalidArgumentError: As for `collect_statistics`.
        UnsupportedModelError: If the model cannot write.
    """
    check_integer("sequences", sequences, 1)
    check_integer("length", length, 3)
    if not isinstance(data, Tensor | str | Path):
        raise InvalidArgumentError(
            '`data` must be "self", a text, the `Path` of a file, or a tensor of token ids, got a '
            f"{type(data).__name__}."
        )
    if is_self(data):
        if not can_write(model):
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot write text. Pass text or token ids as `data`."
            )
        return write_tokens(model, sequences=sequences, length=length, seed=seed)
    if isinstance(data, Tensor):
        check_rows_of_tokens(data, called="data")
        ids_NW = data.cpu()
    else:
        if tokenizer is not None:
            check_tokenizer(model, tokenizer)
        ids_NW = _windows(tokens_of(data, tokenizer), model, sequences, length, seed)
    check_tokens(model, ids_NW, called="data")
    config: Any = model.config
    if config.is_encoder_decoder:
        return {"input_ids": ids_NW, "decoder_input_ids": ids_NW}
    return {"input_ids": ids_NW}


def _windows(tokens_T: Tensor, model: Any, sequences: int, length: int, seed: int) -> Tensor:
    """Return windows `(N, W)` that begin anywhere in a text."""
    length = min(length, positions_of(model.config) or length)
    if len(tokens_T) < length:
        raise InvalidArgumentError(
            f"the text has {len(tokens_T)} tokens, fewer than one sequence of {length}: pass a "
            "longer text or a smaller `length`."
        )
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(
        len(tokens_T) - length + 1, (sequences,), generator=generator, device="cpu"
    )
    return torch.stack([tokens_T[start : start + length] for start in starts.tolist()])
