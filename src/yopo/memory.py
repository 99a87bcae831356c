"""How much memory there is for a piece of work, and what to say where it is too little.

A matrix of second moments has F² float64 numbers.
"""

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from yopo.adapters import Ffn
from yopo.errors import UnsupportedModelError

_UNKNOWN = 8 * 2**30
"""What a machine is taken to have where the system does not tell."""

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where a container says how much of the machine's memory it may use."""


_ON_DISK, _CONSTANT = 3, 2**24
"""Pruning from a disk may take so many times the largest FFN, and so many bytes."""

_MAPPED_FROM, _TRIMMED_FROM = -3, -1
"""What `malloc.h` calls M_MMAP_THRESHOLD and M_TRIM_THRESHOLD."""


def room_on_disk(ffns: Sequence[Ffn], *, taken: int = 0) -> int | None:
    """Return how many bytes work on FFNs may take, None where their weights are in memory.

    Who prunes from a disk has little memory, and it shall not grow with the number of threads.

    Args:
        ffns: All FFNs of a model.
        taken: What else is held meanwhile.
    """
    if not ffns[0].is_on_disk:
        return None
    return _ON_DISK * max(ffn.rows * ffn.bytes_per_row for ffn in ffns) + _CONSTANT - taken


@contextmanager
def given_back_at_once() -> Iterator[None]:
    """Give memory that is let go of back to the system at once, where that can be arranged.

    glibc keeps blocks of up to 32 MiB for later, in a heap for each thread. Among small ones that
    stay they add up to more than all that is in use. Afterwards it keeps as much as it does by
    itself once it has seen blocks of that size. What the user has set stays.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    is_set = any(os.environ.get(name) for name in ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"))
    if mallopt is None or is_set:
        yield
        return
    try:
        mallopt(_MAPPED_FROM, 2**20)
        mallopt(_TRIMMED_FROM, 2**20)
        yield
    finally:
        mallopt(_MAPPED_FROM, 2**25)
        mallopt(_TRIMMED_FROM, 2**26)


def moments_bytes(ffn: Ffn) -> int:
    """Return how many bytes the second moments of an FFN take."""
    return 8 * ffn.rows**2


def memory_left(device: torch.device) -> int:
    """Return how many bytes are left on `device`, as near as the system tells."""
    if device.type != "cpu":
        module: Any = torch.get_device_module(device)
        if hasattr(module, "mem_get_info"):
            held = int(module.memory_reserved(device)) - int(module.memory_allocated(device))
            return int(module.mem_get_info(device)[0]) + held
    limits = [Path(name).read_text("ascii") for name in _LIMITS if Path(name).exists()]
    return min([_host_memory(), *(int(limit) for limit in limits if limit.strip().isdigit())])


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that there is no memory left, on whatever device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def too_little_memory(ffn: Ffn) -> UnsupportedModelError:
    """Return an error that says what `ffn` needs, and the ways out."""
    needed = moments_bytes(ffn) / 2**30
    return UnsupportedModelError(
        f"`{ffn.name}` has {ffn.rows} rows, whose second moments take {needed:.1f} GiB, and the "
        f"work on them several times that: more than is left on "
        f"`{ffn.device}`. Move the model to a device with more memory, such "
        "as `model.to('cpu')`, or use `reward='spectral', restore=False`, which needs no moments."
    )


def _host_memory() -> int:
    """Return what the system calls available, else all of the memory that it has."""
    information = Path("/proc/meminfo")
    if information.exists():
        for line in information.read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no such call
        return _UNKNOWN
