"""Which tensors on disk hold which rows of which parameters.

A checkpoint may name and store tensors in another way than the model does in memory: transformers
renames them, and stacks the matrices of experts into one tensor. How, it knows itself. So every
entry along the axis of rows of a parameter gets a label, and the labels are sent the way that
`save_pretrained` sends weights. Where they arrive, the rows are.

Shapes: E experts, N entries along the axis of rows of a parameter.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from yopo.adapters import Ffn
from yopo.errors import UnsupportedModelError
from yopo.shards import Stored

_EXPERT, _PARAMETER = 28, 44
"""A label has the entry in its lowest bits, then the expert, then the parameter."""

_THIN = 2
"""Size of the axes that no rows run along; labels are the same along them."""


@dataclass(frozen=True, slots=True)
class Axis:
    """Say how the rows of FFNs lie in a parameter.

    Attributes:
        rows: The axis of a matrix, or vector, that they run along; None where none do, as in a
            norm.
        has_experts: Whether the parameter holds one such matrix, or vector, for each expert.
    """

    rows: int | None
    has_experts: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """Say which entries of a parameter a matrix, or vector, on disk holds, in their order.

    Attributes:
        parameter: Name of the parameter in the model.
        expert: Whose matrix of it; 0 where it has no experts.
        rank: How many axes the matrix, or vector, has on disk.
        axis: The one of them that the entries run along; None where no rows do.
        entries_N: The entries along the parameter's axis of rows.
    """

    parameter: str
    expert: int
    rank: int
    axis: int | None
    entries_N: Tensor


def axes_of(ffns: Iterable[Ffn], names: Mapping[int, str]) -> dict[str, Axis]:
    """Return how rows lie in each parameter that FFNs and what is behind them consist of.

    Args:
        ffns: FFNs of a model.
        names: Names of the model's parameters by `id`.
    """
    axes: dict[str, Axis] = {}
    for ffn in ffns:
        for slot in ffn.slots:
            axes[names[id(slot.parameter)]] = Axis(slot.axis, slot.expert is not None)
        if (bias := ffn.bias_parameter) is not None:
            axes.setdefault(names[id(bias)], Axis(None, ffn.contract.expert is not None))
    return axes


def find_runs(
    model: nn.Module, axes: Mapping[str, Axis], stored: Mapping[str, Stored]
) -> dict[str, list[Run]]:
    """Return, by the name of a tensor on disk, what it holds of the parameters that are looked for.

    A tensor on disk that holds the matrices of several experts has a run for each, in their order.

    Args:
        model: The model; its weights may be on the meta device.
        axes: The parameters to look for, by name.
        stored: What there is on disk, by name.

    Raises:
        UnsupportedModelError: If the checkpoint stores them in a way that transformers would not.
    """
    parameters, names = (
        {**dict(model.named_buffers()), **dict(model.named_parameters())},
        list(axes),
    )
    labels: dict[str, Tensor] = {}
    moved: dict[str, Tensor] = {}
    aliases = _aliases(model)
    for number, name in enumerate(names):
        label = _labels(parameters[name], axes[name], number)
        place = next(
            (
                other
                for other in _names_on_disk(model, aliases[id(parameters[name])])
                if other in stored and stored[other].shape == parameters[name].shape
            ),
            None,
        )
        if place is None:
            moved[name] = label
        else:
            labels[place] = label
    if moved:
        from transformers.core_model_loading import revert_weight_conversion

        labels |= revert_weight_conversion(model, moved)
    runs = {}
    for place, label in labels.items():
        numbers = label >> _PARAMETER
        name, last = names[int(numbers.min())], names[int(numbers.max())]
        if name != last:
            raise UnsupportedModelError(
                f"`{place}` holds both `{name}` and `{last}`, which yopo does not cut on disk. "
                "Load the model with transformers and prune it in memory."
            )
        shape = parameters[name].shape[axes[name].has_experts :]
        runs[place] = list(_runs(name, axes[name], label, len(shape)))
        _check(place, runs[place], stored, axes[name].rows, shape)
    return runs


def _check(
    place: str,
    runs: Sequence[Run],
    stored: Mapping[str, Stored],
    rows: int | None,
    shape: torch.Size,
) -> None:
    """Refuse a checkpoint in which a tensor is missing, or has another shape than its runs need.

    Args:
        place: Name of the tensor.
        runs: What it should hold.
        stored: What there is on disk, by name.
        rows: The axis that rows run along in memory.
        shape: Shape in memory of what the runs are parts of.
    """
    if place not in stored:
        told = "is missing from the checkpoint"
    else:
        found = stored[place].shape
        experts = (len(runs),) if len(found) > len(shape) else ()
        needed = experts + _shape_of(runs[0], rows, shape)
        if found == needed:
            return
        told = f"has shape {found} in the checkpoint, where the config asks for {needed}"
    raise UnsupportedModelError(
        f"`{place}` {told}. Correct the config; or, where transformers loads the model all the "
        "same, save it with `save_pretrained`, and prune that."
    )


def _aliases(model: nn.Module) -> dict[int, list[str]]:
    """Return all names of each parameter and buffer by its `id`; tied ones have several."""
    aliases: dict[int, list[str]] = {}
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        aliases.setdefault(id(tensor), []).append(name)
    return aliases


def _names_on_disk(model: nn.Module, aliases: Sequence[str]) -> list[str]:
    """Return the names under which a checkpoint may have a parameter, likeliest first.

    Base models and those with a head load one another's checkpoints.

    Args:
        model: The model.
        aliases: The names that the parameter has in it.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return [
        *aliases,
        *(alias.removeprefix(prefix) for alias in aliases),
        *(prefix + alias for alias in aliases),
    ]


def _labels(parameter: Tensor, axis: Axis, number: int) -> Tensor:
    """Return a label for each entry of a parameter, thin along all axes but rows and experts."""
    shifts = {0: _EXPERT} if axis.has_experts else {}
    if axis.rows is not None:
        shifts[axis.rows + axis.has_experts] = 0
    shape = [_THIN] * parameter.dim()
    label = torch.full([1] * parameter.dim(), number << _PARAMETER, device="cpu")
    for at, shift in shifts.items():
        shape[at] = parameter.shape[at]
        view = [-1 if other == at else 1 for other in range(parameter.dim())]
        label = label + (torch.arange(shape[at], device="cpu").view(view) << shift)
    return label.expand(shape)


def _runs(name: str, axis: Axis, label: Tensor, rank: int) -> Iterator[Run]:
    """Yield what labels say that have arrived in one tensor on disk."""
    for matrix in label if label.dim() > rank else [label]:
        expert = int(matrix.reshape(-1)[0]) >> _EXPERT & 2 ** (_PARAMETER - _EXPERT) - 1
        if axis.rows is None:
            yield Run(name, expert, rank, None, torch.zeros(0, dtype=torch.int64, device="cpu"))
            continue
        is_same = len(matrix) == _THIN and bool((matrix[0] == matrix[1]).all())
        along = 1 if is_same else 0
        line_N = matrix.select(1 - along, 0) if rank == 2 else matrix
        yield Run(name, expert, rank, along, line_N & 2**_EXPERT - 1)


def _shape_of(run: Run, rows: int | None, shape: torch.Size) -> tuple[int, ...]:
    """Return the shape on disk of a run of a matrix, or vector, that has `shape` in memory."""
    sizes = list(shape)
    if run.axis is not None and rows is not None:
        del sizes[rows]
        sizes.insert(run.axis, len(run.entries_N))
    return tuple(sizes)
