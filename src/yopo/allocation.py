"""Spread what is removed over the layers, so that the model loses least by it.

Shapes: F rows, D model width, C cells, S steps.

A cell is what has to keep one width: an FFN, or the experts that share one tensor. Rows of a cell
go in the order of greedy elimination, a step at a time; steps of all cells go in the order of loss
per parameter, which is the least sum of losses for a budget where losses grow from step to step.

The loss of a step is the squared error that it adds to the residual stream, as a share of what the
stream holds there: the next norm divides by the stream, so the same error counts for less where
the stream is large. What it holds is the sum of what the FFNs so far have added. Of the squares of
a layer's output the median entry is taken, not the mean: in large models a few entries hold
activations a thousand times the others (Sun et al. 2024, "Massive Activations in Large Language
Models"), which would make every later layer look unimportant.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from yopo.adapters import Ffn
from yopo.elimination import Elimination, ffn_elimination
from yopo.errors import InvalidArgumentError
from yopo.moments import Moments
from yopo.plan import (
    MULTIPLES,
    ROUNDED_SHARE,
    MultipleOf,
    check_multiple_of,
    check_ratio,
    expert_multiple,
    stack_and_layer,
)

_LEAST = 0.25
"""Every FFN keeps at least this share of what one ratio for all would leave of it."""


@dataclass(frozen=True, slots=True, eq=False)
class Losses:
    """Say what the rows of one FFN cost, summed over the tokens that it saw.

    Attributes:
        elimination: The order in which its rows go, and the loss of each in the mean over tokens.
        added: Sum of squares of its output, as the median entry has it.
        tokens: How many tokens it saw.
    """

    elimination: Elimination
    added: float
    tokens: int


def ffn_losses(ffn: Ffn, moments: Moments) -> Losses:
    """Eliminate the rows of `ffn`, which is not changed, and weigh what it adds to the stream."""
    contract_FD = ffn.contract_weight().double()
    square_D = (contract_FD * (moments.second_FF @ contract_FD)).sum(dim=0)
    added = float(square_D.median()) * len(square_D) * moments.tokens
    return Losses(ffn_elimination(ffn, moments), added, moments.tokens)


@dataclass(frozen=True, slots=True, eq=False)
class Spread:
    """Hold the steps in which rows of all cells go: one order serves all ratios.

    Attributes:
        cells: FFNs that need one width, together.
        step_C: By how many rows the width of each cell shrinks at a time.
        cell_S: The cell of each step, cheapest step first.
        rank_S: How many steps of the cell go before it.
        cost_S: Parameters that go with it, float64.
        total: Parameters in all rows of the cells that have steps.
        unseen: Cells that no token has reached. How much they matter is not known, so they take
            the ratio as it is, and have no steps.
    """

    cells: tuple[tuple[Ffn, ...], ...]
    step_C: Tensor
    cell_S: Tensor
    rank_S: Tensor
    cost_S: Tensor
    total: float
    unseen: frozenset[int]

    @classmethod
    def over(
        cls, ffns: Sequence[Ffn], losses: Mapping[str, Losses], *, multiple_of: MultipleOf
    ) -> Self:
        """Sort the steps of all cells by loss per parameter.

        Args:
            ffns: What is cut, in the order of the model.
            losses: What the rows of each FFN cost, by name.
            multiple_of: Widths of what is cut are multiples of this. "auto" takes, for each cell,
                the largest of 256, 128, …, 2 that moves its ratio by less than a percentage point.

        Raises:
            InvalidArgumentError: If `multiple_of` is neither "auto" nor in [1, rows].
        """
        cells = _cells(ffns)
        steps = [_step(cell, multiple_of) for cell in cells]
        stream = _stream(ffns, losses)
        unseen, parts = set(), []
        for number, (cell, step) in enumerate(zip(cells, steps, strict=True)):
            loss_S, cost_S = _step_losses(cell, losses, step, stream[stack_and_layer(cell[0])])
            if not any(losses[ffn.name].tokens for ffn in cell):
                unseen.add(number)
                continue
            rank_S = torch.arange(len(cost_S), device="cpu")
            parts.append((loss_S / cost_S, torch.full_like(rank_S, number), rank_S, cost_S))
        if not parts:
            empty = torch.zeros(0, dtype=torch.int64, device="cpu")
            parts.append((empty.double(), empty, empty, empty.double()))
        density_S, cell_S, rank_S, cost_S = map(torch.cat, zip(*parts, strict=True))
        order_S = density_S.sort(stable=True).indices
        return cls(
            tuple(tuple(cell) for cell in cells),
            torch.tensor(steps, device="cpu"),
            cell_S[order_S],
            rank_S[order_S],
            cost_S[order_S],
            float(cost_S.sum()),
            frozenset(unseen),
        )

    def widths(self, ratio: float) -> dict[str, int]:
        """Return how many rows each FFN keeps, by name, for `ratio` of the parameters of all rows.

        Steps go until they come nearest to it. A cell that loses nothing keeps its width, whether
        it is a multiple or not.

        Raises:
            InvalidArgumentError: If `ratio` is outside [0, 1), or more than can go.
        """
        ratio = check_ratio(ratio)
        if not self._can_reach(ratio):
            most = next(p / 100 for p in range(99, -1, -1) if self._can_reach(p / 100))
            raise InvalidArgumentError(
                f"`ratio={ratio}` cannot be spread over {len(self.cells)} FFNs; use at most "
                f"{most:g}."
            )
        allowed_S = self._allowed(ratio)
        cell_S, cost_S = self.cell_S[allowed_S], self.cost_S[allowed_S]
        count = int((cost_S.cumsum(0) - cost_S / 2 <= ratio * self.total).sum())
        taken_C = torch.bincount(cell_S[:count], minlength=len(self.cells))
        for number in self.unseen:
            step, rows = int(self.step_C[number]), self.cells[number][0].rows
            taken_C[number] = min(round(ratio * rows / step), int(self._most(ratio)[number]))
        widths: dict[str, int] = {}
        for cell, step, taken in zip(
            self.cells, self.step_C.tolist(), taken_C.tolist(), strict=True
        ):
            left = (math.ceil(cell[0].rows / step) - taken) * step if taken else cell[0].rows
            widths |= dict.fromkeys((ffn.name for ffn in cell), left)
        return widths

    def _most(self, ratio: float) -> Tensor:
        """Return how many steps `(C,)` of each cell may go at a ratio."""
        rows_C = torch.tensor([cell[0].rows for cell in self.cells], device="cpu")
        least_C = (_LEAST * (1.0 - ratio) * rows_C / self.step_C).ceil().clamp_min(1).long()
        return -(-rows_C // self.step_C) - least_C

    def _allowed(self, ratio: float) -> Tensor:
        return self.rank_S < self._most(ratio)[self.cell_S]

    def _can_reach(self, ratio: float) -> bool:
        """Tell whether the steps allowed come as near to the ratio as a step is long."""
        cost_S = self.cost_S[self._allowed(ratio)]
        slack = float(self.cost_S.max()) / 2 if len(self.cost_S) else 0.0
        return float(cost_S.sum()) + slack >= ratio * self.total


def _cells(ffns: Sequence[Ffn]) -> list[list[Ffn]]:
    """Group FFNs that lie in one tensor, as experts do, and so need one width."""
    cells: list[list[Ffn]] = []
    home: dict[tuple[int, int], list[Ffn]] = {}
    for ffn in ffns:
        keys = [(id(slot.parameter), ffn.rows) for slot in ffn.slots]
        cell = next((home[key] for key in keys if key in home), [])
        if not cell:
            cells.append(cell)
        cell.append(ffn)
        home |= dict.fromkeys(keys, cell)
    return cells


def _step(cell: Sequence[Ffn], multiple_of: MultipleOf) -> int:
    """Return by how many rows the width of a cell shrinks at a time."""
    rows = cell[0].rows
    check_multiple_of(multiple_of, rows=rows)
    unit = math.lcm(*(expert_multiple(ffn) for ffn in cell))
    fits = (multiple for multiple in MULTIPLES if multiple / 2 < ROUNDED_SHARE * rows)
    multiple = next(fits, 1) if multiple_of == "auto" else multiple_of
    step = math.lcm(unit, multiple)
    return step if step <= rows else unit


def _step_losses(
    cell: Sequence[Ffn], losses: Mapping[str, Losses], step: int, stream: float
) -> tuple[Tensor, Tensor]:
    """Return what each step of a cell costs: the share of the stream, and the parameters.

    A row that costs less than one before it counts as much as that: it could not have gone alone.
    """
    rows = cell[0].rows
    first = rows % step or step
    parts = [first] + [step] * ((rows - first) // step)
    loss_F = torch.zeros(rows, dtype=torch.float64, device="cpu")
    for ffn in cell:
        found = losses[ffn.name]
        loss_F += found.elimination.loss_F.cpu().cummax(0).values * found.tokens
    loss_S = torch.stack([part.sum() for part in torch.split(loss_F, parts)])
    cost_S = torch.tensor(parts, dtype=torch.float64, device="cpu")
    return loss_S / max(stream, 1e-300), cost_S * sum(ffn.parameters_per_row for ffn in cell)


def _stream(ffns: Sequence[Ffn], losses: Mapping[str, Losses]) -> dict[tuple[str, str], float]:
    """Return what the residual stream holds behind each layer, summed over tokens.

    Streams of different stacks, as those of an encoder and a decoder, are different ones.
    """
    stream: dict[tuple[str, str], float] = {}
    held: dict[str, float] = defaultdict(float)
    for ffn in ffns:
        stack, _ = layer = stack_and_layer(ffn)
        held[stack] += losses[ffn.name].added
        stream[layer] = held[stack]
    return stream
