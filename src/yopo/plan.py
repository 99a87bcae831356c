"""Which rows stay: `PruningPlan`, and how many of them a ratio leaves.

Shapes: F rows of an FFN, K kept rows.
"""

import math
import numbers
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor

from yopo.adapters import Ffn
from yopo.errors import InvalidArgumentError, PolicyFileError
from yopo.files import read_folder, write_folder

MultipleOf = int | Literal["auto"]

MULTIPLES = (256, 128, 64, 32, 16, 8, 4, 2)
"""Widths that hardware and quantisers like are multiples of these, the larger the better."""

ROUNDED_SHARE = 0.01
"""Widths are rounded where that moves the ratio by less than this."""


@dataclass(frozen=True, slots=True, eq=False)
class PruningPlan:
    """Hold the rows that stay in each FFN of a model: data that can be saved, compared, applied.

    Attributes:
        kept: For each FFN by name, its kept rows `(K,)`: sorted, unique, int64, on the CPU.
        rows: For each FFN by name, how many rows it has before the cut.
        ratio: The share of rows that was asked for, in [0, 1).

    Raises:
        InvalidArgumentError: If kept rows are missing, unsorted, repeated or out of range, or
            `ratio` is outside [0, 1).

    Example:
        >>> plan = PruningPlan(kept={"mlp": torch.tensor([0, 2])}, rows={"mlp": 4}, ratio=0.5)
        >>> plan.ratio_reached
        0.5
    """

    kept: Mapping[str, Tensor]
    rows: Mapping[str, int]
    ratio: float

    def __post_init__(self) -> None:
        """Check what the attributes promise."""
        object.__setattr__(self, "ratio", check_ratio(self.ratio))
        if self.kept.keys() != self.rows.keys():
            raise InvalidArgumentError("`kept` and `rows` must name the same FFNs.")
        if not self.kept:
            raise InvalidArgumentError("`kept` must name at least one FFN.")
        for name, kept_K in self.kept.items():
            if not _is_sorted_index(kept_K):
                raise InvalidArgumentError(
                    f"`kept[{name!r}]` must hold at least one row, as sorted unique int64."
                )
            if kept_K[0] < 0 or kept_K[-1] >= self.rows[name]:
                raise InvalidArgumentError(
                    f"`kept[{name!r}]` must lie in [0, {self.rows[name]}), got "
                    f"{int(kept_K[0])} to {int(kept_K[-1])}."
                )

    @property
    def widths(self) -> dict[str, int]:
        """Return the number of rows that stay in each FFN, by name."""
        return {name: len(kept_K) for name, kept_K in self.kept.items()}

    @property
    def ratio_reached(self) -> float:
        """Return the share of all FFN rows that the plan removes, in [0, 1)."""
        return 1.0 - sum(self.widths.values()) / sum(self.rows.values())

    def __eq__(self, other: object) -> bool:
        """Tell whether `other` keeps the same rows of the same FFNs."""
        if not isinstance(other, PruningPlan):
            return NotImplemented
        return dict(self.rows) == dict(other.rows) and all(
            torch.equal(kept_K, other.kept[name]) for name, kept_K in self.kept.items()
        )

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        """Return one line for each run of FFNs that go from one width to another."""
        groups: dict[tuple[int, int], list[str]] = defaultdict(list)
        for name, width in self.widths.items():
            groups[self.rows[name], width].append(name)
        lines = [
            f"PruningPlan: ratio {self.ratio:g} asked, {self.ratio_reached:.4f} reached, "
            f"{len(self.kept)} FFNs"
        ]
        for (rows, width), names in groups.items():
            span = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]} ({len(names)})"
            lines.append(f"  {span}: {rows} → {width} rows")
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Write the plan into the folder `path`, as `plan.safetensors` and `plan_config.json`.

        Raises:
            PolicyFileError: If the folder cannot be written.
        """
        config = {"ratio": self.ratio, "rows": dict(self.rows)}
        write_folder(path, "plan", config, dict(self.kept))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a plan that `save` wrote.

        Raises:
            PolicyFileError: If the files are missing, damaged, foreign or of a newer format.
        """
        config, tensors = read_folder(path, "plan")
        try:
            rows = config["rows"]
            kept = {name: tensors.pop(name) for name in rows} | tensors  # in the model's order
            return cls(kept=kept, rows=rows, ratio=config["ratio"])
        except (KeyError, TypeError, AttributeError, InvalidArgumentError) as error:
            raise PolicyFileError(f"`{path}` holds a damaged plan: {error}.") from error


def kept_width(rows: int, ratio: float, *, multiple_of: MultipleOf = 1) -> int:
    """Return how many of `rows` rows a ratio leaves.

    With `multiple_of=1` it is the published `int((1 - ratio) * rows)`. A number rounds to its
    nearest multiple. "auto" takes the largest of 256, 128, …, 2 whose nearest multiple moves the
    ratio by less than a percentage point, because hardware and quantisers like such widths; it
    leaves a ratio of 0 alone.

    Raises:
        InvalidArgumentError: If `ratio` is outside [0, 1), nothing would be kept, or
            `multiple_of` is neither "auto" nor in [1, rows].
    """
    ratio = check_ratio(ratio)
    check_multiple_of(multiple_of, rows=rows)
    width = _width(rows, ratio, multiple_of)
    if width < 1:
        most = next(
            percent / 100
            for percent in range(99, -1, -1)
            if _width(rows, percent / 100, multiple_of) >= 1
        )
        raise InvalidArgumentError(f"`ratio={ratio}` keeps 0 of {rows} rows; use at most {most:g}.")
    return width


