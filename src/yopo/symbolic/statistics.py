"""What metrics look at beside weights: gradients and inputs, on text.

Shapes: N sequences, W tokens a sequence, T tokens.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from yopo.errors import InvalidArgumentError, PolicyFileError, UnsupportedModelError
from yopo.evidence import checksum_of
from yopo.files import read_folder, write_folder
from yopo.symbolic.gradients import no_gradients, read_gradients
from yopo.symbolic.inputs import Data, inputs_of, is_self
from yopo.symbolic.matrices import Block, Matrix, find_blocks, matrices_of
from yopo.symbolic.passes import batches_of
from yopo.watching import Watch, eager_experts, without_head
from yopo.writing import LENGTH, SEQUENCES, with_progress


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """Hold the gradients and the inputs of the matrices of one model.

    Attributes:
        gradients: G of each parameter by its path, in its shape, float32: 100 · √(Σ gₙ²) over
            sequences, as the reference has it.
        activations: X of each matrix by name, `(in,)`, float32: the mean over sequences of the
            squared norm of each input over the tokens of a sequence.
        made: How they were made: class and checksum of the model, data, sequences, length, seed.
    """

    gradients: Mapping[str, Tensor]
    activations: Mapping[str, Tensor]
    made: Mapping[str, Any] = field(default_factory=dict)

    @property
    def terminals(self) -> frozenset[str]:
        """Return which of G and X there are."""
        held = {"G": self.gradients, "X": self.activations}
        return frozenset(name for name, values in held.items() if values)

    def of(self, matrix: Matrix) -> dict[str, Tensor]:
        """Return the terminals of a matrix where it lies: W and G `(out, in)`, and X `(1, in)`."""
        weight = matrix.weight
        found = {"W": weight.float().abs()}
        if matrix.key in self.gradients:
            found["G"] = matrix.view(self.gradients[matrix.key]).to(weight.device)
        if matrix.name in self.activations:
            found["X"] = self.activations[matrix.name].to(weight.device)[None]
        return found

    def check(self, model: nn.Module) -> None:
        """Check that they are those of `model` as it is.

        Raises:
            InvalidArgumentError: If they are of another model, or its weights have changed.
        """
        if self.made.get("class") != type(model).__name__:
            raise InvalidArgumentError(
                f"`statistics` are of a {self.made.get('class')}, and the model is a "
                f"{type(model).__name__}."
            )
        if self.made.get("checksum") != checksum_of(model).hex():
            raise InvalidArgumentError(
                "`statistics` are of a model with other weights, or in another dtype. Collect them "
                "on this one with `yopo.symbolic.collect_statistics(model)`."
            )

    def save(self, path: str | Path) -> None:
        """Write them into the folder `path`: safetensors, and JSON that says how they were made.

        Raises:
            PolicyFileError: If the folder cannot be written.
        """
        tensors = {f"G.{name}": value for name, value in self.gradients.items()}
        tensors |= {f"X.{name}": value for name, value in self.activations.items()}
        write_folder(path, "statistics", {"made": dict(self.made)}, tensors)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Return what `save` wrote.

        Raises:
            PolicyFileError: If files are missing, damaged, foreign or of a newer format.
        """
        config, tensors = read_folder(path, "statistics")
        if not isinstance(config.get("made"), dict):
            raise PolicyFileError(f"`{path}` does not say how its statistics were made.")
        held = {
            kind: {name[2:]: value for name, value in tensors.items() if name.startswith(kind)}
            for kind in ("G.", "X.")
        }
        return cls(held["G."], held["X."], config["made"])


