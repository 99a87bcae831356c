"""What a machine can do: operations and bytes a second, the bound they set, and peak memory."""

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

PRODUCT_ON_CPU, PRODUCT_ELSEWHERE = (512, 2048), (8192, 8192)
"""Tokens, and the width of the square matrix, of the product whose operations are timed."""

READ = (2**15, 2**12)
"""Shape of the float32 matrix whose reading is timed: 512 MiB, far more than caches hold."""

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def wait(device: torch.device) -> None:
    """Wait until `device` has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def measure_rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Return operations a second of a product of matrices, and bytes read a second.

    The product is that of a linear layer. A product of a matrix with one vector does nothing to
    speak of but read the matrix.
    """
    tokens, width = PRODUCT_ON_CPU if device.type == "cpu" else PRODUCT_ELSEWHERE
    inputs = torch.ones(tokens, width, device=device, dtype=dtype)
    square = torch.ones(width, width, device=device, dtype=dtype)
    matrix = torch.ones(READ, device=device, dtype=torch.float32)
    vector = torch.ones(READ[1], device=device, dtype=torch.float32)
    product = _least_seconds(lambda: nn.functional.linear(inputs, square), device)
    read = _least_seconds(lambda: matrix @ vector, device)
    return 2 * tokens * width**2 / product, matrix.nbytes / read


def bound_of(model: nn.Module, tokens: int, rates: tuple[float, float]) -> float:
    """Return how many tokens a second `model` can handle at most, in passes over `tokens` of them.

    `rates` are the operations and the bytes a second of `measure_rates`.

    A pass takes at least two operations for each token and number of a matrix, and at least as long
    as reading all weights once. Tables of embeddings are only looked up and count as neither,
    unless they are tied to a head; of experts those count that a token is sent to. Attention's own
    products and its cache are left out, which keeps the bound a bound. Weights that fit in the
    caches may be faster than it.
    """
    numbers, size = _numbers_and_bytes(model)
    return tokens / max(2 * numbers * tokens / rates[0], size / rates[1])


def forget_peak(device: torch.device) -> int | None:
    """Let the peak of memory start anew, and return the bytes held now, None if nobody tells.

    On an accelerator it is what torch has allocated. On a CPU it is the resident memory of the
    process, files mapped into it included, which Linux keeps the peak of; what was freed is given
    back first, so that it does not hide what is taken next.
    """
    if device.type != "cpu":
        module: Any = torch.get_device_module(device)
        if not hasattr(module, "reset_peak_memory_stats"):
            return None
        module.reset_peak_memory_stats(device)
        return int(module.memory_allocated(device))
    forget = Path("/proc/self/clear_refs")
    if not forget.exists():
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        forget.write_text("5", "ascii")
    except OSError:  # a container may forbid it
        return None
    return _resident("VmRSS")


def peak(device: torch.device) -> int:
    """Return the most bytes held since `forget_peak`, where that returned a number."""
    if device.type != "cpu":
        module: Any = torch.get_device_module(device)
        return int(module.max_memory_allocated(device))
    return _resident("VmHWM")


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text("ascii")
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024


def _least_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the fastest of three, after one that does not count."""
    seconds = []
    for _ in range(4):
        wait(device)
        started = time.perf_counter()
        work()
        wait(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def _numbers_and_bytes(model: nn.Module) -> tuple[float, float]:
    """Return the numbers of all matrices that a token meets, and the bytes that a pass reads."""
    used = {
        parameter: f"{path}.{name}"
        for path, module in model.named_modules()
        if not isinstance(module, nn.Embedding)
        for name, parameter in module.named_parameters(recurse=False)
    }
    share = _share_of_experts(model)
    numbers = size = 0.0
    for parameter, name in used.items():
        part = share if ".experts." in name else 1.0
        size += part * parameter.nbytes
        if parameter.dim() > 1 and not name.endswith("bias"):
            numbers += part * parameter.numel()
    return numbers, size


def _share_of_experts(model: Any) -> float:
    """Return the share of its experts that a token is sent to, 1 if the config does not say."""
    config = model.config.get_text_config()
    chosen = getattr(config, "num_experts_per_tok", None)
    experts = next((getattr(config, n) for n in _EXPERTS if getattr(config, n, None)), None)
    return chosen / experts if chosen and experts else 1.0
