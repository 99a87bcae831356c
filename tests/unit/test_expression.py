"""Symbolic metrics: trees, texts, JSON, values."""

import json

import pytest
import torch

from yopo import InvalidArgumentError, YopoError
from yopo.symbolic import Expression
from yopo.symbolic.names import DEEPEST

PUBLISHED = "mul(abs(mul(W, W)), mms(G))"
TREE = {
    "data": "mul",
    "left": {
        "data": "abs",
        "left": {"data": "mul", "left": {"data": "W"}, "right": {"data": "W"}},
    },
    "right": {"data": "mms", "left": {"data": "G"}},
}


def test_the_published_metric_has_the_published_values():
    terminals = {
        "W": torch.tensor([[1.0, 2.0, 3.0, 4.0]]),
        "G": torch.tensor([[0.0, 1.0, 2.0, 4.0]]),
    }
    for primitives in ("safe", "compat"):
        value = Expression.parse(PUBLISHED).evaluate(terminals, primitives=primitives)
        torch.testing.assert_close(value, torch.tensor([[0.0, 1.0, 4.5, 16.0]]))


def test_text_and_json_are_two_ways_to_write_one_expression():
    metric = Expression.parse(PUBLISHED)
    assert str(metric) == PUBLISHED
    assert metric.to_json() == TREE
    assert metric == Expression.from_json(TREE) == Expression.from_json(json.dumps(TREE))
    assert metric == Expression.parse(" mul(\nabs(mul(W,W)) ,mms( G ))")
    assert hash(metric) == hash(Expression.from_json(TREE))


def test_json_is_read_from_a_file(tmp_path):
    (tmp_path / "best_tree.json").write_text(json.dumps(TREE))
    assert str(Expression.from_json(tmp_path / "best_tree.json")) == PUBLISHED


def test_json_may_spell_out_that_there_are_no_operands():
    leaf = {"data": "W", "left": None, "right": None}
    assert Expression.from_json({"data": "abs", "left": leaf, "right": None}).depth == 1


def test_an_expression_tells_its_depth_size_terminals_and_nodes():
    metric = Expression.parse(PUBLISHED)
    assert (metric.depth, metric.size, metric.terminals) == (3, 7, {"W", "G"})
    assert [node.name for node in metric.nodes()] == ["mul", "abs", "mul", "W", "W", "mms", "G"]


@pytest.mark.parametrize(
    ("number", "written"),
    [
        (0, "X"),
        (1, "mul(X, mms(G))"),
        (2, "mul(abs(X), mms(G))"),
        (4, "mul(abs(mul(W, X)), mms(G))"),
        (5, "mul(abs(mul(W, W)), X)"),
        (6, "mul(abs(mul(W, W)), mms(X))"),
    ],
)
def test_any_node_can_be_replaced_and_the_tree_stays_as_it_was(number, written):
    metric = Expression.parse(PUBLISHED)
    assert str(metric.with_node(number, Expression("X"))) == written
    assert str(metric) == PUBLISHED


def test_a_node_that_is_not_there_is_refused():
    with pytest.raises(InvalidArgumentError, match=r"`number` must be in \[0, 7\), got 7"):
        Expression.parse(PUBLISHED).with_node(7, Expression("X"))


@pytest.mark.parametrize(
    ("text", "formula"),
    [
        (PUBLISHED, "|W · W| · minmax(G)"),
        ("mul(W, sqrt(X))", "W · √|X|"),
        ("sub(W, sub(G, X))", "W − (G − X)"),
        ("mul(add(W, G), sqr(neg(X)))", "(W + G) · (−X)²"),
        ("div(pow(add(W, G)), log(tanh(G)))", "(W + G)² / ‖ln(|tanh(G)| + 0.001)‖"),
        ("neg(neg(skp(exp(zsn(W)))))", "−(−exp(zscore(W)))"),
    ],
)
def test_an_expression_is_shown_as_mathematics_writes_it(text, formula):
    assert Expression.parse(text).formula() == formula


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "a function or a terminal is missing, at character 1"),
        ("mul(W, )", "a function or a terminal is missing, at character 8"),
        ("mul(W, G", "a comma or a closing parenthesis is missing, at character 9"),
        ("mul(W; G)", "a comma or a closing parenthesis is missing, at character 6"),
        ("mul(W, G))", "nothing may follow the expression, at character 10"),
        ("mul(W, foo(G))", "unknown name `foo`"),
        ("mul(W)", "`mul` takes 2 operands, got 1, at character 1"),
        ("sqr(W, G)", "`sqr` takes 1 operand, got 2, at character 1"),
        ("abs(sqr)", "`sqr` takes 1 operand, got 0, at character 5"),
        ("W(G)", "`W` is no function, and takes no operands, at character 1"),
        ("__import__('os')", "a function or a terminal is missing, at character 12"),
        ("abs(" * 60 + "W" + ")" * 60, "50 edges deep, not more, at character 205"),
        ("abs(" * 100_000, "50 edges deep, not more, at character 205"),
    ],
)
def test_a_text_that_is_no_expression_is_refused_at_the_place(text, told):
    with pytest.raises(InvalidArgumentError) as caught:
        Expression.parse(text)
    assert told in str(caught.value)
    line, pointer = str(caught.value).splitlines()[-2:]
    at = int(str(caught.value).partition("at character ")[2].partition(" ")[0]) - 1
    assert line[len(pointer) - 1 :].startswith(text[at : at + 1])


