"""The matrices that a metric scores: every linear map of a model's layers, one layer at a time."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from yopo.adapters import Ffn, Slot, find_ffns
from yopo.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """Show one linear map `(out, in)`, however the model stores it.

    Attributes:
        name: Path of the parameter that holds it; `….gate_up_proj.3` for that of the fourth expert
            where one parameter holds those of all experts.
        parameter: The parameter.
        key: Path of the parameter.
        expert: Which expert's it is, where a three-dimensional parameter holds those of all.
        part: The first row and the number of rows of the parameter, where a matrix holds several.
        transposed: Whether it is stored as `(in, out)`.
    """

    name: str
    parameter: nn.Parameter
    key: str
    expert: int | None = None
    part: tuple[int, int] | None = None
    transposed: bool = False

    def view(self, tensor: Tensor) -> Tensor:
        """Return the part of a tensor shaped as the parameter that belongs to it, `(out, in)`."""
        found = tensor if self.expert is None else tensor[self.expert]
        if self.part is not None:
            found = found.narrow(0, *self.part)
        return found.T if self.transposed else found

    @property
    def place(self) -> tuple[int, int | None, tuple[int, int] | None]:
        """Return what no two matrices of a model have in common, whatever they are called."""
        return id(self.parameter), self.expert, self.part

    @property
    def weight(self) -> Tensor:
        """Return the matrix as a view `(out, in)` of the parameter."""
        return self.view(self.parameter.detach())


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Hold one layer: its module and the matrices in it, in the order of its modules."""

    name: str
    module: nn.Module
    matrices: tuple[Matrix, ...]


def find_blocks(model: nn.Module) -> list[Block]:
    """Return the layers of `model` and the linear maps in them, in the order of its modules.

    Layers are the entries of those lists of modules that hold the FFNs, and of lists of the same
    length beside them; an FFN in no list is one by itself. Embeddings, heads and norms lie outside,
    or are no linear maps. What several layers share is a matrix of the first.

    Args:
        model: A `PreTrainedModel` of transformers.

    Raises:
        UnsupportedModelError: If the model cannot be pruned, or has weights that are missing, NaN
            or infinite.
    """
    ffns = find_ffns(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    blocks, taken = [], set()
    for path in _layers_with(model, ffns):
        module = model.get_submodule(path)
        inside = [ffn for ffn in ffns if f"{ffn.path}.".startswith(f"{path}.")]
        matrices = [m for m in _matrices_in(module, inside, names) if m.place not in taken]
        taken |= {matrix.place for matrix in matrices}
        if matrices:
            blocks.append(Block(path, module, tuple(matrices)))
    _check(matrices_of(blocks))
    return blocks


def matrices_of(blocks: Iterable[Block]) -> list[Matrix]:
    """Return the matrices of all layers."""
    return [matrix for block in blocks for matrix in block.matrices]


def sparsity_of(model: nn.Module) -> dict[str, float]:
    """Return the share of zeros in each linear map of the model's layers, by name, in [0, 1].

    Raises:
        UnsupportedModelError: If the model cannot be pruned.

    Example:
        >>> max(yopo.symbolic.sparsity_of(model).values()) < 0.01
        True
    """
    return {
        matrix.name: 1.0 - int(matrix.weight.count_nonzero()) / matrix.weight.numel()
        for matrix in matrices_of(find_blocks(model))
    }


def _layers_with(model: nn.Module, ffns: Iterable[Ffn]) -> Iterable[str]:
    """Return the paths of the layers, those of each list with FFNs and of its equals together."""
    stacks = dict.fromkeys(_stack_of(model, ffn.path) for ffn in ffns)
    return dict.fromkeys(layer for stack in stacks for layer in _layers_beside(model, stack))


def _stack_of(model: nn.Module, path: str) -> str:
    """Return the path of the outermost list of modules that holds the one at `path`, else that."""
    parts = path.split(".")
    for length in range(1, len(parts)):
        stack = ".".join(parts[:length])
        if isinstance(model.get_submodule(stack), nn.ModuleList):
            return stack
    return path


def _layers_beside(model: nn.Module, stack: str) -> Iterator[str]:
    """Yield the paths of the entries of a list and of those as long beside it, else `stack`."""
    found = model.get_submodule(stack)
    if not isinstance(found, nn.ModuleList):
        yield stack
        return
    parent, dot, _ = stack.rpartition(".")
    for name, child in model.get_submodule(parent).named_children():
        if isinstance(child, nn.ModuleList) and len(child) == len(found):
            yield from (f"{parent}{dot}{name}.{number}" for number in range(len(child)))


def _matrices_in(module: nn.Module, ffns: Sequence[Ffn], names: dict[int, str]) -> Iterator[Matrix]:
    """Yield the linear maps of one layer: modules first, then what FFNs hold beside them."""
    seen: set[int] = set()
    for child in module.modules():
        is_conv = type(child).__name__ == "Conv1D"
        weight = getattr(child, "weight", None)
        if (is_conv or isinstance(child, nn.Linear)) and isinstance(weight, nn.Parameter):
            name = names[id(weight)]
            if id(weight) not in seen:
                yield Matrix(name, weight, name, transposed=is_conv)
            seen.add(id(weight))
    found: dict[str, Matrix] = {}
    for ffn in ffns:
        for slot in (*ffn.expand, ffn.contract):
            if id(slot.parameter) not in seen:
                matrix = _matrix_of(slot, ffn, names[id(slot.parameter)])
                found.setdefault(matrix.name, matrix)
    yield from found.values()


def _matrix_of(slot: Slot, ffn: Ffn, key: str) -> Matrix:
    """Return the matrix in which `slot` lies, of a parameter that no linear map holds."""
    parameter, expert = slot.parameter, slot.expert
    # The axis of the rows runs over the outputs of an expand matrix.
    transposed = (slot.axis == 1) == (slot is not ffn.contract)
    part, number = None, expert
    if expert is None and parameter.shape[0] > 2 * ffn.rows and slot.axis == 0:
        part, number = (slot.start, ffn.rows), slot.start // ffn.rows
    name = key if number is None else f"{key}.{number}"
    return Matrix(name, parameter, key, expert, part, transposed)


def _check(matrices: Iterable[Matrix]) -> None:
    """Check that all weights are there and finite.

    Raises:
        UnsupportedModelError: If some are not.
    """
    for matrix in matrices:
        if matrix.parameter.is_meta:
            raise UnsupportedModelError(
                f"the weights of `{matrix.name}` are on the meta device. Load the model with its "
                "weights."
            )
        if not torch.stack(matrix.weight.aminmax()).isfinite().all():
            raise UnsupportedModelError(
                f"`{matrix.name}` has weights that are NaN or infinite. Mend the checkpoint, or "
                "load it in a wider `dtype`."
            )
