"""Hold half-precision weights in float32 for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def in_float32(model: nn.Module, *, float16_everywhere: bool = False) -> Iterator[None]:
    """Hold half-precision weights that lie on a CPU in float32, which is exact both ways.

    A CPU multiplies matrices of halves several times slower, and float16 would lose small
    gradients.

    Args:
        model: The model.
        float16_everywhere: Whether to do so with float16 weights on other devices too.
    """
    halves = [
        (tensor, tensor.dtype)
        for tensor in (*model.parameters(), *model.buffers())
        if (tensor.device.type == "cpu" and tensor.dtype in (torch.float16, torch.bfloat16))
        or (float16_everywhere and tensor.dtype == torch.float16)
    ]
    try:
        for tensor, _ in halves:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, dtype in halves:
            tensor.data = tensor.data.to(dtype)
