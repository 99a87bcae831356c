"""What becomes of the files of a checkpoint when rows are removed.

Shapes: N entries along the axis of rows of a matrix on disk, K of them kept, D its other axis.
"""

import json
import logging
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from yopo.checkpoint import Checkpoint
from yopo.checkpoint_files import INDEX, WEIGHTS
from yopo.plan import PruningPlan
from yopo.shards import DTYPES, Piece, Stored, read_header
from yopo.stored import Run

logger = logging.getLogger(__name__)

Restoring = Callable[[str], tuple[Tensor, Tensor | None] | None]
"""From the name of an FFN to its re-solved contract matrix `(K, D)` and bias; None without any."""

_PART = 2**23
"""Bytes that are cut at a time."""

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf"}
"""Ends of the names of files that hold weights: those of the uncut model stay behind."""


class Rewriting:
    """Tell what becomes of each tensor of a checkpoint.

    Args:
        checkpoint: The checkpoint; its model must not have been cut yet.
        plan: Which rows stay.
        restored: Gives what has been re-solved.
    """

    def __init__(self, checkpoint: Checkpoint, plan: PruningPlan, restored: Restoring) -> None:
        """Note which entries of each parameter stay, while its sizes are those on disk."""
        self._runs, self._restored = checkpoint.runs, restored
        names = {id(p): name for name, p in checkpoint.model.named_parameters()}
        kept: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
        self._columns_of: dict[tuple[str, int], list[str]] = {}
        self._bias_of: dict[tuple[str, int], str] = {}
        self._spare: dict[str, Tensor] = {}
        for ffn in checkpoint.ffns:
            kept_K = plan.kept[ffn.name]
            if len(kept_K) == ffn.rows:
                continue
            for slot in ffn.slots:
                kept[names[id(slot.parameter)], slot.expert or 0].append(slot.indices(kept_K))
            expert = ffn.contract.expert or 0
            part = names[id(ffn.contract.parameter)], expert
            self._columns_of.setdefault(part, []).append(ffn.name)
            if (bias := ffn.bias_parameter) is not None:
                self._bias_of[names[id(bias)], expert] = ffn.name
        self._kept = {part: torch.cat(entries) for part, entries in kept.items()}
        for (name, _), entries in self._kept.items():
            self._spare.setdefault(name, entries)  # for experts that are there and never used

    def piece(self, stored: Stored) -> Piece:
        """Return what to write for a tensor."""
        runs = self._runs.get(stored.name, [])
        if not runs:
            return Piece(stored, stored.shape)
        if runs[0].axis is None:
            is_restored = any(self._bias(run) is not None for run in runs)
            return Piece(stored, stored.shape, self._biases(stored, runs) if is_restored else None)
        if runs[0].parameter not in self._spare:
            return Piece(stored, stored.shape)
        places = [self._places(run) for run in runs]
        shape = list(stored.shape)
        shape[len(shape) - runs[0].rank + runs[0].axis] = len(places[0])
        return Piece(stored, tuple(shape), self._parts(stored, runs, places))

    def _places(self, run: Run) -> Tensor:
        """Return where the entries that stay lie in a run."""
        kept = self._kept.get((run.parameter, run.expert), self._spare[run.parameter])
        stays = torch.zeros(1 + int(run.entries_N.max()), dtype=torch.bool, device="cpu")
        stays[kept[kept < len(stays)]] = True
        return stays[run.entries_N].nonzero()[:, 0]

    def _parts(self, stored: Stored, runs: list[Run], places: list[Tensor]) -> Iterator[Tensor]:
        """Yield what stays of a tensor, in the order of its bytes."""
        tensor = stored.map()
        for number, (run, place_K) in enumerate(zip(runs, places, strict=True)):
            matrix = tensor[number] if tensor.dim() > run.rank else tensor
            solved_KD = self._solved(run)
            if matrix.dim() == 1:
                yield matrix[place_K]
            elif solved_KD is not None:
                solved = (solved_KD if run.axis == 0 else solved_KD.T).to(DTYPES[stored.dtype])
                yield from torch.split(solved, _rows_of_a_part(solved))
            elif run.axis == 0:
                for part_K in torch.split(place_K, _rows_of_a_part(matrix)):
                    yield matrix.index_select(0, part_K)
            else:
                for part_DN in torch.split(matrix, _rows_of_a_part(matrix)):
                    yield part_DN.index_select(1, place_K)

    def _solved(self, run: Run) -> Tensor | None:
        """Return the re-solved columns of all FFNs whose contract matrices a run holds."""
        ffns = self._columns_of.get((run.parameter, run.expert), [])
        found = [self._restored(ffn) for ffn in ffns]
        parts = [pair[0] for pair in found if pair is not None]
        if not parts or len(parts) < len(found):
            return None
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _bias(self, run: Run) -> Tensor | None:
        """Return the re-solved bias of a run, None where it stays as it is."""
        ffn = self._bias_of.get((run.parameter, run.expert))
        pair = None if ffn is None else self._restored(ffn)
        return None if pair is None else pair[1]

    def _biases(self, stored: Stored, runs: list[Run]) -> Iterator[Tensor]:
        tensor_ED = stored.map().view(len(runs), -1)
        for run, old_D in zip(runs, tensor_ED, strict=True):
            new_D = self._bias(run)
            yield old_D if new_D is None else new_D.to(old_D.dtype)


