"""Perplexity: how surprised a model is by a text.

Shapes: T tokens, B windows a batch, W tokens a window.
"""

import math

import torch
from torch import Tensor, nn

from yopo.errors import InvalidArgumentError


def perplexity(model: nn.Module, tokens_T: Tensor, *, window: int = 256, batch: int = 8) -> float:
    """Return the perplexity, in [1, ∞), of a causal language model on a row of tokens.

    The tokens are cut into windows of equal length, side by side; what does not fill a window at
    the end is dropped. Within a window each token but the first is predicted from those before it.
    The result is exp of the mean negative log-likelihood over all predicted tokens, in float32.

    Args:
        model: A causal language model; it is run in eval mode without gradients.
        tokens_T: Token ids, one-dimensional.
        window: Tokens a window, W, at least 2.
        batch: Windows a forward pass, B.

    Raises:
        InvalidArgumentError: If there are fewer tokens than a window.
    """
    if window < 2:
        raise InvalidArgumentError(f"`window` must be at least 2, got {window}.")
    if tokens_T.dim() != 1 or len(tokens_T) < window:
        raise InvalidArgumentError(
            f"`tokens_T` must be one row of at least `window={window}` tokens, got shape "
            f"{tuple(tokens_T.shape)}."
        )
    windows = tokens_T[: len(tokens_T) // window * window].view(-1, window)
    device = next(model.parameters()).device
    training = model.training
    total, count = 0.0, 0
    try:
        model.eval()
        with torch.no_grad():
            for ids_BW in torch.split(windows, batch):
                logits = model(input_ids=ids_BW.to(device), use_cache=False).logits.float()
                targets = ids_BW[:, 1:].to(logits.device).flatten()
                loss = nn.functional.cross_entropy(
                    logits[:, :-1].flatten(0, 1), targets, reduction="sum"
                )
                total, count = total + float(loss), count + len(targets)
    finally:
        model.train(training)
    return math.exp(total / count)
