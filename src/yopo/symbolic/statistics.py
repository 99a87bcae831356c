"""What metrics look at beside weights: gradients and inputs, on text.

Shapes: N sequences, W tokens a sequence.
"""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from yopo.errors import InvalidArgumentError, PolicyFileError
from yopo.evidence import checksum_of
from yopo.files import read_folder, write_folder
from yopo.symbolic.activations import read_activations
from yopo.symbolic.gradients import no_gradients, read_gradients
from yopo.symbolic.inputs import Data, inputs_of, name_of
from yopo.symbolic.matrices import Matrix, find_blocks, matrices_of
from yopo.writing import LENGTH, SEQUENCES


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """Hold the gradients and the inputs of the matrices of one model.

    Attributes:
        gradients: G of each parameter by its path, in its shape, float32: 100 · √(Σ gₙ²) over
            sequences, as the reference has it.
        activations: X of each matrix by name, `(in,)`, float32: the mean over sequences of the
            squared norm of each input over the tokens of a sequence.
        made: How they were made: class and checksum of the model, data, sequences, length, seed,
            and a checksum of the tokens.
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
        if "class" not in self.made or "checksum" not in self.made:
            raise InvalidArgumentError(
                "`statistics` do not say of which model they are. Make them with "
                "`yopo.symbolic.collect_statistics(model)`."
            )
        if self.made["class"] != type(model).__name__:
            raise InvalidArgumentError(
                f"`statistics` are of a {self.made['class']}, and the model is a "
                f"{type(model).__name__}."
            )
        if self.made["checksum"] != checksum_of(model).hex():
            raise InvalidArgumentError(
                "`statistics` are of a model with other weights, or in another dtype. Collect them "
                "on this one with `yopo.symbolic.collect_statistics(model)`."
            )

    def checksum(self) -> str:
        """Return a checksum of G and X."""
        return checksum_of_tensors(self._tensors())

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"G.{name}": value for name, value in self.gradients.items()}
        return tensors | {f"X.{name}": value for name, value in self.activations.items()}

    def save(self, path: str | Path) -> None:
        """Write them into the folder `path`: safetensors, and JSON that says how they were made.

        Raises:
            PolicyFileError: If the folder cannot be written.
        """
        write_folder(path, "statistics", {"made": dict(self.made)}, self._tensors())

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
    return read_statistics(model, inputs, terminals, data=name_of(data), seed=seed)


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
        "tokens": checksum_of_tensors(inputs),
        "sequences": rows,
        "length": tokens,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }
    gradients, activations = {}, {}
    if "G" in terminals:
        parameters = {matrix.key: matrix.parameter for matrix in matrices_of(blocks)}
        gradients = read_gradients(model, parameters, inputs)
    if "X" in terminals:
        activations = read_activations(model, blocks, inputs)
    return Statistics(gradients, activations, made)


def check_statistics(statistics: object) -> None:
    """Check that what was given as `statistics` is that.

    Raises:
        InvalidArgumentError: If it is not.
    """
    if not isinstance(statistics, Statistics):
        raise InvalidArgumentError(
            "`statistics` must be what `yopo.symbolic.collect_statistics` or `Statistics.load` "
            f"returns, got a {type(statistics).__name__}."
        )


def checksum_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return a checksum of tensors and their names, whatever their order."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()
