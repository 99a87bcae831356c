"""See what the matrices of a running model are multiplied with, wherever it computes that."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Watched = tuple[Tensor, int | None, Callable[[Tensor], None]]
"""A view of a matrix, its number in a tensor of several, and what is called with its inputs."""


class Watch(TorchFunctionMode):
    """Call a function with the inputs `(…, in)` of each product with certain matrices.

    The factor in front of the matrix is its input. The matrix is known by its memory, so that a
    `Linear`, a `Conv1D` and one expert's slice of a tensor are the same to it. A mode is for the
    thread that enters it alone.

    Args:
        watched: The matrices, and a function for each.
    """

    def __init__(self, watched: Iterable[Watched]) -> None:
        """Note where the matrices lie in memory."""
        self._by_storage: dict[int, list[Watched]] = defaultdict(list)
        for each in watched:
            self._by_storage[each[0].untyped_storage().data_ptr()].append(each)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the tensors that a function of torch is called with, and call it."""
        tensors = [value for value in args if isinstance(value, Tensor)]
        for inputs, weight in pairwise(tensors):
            for watched in self._by_storage.get(weight.untyped_storage().data_ptr(), []):
                with torch._C.DisableTorchFunctionSubclass():
                    _see(watched, inputs, weight)
        return func(*args, **(kwargs or {}))


def _see(watched: Watched, inputs: Tensor, weight: Tensor) -> None:
    own, expert, see = watched
    if weight.dim() == 3 and expert is not None and inputs.dim() == 3:
        see(inputs[expert])
    elif weight.dim() == 2 and weight.storage_offset() == own.storage_offset():
        see(inputs)


@contextmanager
def eager_experts(model: nn.Module) -> Iterator[None]:
    """Let experts multiply one at a time, so that each product can be seen."""
    key = "_experts_implementation"
    configs = {id(c): c for m in model.modules() if hasattr(c := getattr(m, "config", None), key)}
    previous = {number: getattr(config, key) for number, config in configs.items()}
    try:
        for config in configs.values():
            setattr(config, key, "eager")
        yield
    finally:
        for number, config in configs.items():
            setattr(config, key, previous[number])


def without_head(model: nn.Module, paths: Iterable[str]) -> nn.Module:
    """Return the body of `model` where that holds the modules at `paths`, else the model.

    The head costs most of a pass of a small model, and nothing is watched there.
    """
    prefix = getattr(model, "base_model_prefix", "")
    if prefix and all(path.startswith(f"{prefix}.") for path in paths):
        return model.get_submodule(prefix)
    return model