def collect_statistics(
    model: nn.Module,
    *,
    terminals: Collection[str] = ("G", "X"),
    data: Data = "self",
    tokenizer: Any = None,
    sequences: int = SEQUENCES,
    length: int = LENGTH,
    seed: int = 0,
) -> Statistics:
    """Return the gradients and inputs of the linear maps in the layers of `model`.

    Args:
        model: A causal language model or an encoder-decoder; for inputs alone, whatever reads
            token ids. It is as it was afterwards.
        terminals: Which to collect, of "G" and "X".
        data: "self" for text that the model writes itself; token ids `(N, W)`; a text, one of the
            names that `yopo.perplexity` knows, or the `Path` of a file, of which windows are drawn.
        tokenizer: The model's, for text.
        sequences: How many windows, N at least 1; for token ids, those given.
        length: Tokens of each, W at least 3; for token ids, those given.
        seed: Seed of what is written or drawn.

    Raises:
        InvalidArgumentError: If an argument is outside its range, the text is too short, or the
            model cannot read the tokens.
        UnsupportedModelError: If the model cannot be pruned, cannot write, predicts no next tokens
            where G is asked for, or its inputs or gradients are NaN or infinite.

    Example:
        >>> statistics = yopo.symbolic.collect_statistics(model, sequences=8, length=32)
        >>> sorted(statistics.terminals)
        ['G', 'X']
    """
    unknown = sorted(set(terminals) - {"G", "X"})
    if unknown or not terminals or isinstance(terminals, str):
        raise InvalidArgumentError(f'`terminals` must be of "G" and "X", got {terminals!r}.')
    inputs = inputs_of(
        model, data, tokenizer=tokenizer, sequences=sequences, length=length, seed=seed
    )
    told = str(data) if isinstance(data, Path) or is_self(data) else "given"
    return read_statistics(model, inputs, terminals, data=told, seed=seed)


def read_statistics(
    model: Any, inputs: dict[str, Tensor], terminals: Collection[str], **made: Any
) -> Statistics:
    """Return what `collect_statistics` does, of inputs that are there already.

    Args:
        model: As for `collect_statistics`.
        inputs: Keyword arguments of the model `(N, W)`, batch first.
        terminals: As for `collect_statistics`.
        **made: How the inputs were made, to be told with them.

    Raises:
        UnsupportedModelError: As for `collect_statistics`.
    """
    blocks = find_blocks(model)
    if "G" in terminals and not model.can_generate():
        raise no_gradients(model)
    rows, tokens = next(iter(inputs.values())).shape
    made |= {
        "class": type(model).__name__,
        "checksum": checksum_of(model).hex(),
        "sequences": rows,
        "length": tokens,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }
    gradients, activations = {}, {}
    if "G" in terminals:
        parameters = {matrix.key: matrix.parameter for matrix in matrices_of(blocks)}
        gradients = read_gradients(model, parameters, inputs)
    if "X" in terminals:
        activations = _read_activations(model, blocks, inputs)
    return Statistics(gradients, activations, made)


def _read_activations(
    model: nn.Module, blocks: Sequence[Block], inputs: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return X of each matrix of a model that is run as it is."""
    rows = len(next(iter(inputs.values())))
    device = next(model.parameters()).device
    body = without_head(model, [block.name for block in blocks])
    training = model.training
    try:
        model.eval()
        with eager_experts(model), torch.no_grad(), watch_norms(matrices_of(blocks), rows) as norms:
            for batch in with_progress(batches_of(inputs), "read"):
                body(**{key: ids.to(device) for key, ids in batch.items()}, use_cache=False)
    finally:
        model.train(training)
    return {name: norm.cpu() for name, norm in norms.items()}


@contextmanager
def watch_norms(matrices: Sequence[Matrix], sequences: int) -> Iterator[dict[str, Tensor]]:
    """Give X of each matrix by name, which is there after what is run inside has been run.

    Raises:
        UnsupportedModelError: If inputs are NaN or infinite.
    """
    norms = {
        matrix.name: torch.zeros(
            matrix.weight.shape[1], device=matrix.parameter.device, dtype=torch.float32
        )
        for matrix in matrices
    }
    with Watch(
        (matrix.weight, matrix.expert, partial(_add_norms, norms[matrix.name]))
        for matrix in matrices
    ):
        yield norms
    for name, norm in norms.items():
        if not torch.isfinite(norm.div_(sequences)).all():
            raise UnsupportedModelError(
                f"the inputs of `{name}` are NaN or infinite on this text. Load the model in a "
                "wider `dtype`."
            )


def _add_norms(total: Tensor, inputs: Tensor) -> None:
    total += inputs.detach().reshape(-1, inputs.shape[-1]).float().square().sum(dim=0)
