"""Other libraries draw from the global generators; what they do to those is undone here."""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def generators_put_back() -> Iterator[None]:
    """Give the global generators of Python, NumPy and torch their states back afterwards."""
    from numpy.random import get_state, set_state

    python, numpy = random.getstate(), get_state()
    accelerator = torch.accelerator.current_accelerator()
    with ExitStack() as stack:
        if accelerator is None:
            stack.enter_context(torch.random.fork_rng(devices=[]))
        else:
            devices = range(torch.accelerator.device_count())
            stack.enter_context(
                torch.random.fork_rng(devices=devices, device_type=accelerator.type)
            )
        try:
            yield
        finally:
            random.setstate(python)
            set_state(numpy)
