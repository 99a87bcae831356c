"""Symbolic pruning metrics: immutable trees of primitives over weights, gradients, activations."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from yopo.errors import InvalidArgumentError
from yopo.symbolic.formulas import formula_of
from yopo.symbolic.names import DEEPEST, fault_of
from yopo.symbolic.primitives import PRIMITIVES, PrimitiveSet
from yopo.symbolic.reading import TextReader, Tree, tree_of_json


@dataclass(frozen=True)
class Expression:
    """Hold a symbolic metric: a function of operands that are metrics, or a terminal.

    Two expressions are equal where they are written alike. Scores are the higher, the more a
    weight matters.

    Attributes:
        name: A primitive of `yopo.symbolic.PRIMITIVES`, or a terminal: `W`, `G`, `X`, or one of
            those of FFN rows.
        operands: As many as the primitive takes; none for a terminal.

    Raises:
        InvalidArgumentError: If the name is unknown, takes another number of operands, these are
            no expressions, or the tree is deeper than 50 edges.

    Example:
        >>> metric = yopo.symbolic.Expression.parse("mul(abs(mul(W, W)), mms(G))")
        >>> metric.depth, metric.size, sorted(metric.terminals)
        (3, 7, ['G', 'W'])
    """

    name: str
    operands: tuple["Expression", ...] = ()

    def __post_init__(self) -> None:
        """Check the operands, and the name against their number."""
        operands: Any = self.operands
        is_several = isinstance(operands, list | tuple)
        if not is_several or not all(isinstance(each, Expression) for each in operands):
            raise InvalidArgumentError(
                f"`operands` must be a tuple of expressions, got {operands!r}. "
                "`Expression.parse` makes one of a text."
            )
        object.__setattr__(self, "operands", tuple(operands))
        told = fault_of(self.name, len(self.operands))
        if told is not None:
            raise InvalidArgumentError(f"{told}.")
        if self.depth > DEEPEST:
            raise InvalidArgumentError(f"an expression may be {DEEPEST} edges deep, not more.")

    @staticmethod
    def parse(text: str) -> "Expression":
        """Return the expression that a text spells, such as `mul(W, sqrt(X))`.

        Nothing is executed: names are looked up in a table.

        Args:
            text: The expression, as `str` writes it; white space does not matter.

        Raises:
            InvalidArgumentError: If it is no expression; the text points at the place.
        """
        if not isinstance(text, str):
            raise InvalidArgumentError(f"`text` must be a string, got {text!r}.")
        return _built(TextReader(text).tree())

    @staticmethod
    def from_json(document: str | Path | Mapping[str, Any]) -> "Expression":
        """Return an expression from the JSON of the reference implementation.

        Args:
            document: `{"data": name, "left": {…}, "right": {…}}`, as a mapping, a text or the
                `Path` of a file; functions of one operand have it at the left.

        Raises:
            InvalidArgumentError: If it is no such document; the text names the place in it.
        """
        if isinstance(document, str | Path):
            try:
                text = document.read_text("utf-8") if isinstance(document, Path) else document
                document = json.loads(text)
            except (OSError, ValueError, RecursionError) as error:
                place = f" in `{document}`" if isinstance(document, Path) else ""
                raise InvalidArgumentError(
                    f"the expression{place} cannot be read: {error}."
                ) from error
        return _built(tree_of_json(document))

    def to_json(self) -> dict[str, Any]:
        """Return the expression in the JSON of the reference implementation."""
        sides = zip(("left", "right"), self.operands, strict=False)
        return {"data": self.name, **{side: operand.to_json() for side, operand in sides}}

    def __str__(self) -> str:
        """Return the text that `parse` reads."""
        if not self.operands:
            return self.name
        return f"{self.name}({', '.join(map(str, self.operands))})"

    def formula(self) -> str:
        """Return the expression as mathematics writes it, for people to read.

        Example:
            >>> print(yopo.symbolic.Expression.parse("mul(W, sqrt(X))").formula())
            W · √|X|
        """
        return formula_of(self)[0]

    @cached_property
    def depth(self) -> int:
        """Return how many edges lie between the root and the deepest leaf."""
        return 1 + max(operand.depth for operand in self.operands) if self.operands else 0

    @cached_property
    def size(self) -> int:
        """Return how many nodes the tree has."""
        return 1 + sum(operand.size for operand in self.operands)

    @cached_property
    def terminals(self) -> frozenset[str]:
        """Return the names of the terminals that are used."""
        if not self.operands:
            return frozenset({self.name})
        return frozenset[str]().union(*(operand.terminals for operand in self.operands))

    def nodes(self) -> Iterator["Expression"]:
        """Yield every subtree, the root first, then those of each operand in turn."""
        yield self
        for operand in self.operands:
            yield from operand.nodes()

    def with_node(self, number: int, other: "Expression") -> "Expression":
        """Return the tree with another subtree in the place of one.

        Args:
            number: Which node, in the order of `nodes`, in [0, `size`).
            other: What takes its place.

        Raises:
            InvalidArgumentError: If there is no such node, or the tree becomes too deep.
        """
        if not 0 <= number < self.size:
            raise InvalidArgumentError(f"`number` must be in [0, {self.size}), got {number}.")
        if number == 0:
            return other
        operands, number = list(self.operands), number - 1
        place = 0
        while number >= operands[place].size:
            number, place = number - operands[place].size, place + 1
        operands[place] = operands[place].with_node(number, other)
        return Expression(self.name, tuple(operands))

    def evaluate(
        self, terminals: Mapping[str, Tensor], *, primitives: PrimitiveSet = "safe"
    ) -> Tensor:
        """Return the value of the expression, in float32.

        Args:
            terminals: A tensor for each name that is used; their shapes broadcast.
            primitives: "safe" for values that are finite wherever the terminals are; "compat" for
                those of the reference, overflow and NaN included.

        Returns:
            A tensor of the shape to which the terminals that are used broadcast. It may be one of
            the terminals itself, and is not to be changed.

        Raises:
            InvalidArgumentError: If a terminal is missing, or there are no such primitives.
        """
        if primitives not in ("safe", "compat"):
            raise InvalidArgumentError(
                f'`primitives` must be "safe" or "compat", got {primitives!r}.'
            )
        missing = sorted(self.terminals - terminals.keys())
        if missing:
            raise InvalidArgumentError(
                f"`{self}` needs `{missing[0]}`, and there is only {', '.join(sorted(terminals))}."
            )
        return self._value({name: terminals[name] for name in self.terminals}, primitives)

    def _value(self, terminals: Mapping[str, Tensor], primitives: PrimitiveSet) -> Tensor:
        if not self.operands:
            return terminals[self.name].float()
        function = PRIMITIVES[self.name].function(primitives)
        # No name holds on to an operand, so that each is freed as soon as it has been used.
        return function(*(operand._value(terminals, primitives) for operand in self.operands))


def _built(tree: Tree) -> Expression:
    name, operands = tree
    return Expression(name, tuple(map(_built, operands)))
