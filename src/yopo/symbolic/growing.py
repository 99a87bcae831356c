"""Expressions at random, out of nothing and out of others: growth, crossover, mutation.

Pruner-Zero publishes trees of three to five levels, which are two to four edges deep, one crossover
and one mutation. How they are done is not published: trees grow as in the code that is released,
crossover is the swap of a subtree of the tiny_gp that it derives from, and half of the mutations
change a node, as in the paper's drawing, half a subtree, as in tiny_gp.
"""

import random
from collections.abc import Iterator, Sequence

from yopo.errors import InvalidArgumentError
from yopo.symbolic.expression import Expression
from yopo.symbolic.primitives import PRIMITIVES

MIN_DEPTH, MAX_DEPTH = 2, 4
"""Edges from the root to the deepest leaf of an expression at random."""

FUNCTIONS = tuple(name for name in PRIMITIVES if name != "pow")
"""What is drawn: `pow` is `sqr` by another name, and would make squares twice as likely."""

_GROWN = 2
"""Edges that a subtree may have which is grown to take a place in another."""

_TRIES = 10
"""After so many results that are too deep, the parent is returned as it is."""


def random_expression(
    rng: random.Random,
    *,
    terminals: Sequence[str],
    max_depth: int = MAX_DEPTH,
    min_depth: int = MIN_DEPTH,
    full: bool = False,
) -> Expression:
    """Return a random expression; functions and terminals are each drawn uniformly.

    Args:
        rng: Where randomness comes from.
        terminals: Those to draw from.
        max_depth: Edges of its deepest branch, at most.
        min_depth: Edges of every branch, at least.
        full: Whether every branch has the most edges. Otherwise one that has the fewest ends with a
            probability of a half at each further node.

    Example:
        >>> import random
        >>> rng = random.Random(0)
        >>> tree = yopo.symbolic.random_expression(rng, terminals=("W", "G"), max_depth=3)
    """
    may_end = min_depth <= 0 and not full
    if max_depth <= 0 or (may_end and rng.random() < 0.5):
        return Expression(rng.choice(terminals))
    name = rng.choice(FUNCTIONS)
    return Expression(
        name,
        tuple(
            random_expression(
                rng,
                terminals=terminals,
                max_depth=max_depth - 1,
                min_depth=min_depth - 1,
                full=full,
            )
            for _ in range(PRIMITIVES[name].arity)
        ),
    )


def ramped_expressions(
    rng: random.Random,
    *,
    terminals: Sequence[str],
    max_depth: int = MAX_DEPTH,
    min_depth: int = MIN_DEPTH,
) -> Iterator[Expression]:
    """Yield random expressions without end, by Koza's "ramped half-and-half".

    The depth allowed goes through all from the least to the most, and at each one expression is
    full and one is not.

    Args:
        rng: Where randomness comes from.
        terminals: As for `random_expression`.
        max_depth: As for `random_expression`.
        min_depth: As for `random_expression`.
    """
    while True:
        for depth in range(min_depth, max_depth + 1):
            for full in (False, True):
                yield random_expression(
                    rng, terminals=terminals, max_depth=depth, min_depth=min_depth, full=full
                )


def crossover(
    first: Expression, second: Expression, *, rng: random.Random, max_depth: int = MAX_DEPTH
) -> Expression:
    """Return the first parent with a random subtree of the second in the place of one of its own.

    Any node of either may be drawn, the root and the last leaf included. Where ten draws are too
    deep, the first parent is returned.

    Args:
        first: What the child is like.
        second: What a part of it comes from.
        rng: Where randomness comes from.
        max_depth: Edges of the child's deepest branch, at most.
    """
    parts = list(second.nodes())
    for _ in range(_TRIES):
        child = _replaced(first, rng.randrange(first.size), rng.choice(parts), max_depth)
        if child is not None:
            return child
    return first


def mutate(
    expression: Expression,
    *,
    rng: random.Random,
    terminals: Sequence[str],
    max_depth: int = MAX_DEPTH,
) -> Expression:
    """Return an expression that differs at one random node, or from there on.

    Half of the time the node changes: a terminal into another, a function into another. A function
    that comes to take two operands gets a random right one, one that comes to take one loses its
    right one. Half of the time a random subtree takes the place of the node. Where ten draws are
    too deep, the expression is returned as it is.

    Args:
        expression: What to change.
        rng: Where randomness comes from.
        terminals: Those to draw from.
        max_depth: Edges of the result's deepest branch, at most.
    """
    nodes = list(expression.nodes())
    for _ in range(_TRIES):
        number = rng.randrange(len(nodes))
        if rng.random() < 0.5:
            other = _changed(nodes[number], rng, terminals)
        else:
            other = _grown(rng, terminals)
        mutant = _replaced(expression, number, other, max_depth)
        if mutant is not None:
            return mutant
    return expression


def _changed(node: Expression, rng: random.Random, terminals: Sequence[str]) -> Expression:
    """Return a node of the same kind by another name; one terminal alone gives way to a subtree."""
    names = FUNCTIONS if node.operands else terminals
    others = [name for name in names if name != node.name]
    if not others:
        return _grown(rng, terminals)
    name = rng.choice(others)
    if not node.operands:
        return Expression(name)
    operands = node.operands[: PRIMITIVES[name].arity]
    if len(operands) < PRIMITIVES[name].arity:
        operands = (*operands, _grown(rng, terminals))
    return Expression(name, operands)


def _grown(rng: random.Random, terminals: Sequence[str]) -> Expression:
    return random_expression(rng, terminals=terminals, max_depth=_GROWN, min_depth=0)


def _replaced(
    expression: Expression, number: int, other: Expression, max_depth: int
) -> Expression | None:
    """Return the expression with another subtree at a node, None where that is too deep."""
    try:
        child = expression.with_node(number, other)
    except InvalidArgumentError:  # deeper than any expression may be
        return None
    return child if child.depth <= max_depth else None
