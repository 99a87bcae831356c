"""Symbolic pruning metrics: immutable trees of primitives over weights, gradients, activations."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from yopo.errors import InvalidArgumentError
from yopo.symbolic.primitives import PRIMITIVES, PrimitiveSet

WEIGHT_TERMINALS = ("W", "G", "X")
"""Of a matrix: its absolute weights and gradient magnitudes `(out, in)`, and the squared norms of
its inputs `(1, in)`."""

ROW_TERMINALS = (
    "gate",
    "up",
    "down",
    "gate_norm",
    "up_norm",
    "down_norm",
    "leverage",
)
"""Of an FFN, from weights alone: absolute entries `(F, D)` of its matrices, the norms of their rows
and the leverage scores of the first, each `(F, 1)`."""

TERMINALS = (*WEIGHT_TERMINALS, *ROW_TERMINALS)

DEEPEST = 50
"""Edges from the root to the deepest leaf that an expression may have."""

_TOKEN = re.compile(r"\s*([A-Za-z_]\w*|[(),]|\S)")


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
        InvalidArgumentError: If the name is unknown, takes another number of operands, or the tree
            is deeper than 50 edges.

    Example:
        >>> metric = yopo.symbolic.Expression.parse("mul(abs(mul(W, W)), mms(G))")
        >>> metric.depth, metric.size, sorted(metric.terminals)
        (3, 7, ['G', 'W'])
    """

    name: str
    operands: tuple["Expression", ...] = ()

    def __post_init__(self) -> None:
        """Check the name against the number of operands."""
        told = _fault(self.name, len(self.operands))
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
        return _Parser(text).expression()

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
                raise InvalidArgumentError(f"the expression cannot be read: {error}.") from error
        return _from_node(document, ())

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
        return _formula(self)[0]

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


def _fault(name: str, operands: int) -> str | None:
    """Return what is wrong with a node, None where nothing is."""
    if name in PRIMITIVES:
        arity = PRIMITIVES[name].arity
        if arity == operands:
            return None
        return f"`{name}` takes {arity} operand{'s' if arity > 1 else ''}, got {operands}"
    if name not in TERMINALS:
        return (
            f"unknown name `{name}`: functions are {', '.join(PRIMITIVES)}, and terminals "
            f"{', '.join(TERMINALS)}"
        )
    return f"`{name}` is no function, and takes no operands" if operands else None


class _Parser:
    """Read one text from left to right."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = [(match[1], match.start(1)) for match in _TOKEN.finditer(text)]
        self._next = 0

    def expression(self) -> Expression:
        found = self._node(0)
        if self._next < len(self._tokens):
            raise self._error("nothing may follow the expression", self._next)
        return found

    def _node(self, depth: int) -> Expression:
        place = self._next
        name = self._take()
        if name is None or not re.match(r"[A-Za-z_]", name):
            raise self._error("a function or a terminal is missing", place)
        if depth > DEEPEST:
            raise self._error(f"an expression may be {DEEPEST} edges deep, not more", place)
        operands = []
        if self._peek() == "(":
            separator = self._take()
            while separator != ")":
                operands.append(self._node(depth + 1))
                separator = self._take()
                if separator not in (",", ")"):
                    raise self._error("a comma or a closing parenthesis is missing", self._next - 1)
        told = _fault(name, len(operands))
        if told is not None:
            raise self._error(told, place)
        return Expression(name, tuple(operands))

    def _peek(self) -> str | None:
        return self._tokens[self._next][0] if self._next < len(self._tokens) else None

    def _take(self) -> str | None:
        token = self._peek()
        self._next += 1
        return token

    def _error(self, told: str, token: int) -> InvalidArgumentError:
        place = self._tokens[token][1] if token < len(self._tokens) else len(self._text)
        start = max(0, place - 40)
        line = self._text[start : place + 40].replace("\n", " ")
        return InvalidArgumentError(
            f"{told}, at character {place + 1} of the expression:\n    {line}\n"
            f"    {' ' * (place - start)}^"
        )


def _from_node(node: Any, path: tuple[str, ...]) -> Expression:
    place = f" at `{'.'.join(path)}`" if path else " at the root"
    if not isinstance(node, Mapping) or not isinstance(node.get("data"), str):
        raise InvalidArgumentError(f'the expression has no `"data"` with a name{place}.')
    strange = sorted(set(node) - {"data", "left", "right"})
    if strange:
        raise InvalidArgumentError(f"the expression has an unknown key {strange[0]!r}{place}.")
    if len(path) > DEEPEST:
        raise InvalidArgumentError(f"an expression may be {DEEPEST} edges deep, not more.")
    sides = [side for side in ("left", "right") if node.get(side) is not None]
    if sides == ["right"]:
        raise InvalidArgumentError(f'the expression has a `"right"` without a `"left"`{place}.')
    told = _fault(node["data"], len(sides))
    if told is not None:
        raise InvalidArgumentError(f"{told}{place}.")
    return Expression(node["data"], tuple(_from_node(node[side], (*path, side)) for side in sides))


_SUM, _PRODUCT, _POWER, _ATOM = range(4)

_INFIX = {
    "add": ("{} + {}", _SUM, (_SUM, _SUM)),
    "sub": ("{} − {}", _SUM, (_SUM, _PRODUCT)),
    "mul": ("{} · {}", _PRODUCT, (_PRODUCT, _PRODUCT)),
    "div": ("{} / ‖{}‖", _PRODUCT, (_PRODUCT, _SUM)),
    "sqr": ("{}²", _POWER, (_ATOM,)),
    "pow": ("{}²", _POWER, (_ATOM,)),
    "neg": ("−{}", _SUM, (_PRODUCT,)),
    "abs": ("|{}|", _ATOM, (_SUM,)),
    "log": ("ln(|{}| + 0.001)", _ATOM, (_SUM,)),
    "sqrt": ("√|{}|", _ATOM, (_SUM,)),
    "mms": ("minmax({})", _ATOM, (_SUM,)),
    "zsn": ("zscore({})", _ATOM, (_SUM,)),
}
"""How each function is written, how tightly that binds, and how tightly its operands must."""


def _formula(node: Expression) -> tuple[str, int]:
    """Return a formula, and how tightly it binds."""
    if not node.operands:
        return node.name, _ATOM
    if node.name == "skp":
        return _formula(node.operands[0])
    pattern, tightness, needed = _INFIX.get(node.name, (f"{node.name}({{}})", _ATOM, (_SUM,)))
    written = [
        text if binds >= least else f"({text})"
        for (text, binds), least in zip(map(_formula, node.operands), needed, strict=True)
    ]
    return pattern.format(*written), tightness
