"""Trees of names, read off a text or JSON, and whatever is wrong with it told at its place."""

import re
from collections.abc import Mapping
from typing import Any

from yopo.errors import InvalidArgumentError
from yopo.symbolic.names import DEEPEST, fault_of

Tree = tuple[str, tuple["Tree", ...]]
"""A name and the trees of its operands."""

_TOKEN = re.compile(r"\s*([A-Za-z_]\w*|[(),]|\S)")


class TextReader:
    """Read a tree off a text, from left to right.

    Args:
        text: The text.
    """

    def __init__(self, text: str) -> None:
        """Take the text apart."""
        self._text = text
        self._tokens = [(match[1], match.start(1)) for match in _TOKEN.finditer(text)]
        self._next = 0

    def tree(self) -> Tree:
        """Return the tree.

        Raises:
            InvalidArgumentError: If the text is none; it points at the place.
        """
        found = self._node(0)
        if self._next < len(self._tokens):
            raise self._error("nothing may follow the expression", self._next)
        return found

    def _node(self, depth: int) -> Tree:
        place = self._next
        name = self._take()
        if name is None or not re.match(r"[A-Za-z_]", name):
            raise self._error("a function or a terminal is missing", place)
        if depth > DEEPEST:
            raise self._error(f"an expression may be {DEEPEST} edges deep, not more", place)
        operands: list[Tree] = []
        if self._peek() == "(":
            separator = self._take()
            while separator != ")":
                operands.append(self._node(depth + 1))
                separator = self._take()
                if separator not in (",", ")"):
                    raise self._error("a comma or a closing parenthesis is missing", self._next - 1)
        told = fault_of(name, len(operands))
        if told is not None:
            raise self._error(told, place)
        return name, tuple(operands)

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


def tree_of_json(node: Any, path: tuple[str, ...] = ()) -> Tree:
    """Return the tree that a node of the reference's JSON is the root of.

    Args:
        node: The node.
        path: How it is reached from the root.

    Raises:
        InvalidArgumentError: If it is no such node; the text names the place.
    """
    place = f" at `{'.'.join(path)}`" if path else " at the root"
    if not isinstance(node, Mapping) or not isinstance(node.get("data"), str):
        raise InvalidArgumentError(f'the expression has no `"data"` with a name{place}.')
    strange = sorted(set(node) - {"data", "left", "right"}, key=str)
    if strange:
        raise InvalidArgumentError(f"the expression has an unknown key {strange[0]!r}{place}.")
    if len(path) > DEEPEST:
        raise InvalidArgumentError(f"an expression may be {DEEPEST} edges deep, not more.")
    sides = [side for side in ("left", "right") if node.get(side) is not None]
    if sides == ["right"]:
        raise InvalidArgumentError(f'the expression has a `"right"` without a `"left"`{place}.')
    told = fault_of(node["data"], len(sides))
    if told is not None:
        raise InvalidArgumentError(f"{told}{place}.")
    return node["data"], tuple(tree_of_json(node[side], (*path, side)) for side in sides)
