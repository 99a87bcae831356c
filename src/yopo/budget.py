"""How much is removed: a ratio of rows, a ratio of the model, or what a size leaves room for."""

import logging
import math
import numbers
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

from torch import nn

from yopo.adapters import Ffn
from yopo.errors import InvalidArgumentError
from yopo.plan import check_ratio

logger = logging.getLogger(__name__)

RatioOf = Literal["ffn", "model"]

Widths = Callable[[float], dict[str, int]]
"""From a ratio of rows to the width of each FFN by name: the larger the ratio, the narrower."""

_STEPS = 10**6
"""Ratios that are looked for are multiples of 1 / this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Say how much of a model goes, by a ratio or by the size that it may have afterwards.

    Attributes:
        ratio: Share that goes, in [0, 1); None where a size is given.
        ratio_of: What `ratio` is a share of: "ffn" for the rows of the FFNs that are cut, "model"
            for all parameters of the model.
        parameters: How many parameters the whole model may have, tied ones counted once.
        bytes: How many bytes they may take.

    Raises:
        InvalidArgumentError: If it is not exactly one of ratio, parameters and bytes, or that one
            is outside its range.
    """

    ratio: float | None = None
    ratio_of: RatioOf = "ffn"
    parameters: float | None = None
    bytes: float | None = None

    def __post_init__(self) -> None:
        """Check every field."""
        given = [
            name for name in ("ratio", "parameters", "bytes") if getattr(self, name) is not None
        ]
        if len(given) != 1:
            told = " and ".join(f"`{name}`" for name in given) or "none"
            raise InvalidArgumentError(
                f"exactly one of `ratio`, `parameters` and `bytes` says how much goes, got {told}."
            )
        if self.ratio_of not in ("ffn", "model"):
            raise InvalidArgumentError(
                f'`ratio_of` must be "ffn" or "model", got {self.ratio_of!r}.'
            )
        if self.ratio is not None:
            object.__setattr__(self, "ratio", check_ratio(self.ratio))
        else:
            _check_size(given[0], getattr(self, given[0]))
            if self.ratio_of == "model":
                raise InvalidArgumentError(
                    f'`ratio_of="model"` goes with `ratio`, not with `{given[0]}`.'
                )

    def meet(
        self, model: nn.Module, ffns: Sequence[Ffn], widths: Widths
    ) -> tuple[float, dict[str, int]]:
        """Return the ratio of rows, and the widths, that meet the budget.

        That is the smallest ratio, in steps of a millionth, whose widths leave no more than a size
        allows, or `ratio` itself where it is one of rows.

        Args:
            model: The model that holds `ffns`.
            ffns: All that `widths` names.
            widths: Tells the widths for a ratio, and raises for one that keeps nothing.

        Raises:
            InvalidArgumentError: If the ratio keeps nothing, or the size cannot be reached.
        """
        if self.ratio is not None and self.ratio_of == "ffn":
            return self.ratio, widths(self.ratio)
        size = _Size.of(model, ffns, in_bytes=self.bytes is not None)
        limit, told = self._limit(size)
        if self.ratio is None and size.total <= limit:
            logger.warning(f"The model has {size.total:,} {size.unit} already; {told} is met.")
        ratio, found = _smallest(widths, size, limit, told)
        share = 1.0 - sum(found.values()) / sum(ffn.rows for ffn in ffns)
        logger.info(
            f"{told} takes {share:.2%} of the FFN rows: {size.total:,} → {size.left(found):,} "
            f"{size.unit}."
        )
        return ratio, found

    def _limit(self, size: "_Size") -> tuple[float, str]:
        """Return how much may stay, and how the caller has put it."""
        if self.ratio is not None:
            told = f'`ratio={self.ratio:g}, ratio_of="model"`'
            return math.floor((1.0 - self.ratio) * size.total), told
        if self.parameters is not None:
            return float(self.parameters), f"`parameters={self.parameters:.10g}`"
        return float(self.bytes or 0), f"`bytes={self.bytes:.10g}`"


@dataclass(frozen=True, slots=True)
class _Size:
    """Count what is left of a model, in parameters or bytes, tied weights once."""

    unit: str
    total: int
    rows: Mapping[str, int]
    row_size: Mapping[str, int]

    @classmethod
    def of(cls, model: nn.Module, ffns: Sequence[Ffn], *, in_bytes: bool) -> Self:
        return cls(
            "bytes" if in_bytes else "parameters",
            sum(p.numel() * (p.element_size() if in_bytes else 1) for p in model.parameters()),
            {ffn.name: ffn.rows for ffn in ffns},
            {f.name: f.bytes_per_row if in_bytes else f.parameters_per_row for f in ffns},
        )

    def left(self, widths: Mapping[str, int]) -> int:
        """Return what is left where each FFN keeps so many rows."""
        return self.total - sum(
            (self.rows[name] - width) * self.row_size[name] for name, width in widths.items()
        )


def _smallest(widths: Widths, size: _Size, limit: float, told: str) -> tuple[float, dict[str, int]]:
    """Return the smallest ratio, and its widths, that leave at most `limit`."""
    widths(0.0)  # raises what is wrong at any ratio

    def at(step: int) -> dict[str, int] | None:
        try:
            return widths(step / _STEPS)
        except InvalidArgumentError:
            return None

    def is_enough(step: int) -> bool:
        return (found := at(step)) is None or size.left(found) <= limit

    step = bisect_left(range(_STEPS), True, key=is_enough)
    found = at(step) if step < _STEPS else None
    if found is None:
        least = size.left(widths((step - 1) / _STEPS))
        raise InvalidArgumentError(
            f"{told} cannot be met by removing FFN rows: of {size.total:,} {size.unit}, at least "
            f"{least:,} stay."
        )
    return step / _STEPS, found


def _check_size(name: str, value: object) -> None:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:  # type: ignore[operator]
        raise InvalidArgumentError(f"`{name}` must be a positive number, got {value!r}.")
