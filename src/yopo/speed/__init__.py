"""How fast models run, dense and pruned in turn, beside the bound that the machine sets."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from yopo.errors import InvalidArgumentError, UnsupportedModelError
from yopo.loading import load, read_config
from yopo.memory import is_out_of_memory
from yopo.speed.machine import forget_peak, peak, wait
from yopo.speed.result import Speed, SpeedReport
from yopo.speed.timing import time_in_turn, writes
from yopo.writing import positions_of

__all__ = ["Speed", "SpeedReport", "benchmark", "time_in_turn"]

_Source = nn.Module | str | Path

_SUPPORTED = (
    "`benchmark` times models of transformers that read `input_ids` alone: causal language models "
    "with a key-value cache, and encoders, of which it times prefill."
)


def benchmark(
    model: _Source,
    against: _Source | None = None,
    *,
    batch: int = 1,
    prompt: int = 128,
    new_tokens: int = 32,
    repeats: int = 5,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
) -> SpeedReport:
    """Measure how a model loads and runs, in turn with another, such as the one it was cut from.

    Prompts of random tokens are read in one pass that computes all logits (prefill). Then the
    likeliest tokens are written, one a pass, with a key-value cache (decode). Both models stay in
    memory and run one after the other in every repeat, so that whatever else the machine does hits
    both. Each is loaded twice before, and the second time counts: by then the files are in memory,
    if that has room for them.

    Args:
        model: A folder, a name on the hub, or a model in memory, which is run where it is.
        against: Another one, with whatever vocabulary and sizes.
        batch: Sequences a pass, at least 1.
        prompt: Tokens of each prompt, at least 1.
        new_tokens: Tokens to write after each, at least 1.
        repeats: How often each model is timed, at least 1, after two runs that are not.
        dtype: Dtype to load the weights in; "auto" takes the one that they are stored in.
        device: Device to load to; None takes that of the model in memory, else the accelerator,
            else the CPU.

    Returns:
        What was measured: `str` makes a table of it, `to_dict` plain values.

    Raises:
        InvalidArgumentError: If a number is not a positive integer, a model cannot read as many
            tokens, `dtype` or `device` is unknown or has nothing to load, or a folder holds no
            model that transformers has, or a damaged one.
        UnsupportedModelError: If a model is an encoder-decoder, reads other than token ids, writes
            without a key-value cache, is quantised, offloaded or on several devices, or memory is
            too small.
        OSError: If there is no such folder and no such model on the hub.

    Example:
        >>> print(yopo.benchmark("llama-pruned", "llama"))
    """
    counts = {"batch": batch, "prompt": prompt, "new_tokens": new_tokens, "repeats": repeats}
    for name, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise InvalidArgumentError(f"`{name}` must be a positive integer, got {count!r}.")
    sources = [model] if against is None else [model, against]
    for name, source in zip(("model", "against"), sources, strict=False):
        if not isinstance(source, nn.Module | str | Path):
            raise InvalidArgumentError(
                f"`{name}` must be a folder, a name on the hub or a model, got {source!r}."
            )
    place = _place(sources, dtype, device)
    for source in sources:
        _check(source, prompt, new_tokens)
    try:
        for source in sources:  # imports and the disk would count for whichever comes first
            _load(source, *place)
        loaded = [_load(source, *place) for source in sources]
        speeds = time_in_turn([one for one, _, _ in loaded], **counts)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UnsupportedModelError(
            f"memory is too small for {' and '.join(_name(source) for source in sources)} with "
            f"`batch={batch}` and `prompt={prompt}`. Use a smaller batch, prompt or `dtype`, or "
            "measure each model alone."
        ) from error
    found = [
        replace(speed, name=_name(source), load_seconds=seconds, load_peak=load_peak)
        for source, speed, (_, seconds, load_peak) in zip(sources, speeds, loaded, strict=True)
    ]
    return SpeedReport(found[0], found[1] if len(found) > 1 else None, batch, prompt, new_tokens)


def _load(
    source: _Source, dtype: torch.dtype | str, device: torch.device
) -> tuple[Any, float | None, int | None]:
    """Return a model, the seconds that loading took, and the peak of its memory."""
    if isinstance(source, nn.Module):
        return source, None, None
    held = forget_peak(device)
    started = time.perf_counter()
    model = load(source, dtype=dtype).to(device)
    for parameter in model.parameters():
        parameter.detach().sum()  # a file that is mapped into memory is read when it is used
    wait(device)
    seconds = time.perf_counter() - started
    return model, seconds, None if held is None else peak(device) - held


def _place(
    sources: Sequence[_Source], dtype: str | torch.dtype, device: str | torch.device | None
) -> tuple[torch.dtype | str, torch.device]:
    """Return the dtype and the device to load to."""
    here = [source for source in sources if isinstance(source, nn.Module)]
    if len(here) == len(sources) and not (dtype == "auto" and device is None):
        raise InvalidArgumentError(
            "`dtype` and `device` are for models that are loaded; a model in memory is run as it "
            "is. Move it yourself: `model.to(device, dtype)`."
        )
    name = str(dtype).removeprefix("torch.")
    found = getattr(torch, name, None)
    if dtype != "auto" and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise InvalidArgumentError(
            f'`dtype` must be "auto" or a floating dtype such as "bfloat16", got {dtype!r}.'
        )
    if device is None and here:
        return found or "auto", next(here[0].parameters()).device
    devices = _devices()
    if device is not None and str(device) not in devices:
        raise InvalidArgumentError(
            f"`device` must be one of {', '.join(devices)} here, got {str(device)!r}."
        )
    return found or "auto", torch.device(devices[0] if device is None else device)


def _devices() -> list[str]:
    """Return the names of the devices that there are, the one to take by default first."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or not torch.accelerator.is_available():
        return ["cpu"]
    numbers = range(torch.accelerator.device_count())
    return [accelerator.type, *(f"{accelerator.type}:{number}" for number in numbers), "cpu"]


