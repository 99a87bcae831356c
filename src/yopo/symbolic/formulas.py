"""Expressions as mathematics writes them."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the expression itself calls this function
    from yopo.symbolic.expression import Expression

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


def formula_of(node: "Expression") -> tuple[str, int]:
    """Return a formula, and how tightly it binds."""
    if not node.operands:
        return node.name, _ATOM
    if node.name == "skp":
        return formula_of(node.operands[0])
    pattern, tightness, needed = _INFIX.get(node.name, (f"{node.name}({{}})", _ATOM, (_SUM,)))
    written = [
        text if binds >= least else f"({text})"
        for (text, binds), least in zip(map(formula_of, node.operands), needed, strict=True)
    ]
    return pattern.format(*written), tightness
