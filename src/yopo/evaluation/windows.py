"""Perplexity: how surprised a model is by a text.

Shapes: T tokens, N windows, B of them a batch, W tokens a window.
"""

import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from yopo.errors import InvalidArgumentError, UnsupportedModelError
from yopo.evaluation.texts import check_tokenizer, tokens_of
from yopo.evidence import check_tokens
from yopo.writing import positions_of

logger = logging.getLogger(__name__)

_USUAL = 2048
"""Tokens a window in the papers of the field."""

_LARGEST = 700.0
"""Mean negative log-likelihoods from here on have no perplexity in float64."""


def perplexity(
    model: nn.Module,
    text: Tensor | str | Path,
    *,
    tokenizer: Any = None,
    window: int | None = None,
    stride: int | None = None,
    batch: int = 8,
) -> float:
    """Return the perplexity, in [1, ∞), of a causal language model on a text.

    The text is turned into one row of tokens, as a whole, with the special tokens that the
    tokenizer adds at its ends. Windows of W tokens begin at every `stride`-th token; those that
    would reach beyond the end are dropped, and what only they would hold. In each window every
    token but the first is predicted from those before it in the window. A token counts once, in
    the first window that predicts it. The result is exp of the mean negative log-likelihood over
    all tokens that count, each alike, from logits in float32.

    Without a stride windows lie side by side: the definition of GPTQ, SparseGPT, Wanda and
    SliceGPT. With a smaller one every token but those of the first window has at least
    W - `stride` before it: the sliding window of transformers' guide, but for a last window there
    that is shorter.

    Args:
        model: A causal language model; it is run in eval mode without gradients.
        text: A text; "wikitext2", "ptb", "c4" or "alpaca", which are downloaded; the `Path` of a
            local file, see `yopo.read_text`; or token ids `(T,)`.
        tokenizer: The model's; not needed for token ids.
        window: W, at least 2; by default 2048, or the positions of the model where that is less.
        stride: In [1, W - 1], or W, the default.
        batch: Windows a forward pass, B.

    Raises:
        InvalidArgumentError: If the text is empty or shorter than a window, a window exceeds the
            model's positions, there is no tokenizer for a text, it has more tokens than the model,
            an id is outside the model's vocabulary, or the model gives NaN.
        UnsupportedModelError: If the model is no causal language model.
        YopoError: If a named text needs `datasets`, which is not installed.
        OSError: If a named text cannot be downloaded.

    Example:
        >>> yopo.perplexity(model, torch.arange(60), window=20) > 1
        True
    """
    _check_model(model)
    window = window_of(model, window)
    stride = window if stride is None else stride
    if not 1 <= stride <= window:
        raise InvalidArgumentError(f"`stride` must be in [1, {window}], got {stride}.")
    if batch < 1:
        raise InvalidArgumentError(f"`batch` must be at least 1, got {batch}.")
    if tokenizer is not None:
        check_tokenizer(model, tokenizer)
    tokens_T = tokens_of(text, tokenizer)
    if len(tokens_T) < window:
        hint = " If it names a file, pass a `Path`." if isinstance(text, str) else ""
        raise InvalidArgumentError(
            f"the text has {len(tokens_T)} tokens, fewer than a window of {window}: pass a longer "
            f"text or a smaller `window`.{hint}"
        )
    check_tokens(model, tokens_T[:, None], called="text")
    surprise = _mean_surprise(model, tokens_T.unfold(0, window, stride), stride, batch)
    check_finite(surprise)
    found = math.exp(surprise) if surprise < _LARGEST else math.inf
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    if tokenizer is not None and found > len(embeddings.weight):
        logger.warning(
            "A perplexity of %.4g is worse than chance, %d. Is `tokenizer` the model's own?",
            found,
            len(embeddings.weight),
        )
    return found


def _mean_surprise(model: nn.Module, windows_NW: Tensor, stride: int, batch: int) -> float:
    """Return the mean negative log-likelihood in nats of all tokens that count."""
    device = next(model.parameters()).device
    training = model.training
    total, count = 0.0, 0
    try:
        model.eval()
        with torch.no_grad():
            for number, ids_BW in enumerate(torch.split(windows_NW, batch)):
                logits = model(input_ids=ids_BW.to(device), use_cache=False).logits
                targets = ids_BW[:, 1:].to(logits.device)
                loss = nn.functional.cross_entropy(
                    logits[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="none"
                ).view_as(targets)
                counts = torch.zeros_like(targets, dtype=torch.bool)
                counts[:, max(0, windows_NW.shape[1] - 1 - stride) :] = True
                if number == 0:
                    counts[0] = True
                total, count = total + float(loss[counts].double().sum()), count + int(counts.sum())
    finally:
        model.train(training)
    return total / count


def window_of(model: nn.Module, window: int | None) -> int:
    """Return `window`, or the usual one, which is shorter where the model has fewer positions.

    Raises:
        InvalidArgumentError: If it is less than 2, or more than the positions of the model.
    """
    config: Any = model.config
    longest = positions_of(config)
    if window is None:
        return _USUAL if longest is None else min(_USUAL, longest)
    if window < 2 or (longest is not None and window > longest):
        most = "" if longest is None else f", and at most {longest}, the positions of the model"
        raise InvalidArgumentError(f"`window` must be at least 2{most}, got {window}.")
    return window


def check_finite(value: float) -> None:
    """Check that what has come of logits is a number.

    Raises:
        InvalidArgumentError: If it is NaN or infinite.
    """
    if not math.isfinite(value):
        raise InvalidArgumentError(
            "the model gives logits that are not finite. In float16 activations may overflow: load "
            "it in bfloat16 or float32."
        )


def _check_model(model: Any) -> None:
    """Check that perplexity is defined for a model.

    Raises:
        InvalidArgumentError: If it is not in memory.
        UnsupportedModelError: If it is no causal language model.
    """
    if not isinstance(model, nn.Module):
        raise InvalidArgumentError(
            f"`model` must be a model in memory, got {model!r}. Load it with `yopo.load`."
        )
    config: Any = model.config
    can_generate = getattr(model, "can_generate", None)
    if config.is_encoder_decoder or (can_generate is not None and not can_generate()):
        raise UnsupportedModelError(
            f"perplexity is that of causal language models, got {type(model).__name__}. Pass the "
            "model with its language-model head."
        )
