"""Which windows are learned from, and which are held out.

Shapes: N windows, W tokens a window.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from yopo.errors import InvalidArgumentError
from yopo.evaluation import perplexity
from yopo.recovery.folder import RecoveryFolder, checksum
from yopo.recovery.settings import RecoverySettings
from yopo.recovery.texts import (
    Data,
    find_tokenizer,
    is_self,
    read_windows,
    readable_length,
    write_windows,
)

logger = logging.getLogger(__name__)

_HELD, _SHARE = 64, 10
"""Windows held out: at most so many, and at most one in so many."""


def portions_of(
    model: Any,
    data: Data,
    teacher: Any,
    tokenizer: Any,
    settings: RecoverySettings,
    validation: Data | None,
    output: str | Path | None,
    job: Mapping[str, Any],
) -> tuple[dict[str, Tensor], RecoveryFolder | None]:
    """Return windows to learn from and to validate on, and the folder that keeps them, if any.

    What the teacher has written once is read from the folder.
    """
    length = readable_length(model, settings.window)
    held: Tensor | None = None
    if teacher is not None:
        length = readable_length(teacher, length)
    if validation is not None or not is_self(data):
        tokenizer = find_tokenizer(model, tokenizer)
    if validation is not None:
        held = read_windows(
            validation, "validation", tokenizer=tokenizer, model=model, most=_HELD, length=length
        )
    text: Tensor | None = None
    if not is_self(data):
        # Of so many, `_split` leaves as many as there may be samples.
        most = settings.samples + (_count_held(settings.samples, _SHARE - 1) if held is None else 0)
        text = read_windows(
            data, "data", tokenizer=tokenizer, model=model, most=most, length=length
        )
        if not isinstance(data, Tensor):
            _check_fit(model, teacher, text)
    told = {
        "text": "self" if text is None else checksum(text),
        "validation": None if held is None else checksum(held),
    }
    folder = None if output is None else RecoveryFolder(output, {**job, **told})
    if folder is not None and folder.text is not None:
        return folder.text, folder
    if text is None:
        text = write_windows(teacher, windows=settings.written, length=length, seed=job["seed"])
    return _split(text, held), folder


def _split(text_NW: Tensor, held_NW: Tensor | None) -> dict[str, Tensor]:
    """Hold the last windows out for validation, where there are no others.

    Raises:
        InvalidArgumentError: If there is but one window.
    """
    if held_NW is None:
        if len(text_NW) == 1:
            raise InvalidArgumentError(
                f"`data` holds one window of {text_NW.shape[1]} tokens, and needs two, one of them "
                "to validate on: pass more text, `validation`, or a smaller `window`."
            )
        count = _count_held(len(text_NW), _SHARE)
        text_NW, held_NW = text_NW[:-count], text_NW[-count:]
    return {"text": text_NW.contiguous(), "validation": held_NW.contiguous()}


def _count_held(windows: int, share: int) -> int:
    """Return how many are held out, one for every `share` of those windows."""
    return max(1, min(_HELD, windows // share))


def _check_fit(model: Any, teacher: nn.Module | None, text_NW: Tensor) -> None:
    """Check that the text means something to the dense model; warn if it does not to a pruned one.

    Raises:
        InvalidArgumentError: If the dense model is worse than chance.
    """
    reader = model if teacher is None else teacher
    words = len(model.get_input_embeddings().weight)
    surprise = perplexity(reader, text_NW[:4].flatten(), window=text_NW.shape[1])
    if surprise < words:
        return
    told = f"has a perplexity of {surprise:.0f} on `data`, worse than chance ({words} words)"
    if teacher is not None:
        raise InvalidArgumentError(f"`teacher` {told}: the tokenizer is not the model's own.")
    logger.warning("The model %s. Is `tokenizer` the model's own?", told)
