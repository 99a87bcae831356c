"""Metrics by name, and scores of the weights of a matrix."""

import pytest
import torch
from torch import nn

from yopo import InvalidArgumentError
from yopo.symbolic import METRICS, Expression
from yopo.symbolic.matrices import Matrix
from yopo.symbolic.metrics import check_weight_metric, metric_of, scores_of

WEIGHT = torch.tensor([[1.0, -2.0, 3.0, -4.0], [2.0, 2.0, -1.0, 0.5]])
MATRIX = Matrix("w", nn.Parameter(WEIGHT), "w")
TERMINALS = {
    "W": WEIGHT.abs(),
    "G": torch.tensor([[0.0, 1.0, 2.0, 4.0], [3.0, 1.0, 0.5, 2.0]]),
    "X": torch.tensor([[4.0, 1.0, 0.25, 9.0]]),
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pruner-zero", lambda w, g, x: w * w * (g - g.min()) / (g.max() - g.min())),
        ("wanda", lambda w, g, x: w * x.sqrt()),
        ("gblm", lambda w, g, x: w * x.sqrt() + w * g),
        ("magnitude", lambda w, g, x: w),
    ],
)
def test_named_metrics_are_those_of_their_papers(name, expected):
    metric = metric_of(name)
    scores = scores_of(MATRIX, metric.expression, TERMINALS, primitives="safe", whole=metric.whole)
    torch.testing.assert_close(scores, expected(*(TERMINALS[t] for t in "WGX")))
    assert metric == METRICS[name]
    assert metric.whole == (name == "magnitude")


def test_a_metric_can_be_an_expression_or_its_text():
    assert metric_of("mul(W, G)") == metric_of(Expression.parse("mul(W, G)"))


def test_scores_of_inputs_alone_are_spread_over_the_rows():
    scores = scores_of(MATRIX, Expression("X"), TERMINALS, primitives="safe")
    assert torch.equal(scores, TERMINALS["X"].expand(2, 4))


@pytest.mark.parametrize("metric", ["wunda", "mul(W", 3, None])
def test_what_is_no_metric_is_refused(metric):
    with pytest.raises(InvalidArgumentError, match="`metric` must be"):
        metric_of(metric)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("exp(exp(sqr(sqr(W))))", "is NaN or infinite"),
        ("tanh(sqr(sqr(sqr(add(W, exp(sqr(sqr(W))))))))", "weights of row 0 of `w` the same score"),
        ("sub(W, W)", "weights of row 0 of `w` the same score"),
    ],
)
def test_scores_that_cannot_choose_are_refused(text, told):
    with pytest.raises(InvalidArgumentError, match=told):
        scores_of(MATRIX, Expression.parse(text), TERMINALS, primitives="compat")


def test_rows_that_nothing_tells_apart_are_no_fault_of_the_metric():
    gradient = TERMINALS["G"].clone()
    gradient[1] = 0.0  # a hidden unit that is never active
    scores = scores_of(
        MATRIX, Expression.parse("mul(W, G)"), TERMINALS | {"G": gradient}, primitives="safe"
    )
    assert scores[1].eq(0).all()


def test_a_matrix_that_no_text_reaches_is_told():
    nothing = TERMINALS | {"G": torch.zeros(2, 4)}
    told = "G of `w` is zero everywhere.*Pass more `data`, or `sequential=False` where layers share"
    with pytest.raises(InvalidArgumentError, match=told):
        scores_of(MATRIX, Expression.parse("mul(W, G)"), nothing, primitives="safe")
    scores_of(MATRIX, Expression("W"), nothing, primitives="safe")


def test_a_missing_terminal_is_told():
    told = r"`mul\(W, X\)` needs X of `w`, and there is only W\."
    with pytest.raises(InvalidArgumentError, match=told):
        scores_of(MATRIX, Expression.parse("mul(W, X)"), {"W": WEIGHT}, primitives="safe")


def test_metrics_of_rows_do_not_score_weights():
    with pytest.raises(InvalidArgumentError, match="looks at `gate_norm` of an FFN"):
        check_weight_metric(Expression.parse("mul(W, gate_norm)"))
    check_weight_metric(Expression.parse("mul(W, G)"))
