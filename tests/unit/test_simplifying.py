"""Simpler expressions of the same value, or of the same order within rows."""

import random
from itertools import islice

import pytest
import torch

from yopo.symbolic.expression import Expression
from yopo.symbolic.growing import ramped_expressions
from yopo.symbolic.names import TERMINALS
from yopo.symbolic.simplifying import is_non_negative, simplify

EXACT = [
    ("skp(W)", "W"),
    ("neg(neg(W))", "W"),
    ("abs(neg(log(W)))", "abs(log(W))"),
    ("abs(abs(log(W)))", "abs(log(W))"),
    ("abs(W)", "W"),
    ("abs(add(mul(W, G), tanh(sqrt(log(X)))))", "add(mul(G, W), tanh(sqrt(log(X))))"),
    ("sqr(neg(log(W)))", "sqr(log(W))"),
    ("pow(abs(log(W)))", "sqr(log(W))"),
    ("sqrt(neg(log(W)))", "sqrt(log(W))"),
    ("log(abs(log(W)))", "log(log(W))"),
    ("log(neg(W))", "log(W)"),
    ("sqrt(sqr(log(W)))", "abs(log(W))"),
    ("sqrt(pow(W))", "W"),
    ("sqr(sqrt(log(W)))", "abs(log(W))"),
    ("sqr(sqrt(W))", "W"),
    ("pow(W)", "sqr(W)"),
    ("mul(log(W), log(W))", "sqr(log(W))"),
    ("add(W, neg(G))", "sub(W, G)"),
    ("add(neg(G), W)", "sub(W, G)"),
    ("sub(W, neg(G))", "add(G, W)"),
    ("add(neg(W), neg(G))", "sub(neg(G), W)"),
    ("sub(add(W, G), G)", "W"),
    ("sub(add(G, W), G)", "W"),
    ("sub(add(sub(W, X), log(G)), log(G))", "sub(W, X)"),
    ("add(sub(W, G), G)", "W"),
    ("add(G, sub(W, G))", "W"),
    ("add(sub(W, sub(G, X)), sub(G, X))", "W"),
    ("sub(W, sub(W, G))", "G"),
    ("sub(W, add(W, G))", "neg(G)"),
    ("sub(W, add(G, W))", "neg(G)"),
    ("sub(sub(W, G), W)", "neg(G)"),
    ("mms(mms(log(W)))", "mms(log(W))"),
    ("mms(zsn(W))", "mms(W)"),
    ("zsn(zsn(W))", "zsn(W)"),
    ("zsn(mms(W))", "zsn(W)"),
    ("mul(W, G)", "mul(G, W)"),
    ("add(mul(W, G), G)", "add(G, mul(G, W))"),
    ("neg(skp(neg(skp(abs(abs(W))))))", "W"),
    ("mms(zsn(sub(add(X, W), W)))", "mms(X)"),
]

KEPT = [
    "mul(mms(G), sqr(W))",
    "div(mul(G, W), W)",
    "div(W, W)",
    "abs(zsn(W))",
    "sqr(log(W))",
    "sub(sub(G, W), X)",
    "zsn(sub(add(G, X), G))",
    "div(W, sub(add(G, X), G))",
    "div(sub(add(G, X), G), W)",
]


def tensors(seed=0, rows=5, columns=7):
    """Return terminals that are at least 0, and not close to it."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "X": (1, columns),
        **dict.fromkeys(("gate_norm", "up_norm", "down_norm", "leverage"), (rows, 1)),
    }
    return {
        name: 0.2 + 1.3 * torch.rand(shapes.get(name, (rows, columns)), generator=generator)
        for name in TERMINALS
    }


def assert_same_value(expression, other, **tolerances):
    terminals = {name: value.double() for name, value in tensors().items()}
    # Rounding is no matter of the rules, so it is kept small: everything in float64.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        values = [
            each.evaluate(terminals, primitives="safe").expand(5, 7) for each in (expression, other)
        ]
    tolerances = tolerances or {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(*values, **tolerances)


@pytest.mark.parametrize(("text", "simpler"), EXACT)
def test_a_rule_makes_an_expression_simpler_and_leaves_its_value(text, simpler):
    expression = Expression.parse(text)
    for approximate in (False, True):
        found = simplify(expression, approximate=approximate)
        assert str(found) == simpler
    assert_same_value(expression, found)


@pytest.mark.parametrize("text", KEPT)
def test_what_no_rule_fits_stays(text):
    assert str(simplify(Expression.parse(text))) == text


@pytest.mark.parametrize(
    ("text", "simpler"),
    [("exp(log(log(W)))", "abs(log(W))"), ("exp(log(W))", "W"), ("log(exp(neg(W)))", "neg(W)")],
)
def test_exp_and_log_are_opposites_but_for_their_guards_and_only_where_asked_for(text, simpler):
    expression = Expression.parse(text)
    assert str(simplify(expression)) == simpler
    assert simplify(expression, approximate=False) == expression
    assert_same_value(expression, Expression.parse(simpler), rtol=0.01, atol=0.01)
    with pytest.raises(AssertionError):
        assert_same_value(expression, Expression.parse(simpler))


@pytest.mark.parametrize(
    "text",
    ["sub(W, W)", "mul(W, exp(sub(skp(G), G)))", "add(W, neg(W))", "sub(add(W, G), add(G, W))"],
)
def test_an_expression_with_a_constant_part_is_rejected(text):
    assert simplify(Expression.parse(text)) is None


def test_a_cancelled_operand_stays_where_its_shape_is_counted():
    """The standard deviation of one row is another than that of many like it."""
    inner, outer = "sub(add(W, X), W)", "zsn(sub(add(W, X), W))"
    assert str(simplify(Expression.parse(inner))) == "X"
    assert str(simplify(Expression.parse(outer))) == outer
    with pytest.raises(AssertionError):
        assert_same_value(Expression.parse(outer), Expression.parse("zsn(X)"))
    assert str(simplify(Expression.parse("zsn(sub(add(W, G), G))"))) == "zsn(W)"
    rows = "div(gate, sub(add(gate, up_norm), gate))"
    assert str(simplify(Expression.parse(rows))) == rows


@pytest.mark.parametrize("seed", range(4))
def test_random_expressions_keep_their_value_and_simplifying_twice_changes_nothing(seed):
    terminals = ("W", "G", "X") if seed % 2 else ("gate", "up_norm", "leverage")
    drawn = ramped_expressions(random.Random(seed), terminals=terminals, max_depth=5)
    shorter = rejected = 0
    for expression in islice(drawn, 150):
        found = simplify(expression, approximate=False)
        if found is None:
            rejected += 1
            continue
        assert found.size <= expression.size
        assert simplify(found, approximate=False) == found
        shorter += found.size < expression.size
        value = expression.evaluate(tensors())
        if value.abs().max() < 1e6:  # beyond that clamps and rounding take part
            assert_same_value(expression, found, rtol=1e-5, atol=1e-5)
    assert shorter > 30
    assert rejected < 20


@pytest.mark.parametrize("seed", range(4))
def test_what_is_known_to_be_at_least_zero_is(seed):
    drawn = ramped_expressions(random.Random(seed), terminals=("W", "G", "X"), min_depth=0)
    known = 0
    for expression in islice(drawn, 200):
        if is_non_negative(expression):
            known += 1
            assert expression.evaluate(tensors(seed)).min() >= 0, expression
    assert known > 50