def _width(rows: int, ratio: float, multiple_of: MultipleOf) -> int:
    """Return what a ratio leaves of `rows` rows, rounded; it may be 0."""
    left = (1.0 - ratio) * rows
    if multiple_of == "auto":
        for multiple in MULTIPLES if ratio > 0 else ():
            width = multiple * round(left / multiple)
            if 0 < width <= rows and abs(width - left) < ROUNDED_SHARE * rows:
                return width
    elif multiple_of > 1:
        return multiple_of * min(round(left / multiple_of), rows // multiple_of)
    return int(left)


def plan_widths(
    ffns: Sequence[Ffn], ratio: float, *, multiple_of: MultipleOf = "auto"
) -> dict[str, int]:
    """Return how many rows each FFN keeps, by name.

    FFNs whose widths one config field sets shrink together: the narrowest is rounded, the others
    keep their proportion to it. Experts that share a tensor keep widths that grouped matrix
    products accept, whatever `multiple_of` says.

    Raises:
        InvalidArgumentError: As `kept_width`.
    """
    groups: dict[object, list[Ffn]] = defaultdict(list)
    for ffn in ffns:
        groups[(ffn.width.path, ffn.width.key) if ffn.width else ffn.path].append(ffn)
    widths = {}
    for group in groups.values():
        narrowest = min(group, key=lambda ffn: ffn.rows)
        width = kept_width(narrowest.rows, ratio, multiple_of=multiple_of)
        unit = math.lcm(*(_unit(ffn, narrowest) for ffn in group))
        if width < narrowest.rows:
            width = unit * max(1, min(round(width / unit), narrowest.rows // unit))
        for ffn in group:
            widths[ffn.name] = width * ffn.rows // narrowest.rows
    return {ffn.name: widths[ffn.name] for ffn in ffns}


def check_ratio(ratio: float) -> float:
    """Return `ratio`, a number of any kind in [0, 1), as a float.

    Raises:
        InvalidArgumentError: If it is none.
    """
    is_number = isinstance(ratio, numbers.Real) and not isinstance(ratio, bool)
    if not is_number or not 0.0 <= float(ratio) < 1.0:
        raise InvalidArgumentError(f"`ratio` must be in [0, 1), got {ratio!r}.")
    return float(ratio)


def check_multiple_of(multiple_of: MultipleOf, *, rows: int | None = None) -> None:
    """Check that `multiple_of` is "auto" or a positive integer, and at most `rows` if given.

    Raises:
        InvalidArgumentError: If it is not.
    """
    is_integer = isinstance(multiple_of, int) and not isinstance(multiple_of, bool)
    if multiple_of != "auto" and not (is_integer and multiple_of >= 1):
        raise InvalidArgumentError(
            f'`multiple_of` must be "auto" or a positive integer, got {multiple_of!r}.'
        )
    if rows is not None and multiple_of != "auto" and multiple_of > rows:
        raise InvalidArgumentError(
            f"`multiple_of` must be at most the width {rows}, got {multiple_of}."
        )


def selected_layers(ffns: Sequence[Ffn], layers: Iterable[int | str] | None) -> dict[str, bool]:
    """Tell for each FFN by name whether `layers` selects it.

    Args:
        ffns: The FFNs of a model.
        layers: Numbers, which are compared with the first number in an FFN's name, and patterns
            such as `"model.layers.1?.*"`. None selects all.

    Raises:
        InvalidArgumentError: If an entry selects nothing.
    """
    if layers is None:
        return {ffn.name: True for ffn in ffns}
    if isinstance(layers, str | int):
        layers = [layers]
    chosen: set[str] = set()
    for entry in layers:
        matches = {ffn.name for ffn in ffns if _selects(entry, ffn.name)}
        if not matches:
            raise InvalidArgumentError(
                f"`layers` entry {entry!r} selects no FFN; the names run from `{ffns[0].name}` to "
                f"`{ffns[-1].name}`."
            )
        chosen |= matches
    return {ffn.name: ffn.name in chosen for ffn in ffns}


def stack_and_layer(ffn: Ffn) -> tuple[str, str]:
    """Return the names of the stack of layers and of the layer that hold `ffn`."""
    parts = ffn.name.split(".")
    depth = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[:depth]), ".".join(parts[: depth + 1])


def _is_sorted_index(kept_K: object) -> bool:
    return (
        isinstance(kept_K, Tensor)
        and kept_K.dtype == torch.int64
        and kept_K.dim() == 1
        and len(kept_K) > 0
        and bool((kept_K.diff() > 0).all())
    )


def _selects(entry: int | str, name: str) -> bool:
    if isinstance(entry, str):
        return fnmatchcase(name, entry)
    number = next((part for part in name.split(".") if part.isdigit()), None)
    return number is not None and int(number) == entry


def _unit(ffn: Ffn, narrowest: Ffn) -> int:
    """Return the step in rows of the narrowest FFN at which this one has a usable width too."""
    unit = narrowest.rows // math.gcd(ffn.rows, narrowest.rows)
    if ffn.width is not None and narrowest.width is not None:
        unit = math.lcm(unit, narrowest.width.per_row.denominator)
    multiple = expert_multiple(ffn)
    return unit * multiple // math.gcd(multiple, unit * ffn.rows // narrowest.rows)


def expert_multiple(ffn: Ffn) -> int:
    """Return what the width must be a multiple of: grouped products need strides of 16 bytes.

    That is 8 numbers of half precision, in which any model may be loaded later; fewer where only
    the precision at hand can run the model as it is.
    """
    sizes = [slot.parameter.element_size() for slot in ffn.slots if slot.expert is not None]
    multiples = (8, 16 // min(sizes)) if sizes else ()
    return next((multiple for multiple in multiples if ffn.rows % multiple == 0), 1)
