"""How much memory is left for second moments, and what to say where it is too little.

A matrix of second moments has F² float64 numbers.
"""

import os
from pathlib import Path
from typing import Any

import torch

from yopo.adapters import Ffn
from yopo.errors import UnsupportedModelError

_UNKNOWN = 8 * 2**30
"""What a machine is taken to have where the system does not tell."""

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where a container says how much of the machine's memory it may use."""


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
