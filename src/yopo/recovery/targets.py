"""Which matrices of a model get an adapter: those of its FFNs, of its attention, or both."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from yopo.adapters import Ffn
from yopo.errors import UnsupportedModelError
from yopo.recovery.settings import Targets

_ATTENTION = re.compile(r"att(entio)?n", re.IGNORECASE)
"""How the modules are called that hold the projections of an attention."""


@dataclass(frozen=True, slots=True)
class Places:
    """Name the matrices that get an adapter.

    Attributes:
        modules: Linear maps, by path.
        parameters: Parameters that no linear map of their own holds, such as those of experts.
        transposed: Whether the maps store their matrices as GPT-2 does.
    """

    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    transposed: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of all these matrices among the parameters of the model."""
        return (*(f"{name}.weight" for name in self.modules), *self.parameters)

    @property
    def may_idle(self) -> bool:
        """Tell whether some may get no gradient in a step, as experts that no token goes to."""
        return any("experts." in name for name in self.modules)


def find_places(model: Any, ffns: Sequence[Ffn], targets: Targets) -> Places:
    """Return the matrices of the decoder of `model` that get an adapter.

    Args:
        model: A causal language model.
        ffns: Its FFNs.
        targets: Which matrices.

    Raises:
        UnsupportedModelError: If there are none.
    """
    names = {id(module): name for name, module in model.named_modules()}
    decoder = model.get_decoder()
    inside = {id(module) for module in decoder.modules()}
    modules: dict[str, nn.Module] = {}
    parameters: dict[str, None] = {}
    in_ffns: set[int] = set()
    for ffn in ffns:
        for slot in (*ffn.expand, ffn.contract):
            in_ffns.add(id(slot.module))
            if id(slot.module) not in inside or targets == "attention":
                continue
            name = names[id(slot.module)]
            if _is_linear(slot.module):
                modules[name] = slot.module
            else:
                parameters[f"{name}.{slot.name}"] = None
    if targets != "ffn":
        found = {
            names[id(module)]: module
            for path, module in decoder.named_modules()
            if _is_linear(module) and id(module) not in in_ffns and _ATTENTION.search(path)
        }
        if not found:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no attention that yopo knows. Use `targets='ffn'`."
            )
        modules |= found
    if not modules and not parameters:
        raise UnsupportedModelError(
            f"no FFN was found in the decoder of {type(model).__name__}. Use `targets='attention'`."
        )
    transposed = bool(modules) and not any(isinstance(m, nn.Linear) for m in modules.values())
    return Places(tuple(modules), tuple(parameters), transposed)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
