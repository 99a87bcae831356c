"""The names that an expression is made of, and how many operands go with each."""

from yopo.symbolic.primitives import PRIMITIVES

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


def fault_of(name: str, operands: int) -> str | None:
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
