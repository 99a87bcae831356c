import math
from collections import Counter
from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from yopo.sampling import best_rows, draw_log_probability, draw_rows

LOGITS = [
    [0.0, 0.0, 0.0],
    [0.3, -1.2, 2.0, 0.1],
    [5.0, -5.0, 0.0, 1.0, -0.5],
    [40.0, -40.0, 0.0],
]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def plackett_luce(logits, order):
    """Return the probability of drawing `order` from the definition: one row after another."""
    left = {row: math.exp(logit) for row, logit in enumerate(logits)}
    probability = 1.0
    for row in order:
        probability *= left[row] / sum(left.values())
        del left[row]
    return probability


@pytest.mark.parametrize("keep", [1, 2, 3])
@pytest.mark.parametrize("logits", LOGITS)
def test_log_probabilities_are_those_of_drawing_one_row_after_another(logits, keep):
    orders = torch.tensor(list(permutations(range(len(logits)), keep)))
    result = draw_log_probability(torch.tensor(logits, dtype=torch.float64), orders)
    expected = torch.tensor(
        [plackett_luce(logits, order) for order in orders.tolist()], dtype=torch.float64
    )
    torch.testing.assert_close(result.exp(), expected, rtol=1e-9, atol=1e-12)
    assert float(result.exp().sum()) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("keep", [1, 2, 3])
@pytest.mark.parametrize("logits", LOGITS)
def test_gradients_of_log_probabilities_are_finite_differences(logits, keep):
    point = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    for order in permutations(range(len(logits)), keep):
        drawn = torch.tensor([order])
        (gradient,) = torch.autograd.grad(draw_log_probability(point, drawn).sum(), point)
        step = 1e-5
        for row in range(len(logits)):
            moved = torch.zeros(len(logits), dtype=torch.float64)
            moved[row] = step
            rise = draw_log_probability(point.detach() + moved, drawn)
            fall = draw_log_probability(point.detach() - moved, drawn)
            assert float(gradient[row]) == pytest.approx(
                float(rise - fall) / (2 * step), abs=1e-6
            ), order


def test_the_gradient_of_a_log_probability_has_mean_zero():
    """The expectation of the score function is 0: the identity on which REINFORCE rests."""
    point = torch.tensor(LOGITS[1], dtype=torch.float64, requires_grad=True)
    orders = torch.tensor(list(permutations(range(4), 2)))
    log_probability = draw_log_probability(point, orders)
    mean = (log_probability.detach().exp() * log_probability).sum()
    (gradient,) = torch.autograd.grad(mean, point)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


@pytest.mark.parametrize("keep", [1, 2, 3])
@pytest.mark.parametrize("logits", LOGITS[:3])
def test_draws_have_the_frequencies_of_plackett_luce(logits, keep):
    draws = 40_000
    drawn = draw_rows(torch.tensor(logits), keep=keep, draws=draws, generator=seeded(1))
    counts = Counter(map(tuple, drawn.tolist()))
    orders = list(permutations(range(len(logits)), keep))
    assert set(counts) <= set(orders)
    expected = {order: draws * plackett_luce(logits, order) for order in orders}
    common = [order for order in orders if expected[order] >= 5]
    rare = draws - sum(counts[order] for order in common)
    observed = [counts[order] for order in common] + [rare]
    hoped = [expected[order] for order in common]
    hoped.append(draws - sum(hoped))
    if hoped[-1] < 1e-6:
        observed.pop(), hoped.pop()
    assert chisquare(observed, hoped, sum_check=False).pvalue > 0.001


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_extreme_logits_draw_the_certain_rows_and_give_no_nan(dtype):
    logits = torch.tensor([1e4, -1e4, 0.0, 1e4, -1e4], dtype=dtype, requires_grad=True)
    drawn = draw_rows(logits, keep=3, draws=500, generator=seeded())
    assert {frozenset(rows) for rows in drawn.tolist()} == {frozenset({0, 3, 2})}
    assert set(drawn[:, 2].tolist()) == {2}
    unlikely = torch.tensor([[1, 4, 2], [2, 1, 0]])
    for orders in (drawn, unlikely):
        log_probability = draw_log_probability(logits, orders)
        assert torch.isfinite(log_probability).all()
        (gradient,) = torch.autograd.grad(log_probability.sum(), logits)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_drawing_every_row_has_finite_probabilities_and_gradients(rows):
    logits = torch.linspace(-1, 2, rows, requires_grad=True)
    drawn = draw_rows(logits, keep=rows, draws=4, generator=seeded())
    assert torch.equal(drawn.sort().values, torch.arange(rows).expand(4, -1))
    log_probability = draw_log_probability(logits, drawn)
    (gradient,) = torch.autograd.grad(log_probability.sum(), logits)
    assert torch.isfinite(log_probability).all()
    assert torch.isfinite(gradient).all()


def test_the_probability_of_thousands_of_rows_keeps_its_digits():
    logits = torch.randn(4000, generator=seeded(), dtype=torch.float64) * 3
    drawn = draw_rows(logits, keep=2800, draws=2, generator=seeded(1))
    exact = draw_log_probability(logits, drawn)
    torch.testing.assert_close(
        draw_log_probability(logits.float(), drawn), exact.float(), rtol=1e-5, atol=0
    )


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.data())
def test_the_best_rows_are_the_largest_and_ties_go_to_the_first(scores, data):
    keep = data.draw(st.integers(1, len(scores)))
    best = best_rows(torch.tensor(scores, dtype=torch.float32), keep=keep)
    by_rank = sorted(range(len(scores)), key=lambda row: (-scores[row], row))
    assert best.tolist() == sorted(by_rank[:keep])
    assert best.dtype == torch.int64


def test_the_same_seed_draws_the_same_and_no_draw_holds_a_row_twice():
    logits = torch.randn(50, generator=seeded())
    one, same, other = (
        draw_rows(logits, keep=20, draws=30, generator=seeded(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.shape == (30, 20)
    assert all(len(set(rows)) == 20 for rows in one.tolist())
    assert len({tuple(rows) for rows in one.tolist()}) == 30


def test_drawing_and_choosing_leave_no_trace_in_a_gradient_or_the_global_generator():
    logits = torch.randn(9, generator=seeded(), requires_grad=True)
    before = torch.get_rng_state()
    assert not draw_rows(logits, keep=3, draws=2, generator=seeded()).requires_grad
    assert not best_rows(logits, keep=3).requires_grad
    assert torch.equal(torch.get_rng_state(), before)
