"""Run models in turn against the clock.

Shapes: B sequences, T tokens of a prompt.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from yopo.errors import UnsupportedModelError
from yopo.report import sizes_of
from yopo.speed.machine import bound_of, forget_peak, measure_rates, peak, wait
from yopo.speed.result import Speed
from yopo.writing import with_progress

_WARM_UP, _MEMORY = -2, -1
"""Turns before the first that counts: what happens but once, and the peak of memory."""


def time_in_turn(
    models: Sequence[nn.Module], *, batch: int, prompt: int, new_tokens: int, repeats: int
) -> list[Speed]:
    """Run each model once a turn, in their order, and return the speed of each.

    In every turn the rates of the machine are measured too, and the best of them set the bounds.
    Modes of training and the global generators are left as they were.

    Args:
        models: Models of transformers in memory, each on one device.
        batch: Sequences a pass.
        prompt: Tokens of each prompt.
        new_tokens: Tokens to write after each, by models that write.
        repeats: Turns that are timed, at least 1, after two that are not.

    Raises:
        UnsupportedModelError: If a model that writes returns no key-value cache.
    """
    prompts = [_prompts(model, batch, prompt) for model in models]
    seconds: list[list[tuple[float, float]]] = [[] for _ in models]
    peaks: list[int | None] = [None] * len(models)
    places = [(ids_BT.device, _dtype(model)) for model, ids_BT in zip(models, prompts, strict=True)]
    rates = dict.fromkeys(places, (0.0, 0.0))
    with _evaluated(models), torch.no_grad():
        for turn in with_progress(range(_WARM_UP, repeats), "time"):
            for i, model in enumerate(models):
                held = forget_peak(places[i][0]) if turn == _MEMORY else None
                spent = _run(model, prompts[i], new_tokens)
                if held is not None:
                    peaks[i] = peak(places[i][0]) - held
                if turn >= 0:
                    seconds[i].append(spent)
            for place in rates if turn >= 0 else ():
                now, best = measure_rates(*place), rates[place]
                rates[place] = max(now[0], best[0]), max(now[1], best[1])
    return [
        _speed(model, prompts[i], new_tokens, seconds[i], rates[places[i]], peaks[i])
        for i, model in enumerate(models)
    ]


def writes(model: Any) -> bool:
    """Tell whether a model, or a class of models, writes token after token."""
    return hasattr(model, "can_generate") and bool(model.can_generate())


def _run(model: nn.Module, ids_BT: Tensor, new_tokens: int) -> tuple[float, float]:
    """Return the seconds of reading the prompts and those of writing on, 0 if it does not write.

    Raises:
        UnsupportedModelError: If the model writes, but returns no key-value cache.
    """
    device, decodes = ids_BT.device, writes(model)
    wait(device)
    started = time.perf_counter()
    output = model(input_ids=ids_BT, **({"use_cache": True} if decodes else {}))
    wait(device)
    read = time.perf_counter()
    if not decodes:
        return read - started, 0.0
    if getattr(output, "past_key_values", None) is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} returns no `past_key_values`. Decoding is timed with a "
            "key-value cache, which causal language models with attention have; without their "
            "head, as `AutoModel` loads them, prefill alone is timed."
        )
    for _ in range(new_tokens):
        ids_B1 = output.logits[:, -1:].argmax(dim=-1)
        output = model(input_ids=ids_B1, past_key_values=output.past_key_values, use_cache=True)
    wait(device)
    return read - started, time.perf_counter() - read


def _speed(
    model: nn.Module,
    ids_BT: Tensor,
    new_tokens: int,
    seconds: Sequence[tuple[float, float]],
    rates: tuple[float, float],
    run_peak: int | None,
) -> Speed:
    sizes, batch, decodes = sizes_of(model, ()), len(ids_BT), writes(model)
    return Speed(
        name=type(model).__name__,
        device=str(ids_BT.device),
        dtype=str(_dtype(model)).removeprefix("torch."),
        parameters=sizes.parameters,
        bytes=sizes.bytes,
        prefill=tuple(ids_BT.numel() / prefill for prefill, _ in seconds),
        decode=tuple(batch * new_tokens / decode for _, decode in seconds) if decodes else None,
        prefill_bound=bound_of(model, ids_BT.numel(), rates),
        decode_bound=bound_of(model, batch, rates) if decodes else None,
        run_peak=run_peak,
        operations_per_second=rates[0],
        bytes_per_second=rates[1],
    )


def _prompts(model: Any, batch: int, prompt: int) -> Tensor:
    """Return random tokens `(B, T)` on the device of the model."""
    vocabulary = len(model.get_input_embeddings().weight)
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(vocabulary, (batch, prompt), generator=generator)
    return ids_BT.to(next(model.parameters()).device)


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


@contextmanager
def _evaluated(models: Sequence[nn.Module]) -> Iterator[None]:
    """Put models into eval mode, and each of their modules back afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
