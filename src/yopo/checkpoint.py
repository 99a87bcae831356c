"""A checkpoint on disk as a model without weights, to which they come one FFN at a time."""

import threading
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from yopo.adapters import SOURCES, Ffn, check_stored, find_ffns
from yopo.checkpoint_files import folder_of, weight_files
from yopo.errors import UnsupportedModelError
from yopo.loading import build_on_meta, read_config
from yopo.shards import DTYPES, Stored, read_header
from yopo.stored import Axis, Run, axes_of, find_runs


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """Hold a folder of safetensors files, opened.

    Attributes:
        folder: The folder.
        shards: The tensors of each file and the metadata of its header.
        model: The model, on the meta device; the FFNs that `find_ffns` returns for it load their
            weights from the files.
        ffns: Those FFNs.
        runs: What tensors on disk hold rows of, by their names.
    """

    folder: Path
    shards: dict[Path, tuple[list[Stored], dict[str, str]]]
    model: Any
    ffns: list[Ffn]
    runs: dict[str, list[Run]]


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Open a folder of safetensors files, or a model on the hub, without loading weights.

    Args:
        source: A folder that `save_pretrained` wrote, or that was downloaded from the hub; or the
            name of a model there, which is downloaded first.

    Raises:
        InvalidArgumentError: If there is no config, files are missing or damaged, or the class is
            unknown to transformers.
        UnsupportedModelError: If the weights are pickles, quantised, masked, those of an adapter or
            go with one, are stored in a way that transformers would not, or the model cannot be
            pruned.
        OSError: If there is no such folder and no such model on the hub.
    """
    folder = folder_of(source)
    shards = {file: read_header(file) for file in weight_files(folder)}
    stored = {tensor.name: tensor for tensors, _ in shards.values() for tensor in tensors}
    config, model_class, widths = read_config(folder)
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            f"`{folder}` holds a quantised model, and its packed weights have no rows to remove. "
            "Prune the unquantised model first, then quantise the result."
        )
    model = build_on_meta(config, model_class, widths, dtype=_dtype(stored.values()))
    check_stored(model, folder, stored)
    ffns = find_ffns(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    axes = axes_of(ffns, names)
    runs = find_runs(model, axes, stored)
    for place in runs:
        if stored[place].dtype not in DTYPES:
            raise UnsupportedModelError(
                f"`{place}` is stored as {stored[place].dtype}; yopo prunes {', '.join(DTYPES)}. "
                "Load the model with transformers, in bfloat16, and save it again."
            )
    SOURCES[model] = _Source(model, stored, runs, axes).given
    return Checkpoint(folder, shards, model, find_ffns(model), runs)


def _dtype(stored: Iterable[Stored]) -> torch.dtype:
    """Return the dtype that most bytes have."""
    sizes: Counter[str] = Counter()
    for tensor in stored:
        if tensor.dtype in DTYPES:
            sizes[tensor.dtype] += tensor.stop - tensor.start
    return DTYPES[sizes.most_common(1)[0][0]] if sizes else torch.float32


class _Source:
    """Give modules of a model on the meta device their own parameters, from files.

    Threads may ask for the same at once. Parameters that are put together from many tensors stay
    until others are asked for, because the experts of a layer ask one after another.
    """

    def __init__(
        self,
        model: nn.Module,
        stored: dict[str, Stored],
        runs: dict[str, list[Run]],
        axes: dict[str, Axis],
    ) -> None:
        self._model = weakref.ref(model)  # the model is the key under which this is found
        self._stored, self._axes = stored, axes
        self._places: dict[str, list[tuple[Stored, list[Run]]]] = {}
        self._add_places(runs)
        tensors = [*model.named_parameters(), *model.named_buffers()]
        self._names = {id(tensor): name for name, tensor in tensors}
        self._lock = threading.Lock()
        self._users: Counter[nn.Module] = Counter()
        self._empty: dict[nn.Module, list[tuple[dict[str, Any], str, Tensor]]] = {}
        self._built: dict[str, Tensor] = {}

    @contextmanager
    def given(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """Give modules the tensors that they themselves hold, until the context ends."""
        given: list[nn.Module] = []
        try:
            with self._lock:
                for module in dict.fromkeys(modules):
                    given.append(module)
                    self._users[module] += 1
                    if self._users[module] == 1:
                        self._give(module)
            yield
        finally:
            with self._lock:
                for module in given:
                    self._users[module] -= 1
                    if not self._users[module]:
                        del self._users[module]
                        for holder, key, empty in self._empty.pop(module, []):
                            holder[key] = empty

    def _give(self, module: nn.Module) -> None:
        """Put tensors in the place of empty ones, which are kept to be put back."""
        self._empty[module] = taken = [
            (holder, key, tensor)
            for holder in _holders(module)
            for key, tensor in holder.items()
            if tensor is not None and tensor.is_meta
        ]
        made = [part for part in taken if part[1] in module._non_persistent_buffers_set]
        if made:
            self._fill(module, made)
        for holder, key, empty in taken:
            if key in module._non_persistent_buffers_set:
                continue
            tensor = self._read(self._names[id(empty)], empty.shape)
            is_parameter = isinstance(empty, nn.Parameter)
            holder[key] = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor

    @torch.no_grad()
    def _fill(self, module: nn.Module, made: list[tuple[dict[str, Any], str, Tensor]]) -> None:
        """Make the buffers that no checkpoint holds, as the model's class fills them.

        It fills parameters too, but those are still on the meta device, where that does nothing.
        """
        model: Any = self._model()
        for holder, key, empty in made:
            holder[key] = torch.empty_like(empty, device="cpu")
        with torch.random.fork_rng(devices=[]):
            model._init_weights(module)

    def _read(self, name: str, shape: torch.Size) -> Tensor:
        """Return a parameter: mapped where a tensor on disk is just that, else put together."""
        if name not in self._places:
            model = self._model()
            assert model is not None
            self._add_places(find_runs(model, {name: Axis(None)}, self._stored))
        places, axis = self._places[name], self._axes.get(name, Axis(None))
        if len(places) == 1 and _is_whole(*places[0], axis, shape):
            return places[0][0].map()
        if name not in self._built:
            layer = name.rpartition(".")[0]
            self._built = {n: t for n, t in self._built.items() if n.startswith(f"{layer}.")}
            self._built[name] = _put_together(places, axis, shape)
        return self._built[name]

    def _add_places(self, runs: dict[str, list[Run]]) -> None:
        for place, found in runs.items():
            self._places.setdefault(found[0].parameter, []).append((self._stored[place], found))


def _holders(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    return module._parameters, module._buffers


def _is_whole(stored: Stored, runs: Sequence[Run], axis: Axis, shape: torch.Size) -> bool:
    """Tell whether a tensor on disk is a parameter as it is: no part of it, and not turned."""
    return stored.shape == shape and all(
        run.expert == number and run.axis == axis.rows and bool((run.entries_N.diff() == 1).all())
        for number, run in enumerate(runs)
    )


def _put_together(
    places: Sequence[tuple[Stored, list[Run]]], axis: Axis, shape: torch.Size
) -> Tensor:
    """Return a parameter whose rows or experts lie in several tensors, or turned."""
    whole = torch.empty(shape, dtype=DTYPES[places[0][0].dtype], device="cpu")
    rank = len(shape) - axis.has_experts
    for stored, runs in places:
        tensor = stored.map()
        for number, run in enumerate(runs):
            matrix = tensor[number] if tensor.dim() > rank else tensor
            target = whole[run.expert] if axis.has_experts else whole
            if run.axis is None or axis.rows is None:
                target.copy_(matrix)
            else:
                rows_N = matrix if run.axis == axis.rows else matrix.T
                target.index_copy_(axis.rows, run.entries_N, rows_N)
    return whole