def write_other_files(checkpoint: Checkpoint, target: Path, old_config: dict[str, Any]) -> None:
    """Write everything but the weights: the config, the index, and copies of all other files.

    Args:
        checkpoint: The checkpoint; the config of its model says what the new one is to say.
        target: The folder to write into, which holds the new weights already.
        old_config: What the config said before.
    """
    folder, left_out = checkpoint.folder, []
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder)
        if not file.is_file() or any(part.startswith(".") for part in inside.parts[:-1]):
            continue
        if file.suffix in _WEIGHTS or file.name.endswith(".index.json"):
            left_out += [str(inside)] if file not in checkpoint.shards else []
            continue
        (target / inside).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / inside)
    document = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    _update(document, old_config, checkpoint.model.config.to_dict())
    _write_json(target / "config.json", document)
    if INDEX in left_out and folder / WEIGHTS not in checkpoint.shards:
        left_out.remove(INDEX)
        _write_json(target / INDEX, _index(checkpoint, target))
    if left_out:
        logger.warning(
            "Left behind, because they hold other weights than the pruned ones: %s.",
            ", ".join(left_out),
        )


def _index(checkpoint: Checkpoint, target: Path) -> dict[str, Any]:
    """Return the index of the new shards: the names are those of the old one."""
    index: dict[str, Any] = json.loads((checkpoint.folder / INDEX).read_text(encoding="utf-8"))
    new = [tensor for file in checkpoint.shards for tensor in read_header(target / file.name)[0]]
    totals = {
        "total_size": sum(tensor.stop - tensor.start for tensor in new),
        "total_parameters": sum(prod(tensor.shape) for tensor in new),
    }
    metadata = index.setdefault("metadata", {})
    metadata |= {key: value for key, value in totals.items() if key in metadata}
    return index


def _update(document: dict[str, Any], old: dict[str, Any], new: dict[str, Any]) -> None:
    """Write into a document what differs between an old config and a new one, and nothing else."""
    for key, value in new.items():
        if key in old and old[key] == value:
            continue
        if isinstance(value, dict) and isinstance(document.get(key), dict):
            _update(document[key], old.get(key, {}), value)
        else:
            document[key] = value


def _write_json(file: Path, document: dict[str, Any]) -> None:
    file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _rows_of_a_part(matrix: Tensor) -> int:
    return max(1, _PART // max(1, matrix.shape[1] * matrix.element_size()))
