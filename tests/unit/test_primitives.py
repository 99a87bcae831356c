"""The fifteen functions: what the reference computes, and the same where nothing can go wrong."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from yopo.symbolic import PRIMITIVES, Expression
from yopo.symbolic.primitives import LARGEST

GOLDEN = Path(__file__).parents[1] / "golden"
TENSORS = load_file(GOLDEN / "pruner_zero.safetensors")
TERMINALS = {name: TENSORS[name] for name in ("W", "G", "X")}
CASES = json.loads((GOLDEN / "pruner_zero.json").read_text())["trees"]
FINITE = [case for case in CASES if case["finite"]]


def test_there_are_golden_figures_for_250_expressions():
    assert (len(CASES), len(FINITE)) == (250, 248)


def in_float64(tree):
    """Return what a tree of the reference comes to in twice the precision."""
    operands = [in_float64(tree[side]) for side in ("left", "right") if side in tree]
    if not operands:
        return TERMINALS[tree["data"]].double()
    return PRIMITIVES[tree["data"]].compat(*operands)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_compat_values_are_those_of_the_reference(case):
    """To 1e-6, and where a formula makes more of roundings, to twice what it makes of them there.

    Processors differ in the last bit of an exponential or a root.
    """
    value = Expression.from_json(case["tree"]).evaluate(TERMINALS, primitives="compat")
    expected = TENSORS[f"{case['name']}.score"]
    assert list(value.shape) == case["shape"]
    assert bool(value.isfinite().all()) == case["finite"]
    rounded = (in_float64(case["tree"]) - expected).abs()
    atol = 2 * float(rounded[rounded.isfinite()].max()) if case["finite"] else 0.0
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=atol, equal_nan=True)


def test_safe_values_are_the_same_wherever_the_reference_is_finite():
    for case in FINITE:
        expression = Expression.from_json(case["tree"])
        safe, compat = (
            expression.evaluate(TERMINALS, primitives=kind) for kind in ("safe", "compat")
        )
        torch.testing.assert_close(safe, compat.clamp(-LARGEST, LARGEST), rtol=1e-4, atol=1e-6)


extremes = st.sampled_from([0.0, 1e-45, 1e-38, 1e-3, 1.0, 88.8, 1e4, 1e20, LARGEST])
numbers = st.builds(lambda size, sign: size * sign, extremes, st.sampled_from([1.0, -1.0]))


@given(st.lists(numbers, min_size=12, max_size=12))
def test_safe_values_are_finite_for_any_finite_numbers(values):
    a, b = torch.tensor(values[:6]).view(2, 3), torch.tensor(values[6:9]).view(1, 3)
    for name, primitive in PRIMITIVES.items():
        for operands in (a, b), (b, a), (a[:1, :1], b[:, :1]):
            value = primitive.safe(*operands[: primitive.arity])
            assert value.isfinite().all(), (name, operands)
            assert value.abs().max() <= LARGEST


def test_constant_operands_are_no_reason_to_divide_by_zero():
    constant = torch.full((3, 4), 2.0)
    for name in ("mms", "zsn"):
        assert PRIMITIVES[name].safe(constant).eq(0).all()
        assert PRIMITIVES[name].compat(constant).isnan().all()
    assert PRIMITIVES["zsn"].safe(torch.ones(1, 1)).eq(0).all()
    assert PRIMITIVES["div"].safe(constant, torch.zeros(3, 4)).isfinite().all()


def test_a_range_wider_than_float32_is_no_reason_to_overflow():
    a = torch.finfo().max * torch.tensor([[-1.0, 0.0, 0.5, 1.0]])
    assert PRIMITIVES["mms"].safe(a).tolist() == [[0.0, 0.5, 0.75, 1.0]]
    tiny = torch.tensor([[0.0, 1e-45]])
    assert PRIMITIVES["mms"].safe(tiny).tolist() == [[0.0, 1.0]]


def test_a_norm_counts_a_row_as_often_as_it_is_spread():
    weight, row = torch.rand(5, 4), torch.rand(1, 4)
    expected = weight / torch.linalg.vector_norm(row.repeat(5, 1))
    for function in (PRIMITIVES["div"].safe, PRIMITIVES["div"].compat):
        torch.testing.assert_close(function(weight, row), expected)


def test_operands_are_left_as_they_were():
    a, b = torch.rand(3, 4), torch.rand(3, 4)
    before = a.clone(), b.clone()
    for primitive in PRIMITIVES.values():
        for function in (primitive.safe, primitive.compat):
            function(*(a, b)[: primitive.arity])
    assert torch.equal(a, before[0])
    assert torch.equal(b, before[1])