@pytest.mark.parametrize(
    ("document", "told"),
    [
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ([], 'no `"data"` with a name at the root'),
        ({"data": 1}, 'no `"data"` with a name at the root'),
        ({"data": "abs", "left": {"data": "foo"}}, "unknown name `foo`"),
        ({"data": "abs", "left": {"data": "abs", "left": 1}}, "name at `left.left`"),
        ({"data": "abs", "right": {"data": "W"}}, 'a `"right"` without a `"left"` at the root'),
        ({"data": "W", "value": 1}, "an unknown key 'value' at the root"),
        ({"data": "W", "value": 1, 2: 3}, "an unknown key 2 at the root"),
        ({"data": "mul", "left": {"data": "W"}}, "`mul` takes 2 operands, got 1 at the root"),
    ],
)
def test_json_that_is_no_expression_is_refused_at_the_place(document, told):
    with pytest.raises(InvalidArgumentError) as caught:
        Expression.from_json(document)
    assert told in str(caught.value)


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(YopoError, match="best_tree"):
        Expression.from_json(tmp_path / "best_tree.json")


def test_a_file_that_is_no_json_is_told(tmp_path):
    (tmp_path / "best_tree.json").write_text("mul(W, G)")
    with pytest.raises(InvalidArgumentError, match=r"best_tree\.json` cannot be read: Expecting"):
        Expression.from_json(tmp_path / "best_tree.json")


def test_what_is_no_text_is_refused():
    with pytest.raises(InvalidArgumentError, match="`text` must be a string, got None"):
        Expression.parse(None)


@pytest.mark.parametrize("operands", [("W",), "W", None, Expression("W"), 3])
def test_operands_that_are_no_expressions_are_refused(operands):
    with pytest.raises(InvalidArgumentError, match="`operands` must be a tuple of expressions"):
        Expression("abs", operands)


def test_operands_in_a_list_make_the_same_tree():
    operands = [Expression("W"), Expression("G")]
    metric = Expression("mul", operands)
    operands.clear()
    assert metric == Expression.parse("mul(W, G)")
    assert hash(metric) == hash(Expression.parse("mul(W, G)"))


def test_trees_are_checked_however_they_are_made():
    with pytest.raises(InvalidArgumentError, match="takes 2 operands"):
        Expression("mul", (Expression("W"),))
    deepest = Expression.parse("abs(" * DEEPEST + "W" + ")" * DEEPEST)
    with pytest.raises(InvalidArgumentError, match="50 edges"):
        Expression("abs", (deepest,))


def test_a_missing_terminal_and_unknown_primitives_are_told():
    with pytest.raises(InvalidArgumentError, match="needs `G`, and there is only W"):
        Expression.parse("add(W, G)").evaluate({"W": torch.ones(1, 1)})
    with pytest.raises(InvalidArgumentError, match='must be "safe" or "compat"'):
        Expression("W").evaluate({"W": torch.ones(1, 1)}, primitives="exact")


def test_values_are_float32_whatever_the_terminals_are():
    weight = torch.rand(3, 4, dtype=torch.bfloat16)
    value = Expression.parse("sqr(W)").evaluate({"W": weight})
    torch.testing.assert_close(value, weight.float() ** 2)


def test_intermediate_values_are_freed_as_soon_as_they_are_used():
    """A chain of any length needs a result and an operand, beside the terminal."""
    import weakref

    from yopo.symbolic import primitives

    alive = []

    def counting(a):
        value = a + 1
        alive.append(weakref.ref(value))
        counts.append(sum(ref() is not None for ref in alive))
        return value

    counts = []
    one = primitives.Primitive(1, counting, counting)
    table = {**primitives.PRIMITIVES, "abs": one}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("yopo.symbolic.expression.PRIMITIVES", table)
        Expression.parse("abs(" * 20 + "W" + ")" * 20).evaluate({"W": torch.ones(4)})
    assert max(counts) == 2
