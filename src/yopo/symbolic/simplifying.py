"""Simpler expressions of the same value.

Pruner-Zero simplifies what mutation has made by its "opposing operation simplification", to remove
redundancy and make a population diverse. Of its rules only examples are published, such as exp and
log, sqrt and sqr. Those here are exact in real numbers, but for exp and log, whose guards make them
no exact opposites; in float32 they are exact up to rounding, and far from overflow.

All terminals are at least 0, so much is known of signs.
"""

from yopo.symbolic.expression import Expression

_EVERYWHERE = frozenset({"rows", "columns"})
_AXES = {
    "X": frozenset({"columns"}),
    **dict.fromkeys(("gate_norm", "up_norm", "down_norm", "leverage"), frozenset({"rows"})),
}
"""Along which axes a terminal differs, where it is not both."""


def simplify(expression: Expression, *, approximate: bool = True) -> Expression | None:
    """Return the shortest expression of the same value that the rules lead to, in canonical form.

    Rules are applied from the leaves to the root until none fits. Operands of sums and products
    come in the order of their texts. `div` divides by a norm, so it never cancels a product; and a
    sum below `zsn` or `div`, which count elements, keeps an operand that gives it its shape.

    Args:
        expression: What to simplify.
        approximate: Whether `exp(log(a))` becomes `abs(a)` and `log(exp(a))` becomes `a`, which
            differ by the guards of both: 0.001 is added before a logarithm, and exponents are
            clamped.

    Returns:
        None for an expression with a part that is constant, such as `sub(W, W)`: such a part
        contributes nothing that could rank weights.

    Example:
        >>> text = "mul(sqrt(sqr(neg(W))), skp(exp(log(G))))"
        >>> str(yopo.symbolic.simplify(yopo.symbolic.Expression.parse(text)))
        'mul(G, W)'
    """
    previous, found = None, expression
    # What is no longer below `zsn` or `div` may be simpler still, hence more than once.
    while found != previous:
        simpler = _simplified(found, approximate, counted=False)
        if simpler is None:
            return None
        previous, found = found, simpler
    return found


def is_non_negative(expression: Expression) -> bool:
    """Tell whether the value is known to be at least 0, whatever the terminals are.

    Args:
        expression: Any expression.
    """
    match expression:
        case Expression("sqr" | "pow" | "abs" | "sqrt" | "exp" | "mms"):
            return True
        case Expression("tanh" | "skp" | "div", (a, *_)):
            return is_non_negative(a)
        case Expression("add" | "mul", (a, b)):
            return is_non_negative(a) and is_non_negative(b)
    return not expression.operands


def _simplified(node: Expression, approximate: bool, *, counted: bool) -> Expression | None:
    """Return a simpler node, None where a part of it is constant.

    `counted` tells whether it is below a function that depends on how many elements there are.
    """
    operands: list[Expression] = []
    for operand in node.operands:
        below = counted or node.name in ("zsn", "div")
        simpler = _simplified(operand, approximate, counted=below)
        if simpler is None:
            return None
        operands.append(simpler)
    found: Expression | None = Expression(node.name, tuple(operands))
    while found is not None:
        node = found
        match node:
            case Expression("sub", (a, b)) if a == b:
                return None
        found = _one_operand(node) or _two_operands(node)
        if found is None and approximate:
            found = _approximate(node)
        if found is None:
            cancelled = _cancelled(node)
            if cancelled is not None and not (counted and _axes(cancelled) != _axes(node)):
                found = cancelled
    return node


def _one_operand(node: Expression) -> Expression | None:
    """Return what a rule for functions of one operand makes of a node, None where none fits."""
    match node:
        case Expression("skp", (a,)) | Expression("neg", (Expression("neg", (a,)),)):
            return a
        case Expression("abs", (a,)) if is_non_negative(a):
            return a
        case Expression("pow", (a,)):
            return Expression("sqr", (a,))
        case Expression(
            "abs" | "sqr" | "sqrt" | "log", (Expression("neg" | "abs", (a,)),)
        ) | Expression("mms" | "zsn", (Expression("mms" | "zsn", (a,)),)):
            return Expression(node.name, (a,))
        case Expression("sqrt", (Expression("sqr", (a,)),)) | Expression(
            "sqr", (Expression("sqrt", (a,)),)
        ):
            return Expression("abs", (a,))
    return None


def _two_operands(node: Expression) -> Expression | None:
    """Return what a rule for functions of two operands makes of a node, None where none fits."""
    match node:
        case Expression("add" | "mul", (a, b)) if str(b) < str(a):
            return Expression(node.name, (b, a))
        case Expression("add", (a, Expression("neg", (b,)))) | Expression(
            "add", (Expression("neg", (b,)), a)
        ):
            return Expression("sub", (a, b))
        case Expression("sub", (a, Expression("neg", (b,)))):
            return Expression("add", (a, b))
        case Expression("mul", (a, b)) if a == b:
            return Expression("sqr", (a,))
    return None


def _approximate(node: Expression) -> Expression | None:
    """Return what remains of a function and its opposite whose guards differ."""
    match node:
        case Expression("exp", (Expression("log", (a,)),)):
            return Expression("abs", (a,))
        case Expression("log", (Expression("exp", (a,)),)):
            return a
    return None


def _cancelled(node: Expression) -> Expression | None:
    """Return what remains of a sum and a difference that undo each other."""
    remains = None
    # No case has alternatives: a guard would see but the first of them that matches.
    match node:
        case Expression("sub", (Expression("add", both), b)) if b in both:
            remains = both[1 - both.index(b)]
        case Expression("add", (Expression("sub", (a, b)), c)) if b == c:
            remains = a
        case Expression("add", (c, Expression("sub", (a, b)))) if b == c:
            remains = a
        case Expression("sub", (a, Expression("sub", (b, c)))) if a == b:
            remains = c
        case Expression("sub", (a, Expression("add", both))) if a in both:
            remains = Expression("neg", (both[1 - both.index(a)],))
        case Expression("sub", (Expression("sub", (a, b)), c)) if a == c:
            remains = Expression("neg", (b,))
    return remains


def _axes(expression: Expression) -> frozenset[str]:
    """Return along which axes a value may differ, which is what its shape depends on."""
    return frozenset().union(*(_AXES.get(name, _EVERYWHERE) for name in expression.terminals))