def _check(source: _Source, prompt: int, new_tokens: int) -> None:
    """Refuse what cannot be timed, by the class and the config, before anything is loaded.

    Raises:
        InvalidArgumentError: If it is no model, or cannot read as many tokens.
        UnsupportedModelError: If models of its kind are not timed.
    """
    kind, config = _kind_and_config(source)
    if getattr(kind, "main_input_name", None) != "input_ids" or config.is_encoder_decoder:
        raise UnsupportedModelError(f"{_name(source)} cannot be timed. {_SUPPORTED}")
    if isinstance(source, nn.Module):
        _check_weights(source)
    needed = prompt + new_tokens if writes(kind) else prompt
    longest = positions_of(config)
    if longest is not None and longest < needed:
        raise InvalidArgumentError(
            f"`prompt={prompt}` and `new_tokens={new_tokens}` take {needed} positions, and "
            f"{_name(source)} has {longest} (`max_position_embeddings`). Use fewer."
        )


def _check_weights(model: nn.Module) -> None:
    parameters = list(model.parameters())
    if len({parameter.device for parameter in parameters}) != 1 or parameters[0].is_meta:
        raise UnsupportedModelError(
            "the weights must all be on one device, not offloaded and not on the meta device. Use "
            "`model.to(device)`, or load the model with `device_map='cpu'`."
        )
    if not all(parameter.is_floating_point() for parameter in parameters):
        raise UnsupportedModelError(
            "the model is quantised, and what packed weights allow is not known. Time the "
            "unquantised model."
        )


def _kind_and_config(source: _Source) -> tuple[Any, Any]:
    """Return the model, or the class that it will be loaded as, and its config.

    That imports the class, so that no clock runs while it is imported.
    """
    if isinstance(source, nn.Module):
        return source, getattr(source, "config", None)
    config, model_class, _ = read_config(source)
    return model_class, config


def _name(source: _Source) -> str:
    return type(source).__name__ if isinstance(source, nn.Module) else str(source)
