"""Expressions at random, and out of others."""

import random
from collections import Counter
from itertools import islice

import pytest

from yopo.symbolic.expression import Expression
from yopo.symbolic.growing import (
    FUNCTIONS,
    crossover,
    mutate,
    ramped_expressions,
    random_expression,
)
from yopo.symbolic.names import TERMINALS
from yopo.symbolic.primitives import PRIMITIVES

WGX = ("W", "G", "X")
FIRST = Expression.parse("mul(abs(mul(W, W)), mms(G))")
SECOND = Expression.parse("add(sqrt(X), tanh(div(G, W)))")


def shallowest(expression):
    return 1 + min(map(shallowest, expression.operands)) if expression.operands else 0


def test_a_thousand_random_expressions_are_two_to_four_edges_deep_and_can_be_written_and_read():
    expressions = list(islice(ramped_expressions(random.Random(0), terminals=WGX), 1000))
    assert {expression.depth for expression in expressions} == {2, 3, 4}
    assert min(map(shallowest, expressions)) == 2
    for expression in expressions:
        assert Expression.parse(str(expression)) == expression
        assert Expression.from_json(expression.to_json()) == expression


def test_half_of_a_generation_is_full_and_every_depth_has_its_share():
    expressions = list(islice(ramped_expressions(random.Random(0), terminals=WGX), 600))
    for place, expression in enumerate(expressions):
        deepest = 2 + place // 2 % 3
        assert expression.depth <= deepest
        if place % 2:
            assert shallowest(expression) == expression.depth == deepest
    grown = expressions[::2]
    assert any(shallowest(expression) < expression.depth for expression in grown)


def test_functions_and_terminals_are_drawn_alike_and_pow_is_not_drawn():
    rng = random.Random(0)
    drawn = [random_expression(rng, terminals=TERMINALS, full=True) for _ in range(3000)]
    roots = Counter(expression.name for expression in drawn)
    leaves = Counter(
        node.name for expression in drawn for node in expression.nodes() if not node.operands
    )
    assert roots.keys() == set(FUNCTIONS) == PRIMITIVES.keys() - {"pow"}
    assert leaves.keys() == set(TERMINALS)
    for counts in (roots, leaves):
        mean = counts.total() / len(counts)
        assert all(0.75 * mean < count < 1.25 * mean for count in counts.values())


def test_a_seed_makes_the_same_expressions():
    def made(seed):
        return list(islice(ramped_expressions(random.Random(seed), terminals=WGX), 50))

    assert made(3) == made(3) != made(4)


def test_every_node_can_be_replaced_in_crossover_and_every_subtree_can_replace_it():
    rng = random.Random(0)
    children = {crossover(FIRST, SECOND, rng=rng, max_depth=50) for _ in range(3000)}
    expected = {
        FIRST.with_node(number, part) for number in range(FIRST.size) for part in SECOND.nodes()
    }
    assert children == expected


def test_children_are_no_deeper_than_allowed_and_their_parents_stay_as_they_were():
    rng = random.Random(0)
    written = str(FIRST), str(SECOND)
    for _ in range(500):
        assert crossover(FIRST, SECOND, rng=rng, max_depth=3).depth <= 3
        assert mutate(FIRST, rng=rng, terminals=WGX, max_depth=3).depth <= 3
    assert (str(FIRST), str(SECOND)) == written


def test_where_every_child_is_too_deep_the_first_parent_is_the_child():
    rng = random.Random(0)
    assert crossover(FIRST, Expression.parse("abs(sqr(neg(W)))"), rng=rng, max_depth=-1) == FIRST
    assert mutate(FIRST, rng=rng, terminals=WGX, max_depth=-1) == FIRST
    deepest = Expression.parse("abs(" * 50 + "W" + ")" * 50)
    assert crossover(deepest, deepest, rng=rng, max_depth=50).depth <= 50


def test_every_node_can_mutate():
    rng = random.Random(0)
    changed = set()
    for _ in range(500):
        mutant = mutate(FIRST, rng=rng, terminals=WGX, max_depth=5)
        for number in range(FIRST.size):
            if any(FIRST.with_node(number, other) == mutant for other in mutant.nodes()):
                changed.add(number)
    assert changed == set(range(FIRST.size))


def test_a_function_that_takes_two_operands_gets_a_right_one_and_one_that_takes_one_loses_it():
    rng = random.Random(0)
    unary, binary = Expression.parse("sqrt(W)"), Expression.parse("sub(W, G)")
    mutants = {mutate(unary, rng=rng, terminals=WGX, max_depth=3) for _ in range(400)}
    wider = [m for m in mutants if len(m.operands) == 2 and m.operands[0].name == "W"]
    assert {m.name for m in wider} == {"add", "sub", "mul", "div"}
    assert any(m.operands[1].operands for m in wider)
    mutants = {mutate(binary, rng=rng, terminals=WGX, max_depth=3) for _ in range(400)}
    assert {Expression.parse("tanh(W)"), Expression.parse("add(W, G)")} <= mutants
    assert {Expression.parse("sub(X, G)"), Expression.parse("sub(W, X)")} <= mutants


def test_a_terminal_that_is_the_only_one_gives_way_to_a_subtree():
    rng = random.Random(0)
    mutants = {mutate(Expression("W"), rng=rng, terminals=("W",), max_depth=2) for _ in range(50)}
    assert max(mutant.depth for mutant in mutants) == 2
    assert all(mutant.terminals == {"W"} for mutant in mutants)


@pytest.mark.parametrize("change", ["crossover", "mutate"])
def test_variation_uses_no_other_randomness(change):
    def made():
        rng = random.Random(5)
        if change == "mutate":
            return [mutate(FIRST, rng=rng, terminals=WGX) for _ in range(20)]
        return [crossover(FIRST, SECOND, rng=rng) for _ in range(20)]

    state = random.getstate()
    assert made() == made()
    assert random.getstate() == state
