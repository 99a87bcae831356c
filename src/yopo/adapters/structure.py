"""FFNs of architectures that no layout knows, found by what grows with a width of the config.

A matrix whose inputs grow with the field contracts, matrices around it whose outputs grow expand,
everything else of that size goes along. What is found this way is a guess until it is proved.
"""

from collections.abc import Iterator

import torch
from torch import nn

from yopo.adapters.ffn import Ffn, Slot
from yopo.adapters.skeleton import Probe


def ffns_by_structure(model: nn.Module, probe: Probe, claimed: set[str]) -> Iterator[Ffn]:
    """Yield the FFNs whose width `probe` sets and that no layout has claimed.

    Args:
        model: The model.
        probe: A config field and the parameters that grow with it.
        claimed: Names of parameters that belong to an FFN already.
    """
    grown = {name: axis for name, axis in probe.axes.items() if name not in claimed}
    matrices = {name: axis for name, axis in grown.items() if _matrix_axis(model, name) is not None}
    inputs = [name for name, axis in matrices.items() if axis != _matrix_axis(model, name)]
    outputs = [name for name, axis in matrices.items() if axis == _matrix_axis(model, name)]
    for contract in inputs:
        container = _container(contract, outputs)
        inside = [name for name in inputs if name.startswith(container)]
        if container and len(inside) == 1:
            yield from _ffn_in(model, probe, contract, container, grown, outputs)


def _ffn_in(
    model: nn.Module,
    probe: Probe,
    contract: str,
    container: str,
    grown: dict[str, int],
    outputs: list[str],
) -> Iterator[Ffn]:
    contract_slot = _slot(model, contract, grown[contract])
    rows = contract_slot.parameter.shape[contract_slot.axis]
    expand: list[Slot] = []
    vectors: list[Slot] = []
    for name, axis in grown.items():
        if name == contract or not name.startswith(container):
            continue
        slot = _slot(model, name, axis)
        length = slot.parameter.shape[axis]
        starts = {rows: [0], 2 * rows: [0, rows]}.get(length, [])
        if not starts:
            return
        (expand if name in outputs else vectors).extend(
            Slot(slot.module, slot.name, axis, start) for start in starts
        )
    if 1 <= len(expand) <= 2:
        path = container.removesuffix(".")
        yield Ffn(
            name=path,
            path=path,
            rows=rows,
            expand=tuple(expand),
            contract=contract_slot,
            vectors=tuple(vectors),
            width=probe.field_for(rows),
            known=False,
        )


def _container(contract: str, outputs: list[str]) -> str:
    """Return the path, with a dot, of the innermost module that holds `contract` and an output."""
    path = contract
    while "." in path:
        path = path.rpartition(".")[0]
        if any(name.startswith(path + ".") for name in outputs):
            return path + "."
    return ""


def _slot(model: nn.Module, name: str, axis: int) -> Slot:
    path, _, key = name.rpartition(".")
    return Slot(model.get_submodule(path), key, axis)


def _matrix_axis(model: nn.Module, name: str) -> int | None:
    """Return the axis that runs over a matrix's outputs, None if `name` is not a linear map's."""
    module = model.get_submodule(name.rpartition(".")[0])
    if not name.endswith(".weight") or getattr(module, "weight", torch.empty(0)).dim() != 2:
        return None
    if type(module).__name__ == "Conv1D":
        return 1
    return 0 if isinstance(module, nn.Linear) else None
