import pytest
import torch
from torch.nn.functional import logsigmoid

from yopo.scorer import HiddenUnits, PruneNetScorer, kl_to_fair_coin, noisy_log_odds, scorer_bytes


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def new_scorer(columns, rows, seed=0):
    cpu = torch.device("cpu")
    return PruneNetScorer(columns, rows, generator=seeded(seed), learning_rate=1e-3, device=cpu)


@pytest.fixture(params=["square", "wide"])
def reference(request, golden):
    """Return the reference's tensors of one case, and our scorer with its parameters."""
    prefix = f"scorer.{request.param}."
    case = {key.removeprefix(prefix): t for key, t in golden[1].items() if key.startswith(prefix)}
    rows, columns = case["weight"].shape
    scorer = new_scorer(columns, rows)
    (units,) = scorer.units
    with torch.no_grad():
        units.weight_NE[:, :-1] = case["proj_weight"]
        units.weight_NE[:, -1] = case["proj_bias"]
        units.row_vector_N.copy_(case["row_vector"][:, 0])
    scorer.collapsed_E = units.collapsed()
    return case, scorer


def test_the_probability_of_keeping_is_that_of_the_reference(reference):
    case, scorer = reference
    torch.testing.assert_close(torch.sigmoid(scorer.log_odds(case["weight"])), case["alpha"])


def test_the_probability_with_noise_is_that_of_the_reference(reference):
    case, scorer = reference
    noisy = noisy_log_odds(scorer.log_odds(case["weight"]), case["eps"])
    torch.testing.assert_close(torch.sigmoid(noisy), case["keep_probs"], rtol=1e-5, atol=1e-6)


def test_the_regulariser_is_that_of_the_reference(reference):
    case, scorer = reference
    value = kl_to_fair_coin(scorer.log_odds(case["weight"]))
    torch.testing.assert_close(value, case["kl_bernoulli_half"][0], rtol=1e-5, atol=1e-5)


def test_the_collapsed_vector_scores_as_the_two_maps_do(reference):
    case, scorer = reference
    two_maps = (case["weight"] @ case["proj_weight"].T + case["proj_bias"]) @ case["row_vector"]
    vector, constant = scorer.collapsed_E[:-1], scorer.collapsed_E[-1]
    torch.testing.assert_close(case["weight"] @ vector + constant, two_maps[:, 0])
    torch.testing.assert_close(scorer.log_odds(case["weight"]), two_maps[:, 0])


def of_two_maps(case):
    """Return A, b and s of a case with their gradients through the two maps."""
    a, b, s = (
        case[key].clone().requires_grad_() for key in ("proj_weight", "proj_bias", "row_vector")
    )
    logsigmoid((case["weight"] @ a.T + b) @ s).sum().backward()
    return a, b, s


def gradient_of_the_collapsed(case, scorer):
    log_odds = scorer.log_odds(case["weight"]).requires_grad_()
    logsigmoid(log_odds).sum().backward()
    return scorer.gradient(case["weight"], log_odds.grad)


def test_gradients_reach_the_parameters_as_through_the_two_maps(reference):
    case, scorer = reference
    a, b, s = of_two_maps(case)
    (units,) = scorer.units
    squared_norm = units.set_gradients(gradient_of_the_collapsed(case, scorer))
    found = units.weight_NE.grad
    torch.testing.assert_close(found[:, :-1], a.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[:, -1], b.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(units.row_vector_N.grad, s.grad[:, 0], rtol=1e-4, atol=1e-4)
    norm = torch.cat([gradient.grad.flatten() for gradient in (a, b, s)]).norm()
    torch.testing.assert_close(squared_norm.sqrt(), norm)


def test_a_gradient_comes_from_whatever_device_the_rows_are_on():
    weight, row_vector = torch.empty(9, 7, device="meta"), torch.empty(9, device="meta")
    units = HiddenUnits(weight, row_vector, learning_rate=1e-3)
    assert units.set_gradients(torch.ones(7)).is_meta
    assert units.weight_NE.grad.shape == (9, 7)


def test_a_step_moves_the_parameters_as_adamw_moves_those_of_the_two_maps(reference):
    case, scorer = reference
    a, b, s = of_two_maps(case)
    norm = scorer.step(gradient_of_the_collapsed(case, scorer))
    torch.optim.AdamW([a, b, s], lr=1e-3).step()
    moved_D, moved_constant = (s[:, 0] @ a).detach(), (s[:, 0] @ b).detach()
    torch.testing.assert_close(scorer.collapsed_E[:-1], moved_D, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scorer.collapsed_E[-1], moved_constant, rtol=1e-4, atol=1e-4)
    assert norm == pytest.approx(
        float(torch.cat([each.grad.flatten() for each in (a, b, s)]).norm()), rel=1e-4
    )


def test_rows_and_hidden_units_in_several_blocks_give_what_one_product_gives():
    scorer = new_scorer(6, 1100)
    assert [len(units.row_vector_N) for units in scorer.units] == [512, 512, 76]
    weight = torch.randn(2100, 6, generator=seeded(1))
    whole = torch.cat([units.weight_NE for units in scorer.units]).detach()
    row_vector = torch.cat([units.row_vector_N for units in scorer.units]).detach()
    expected = row_vector @ whole
    torch.testing.assert_close(scorer.collapsed_E, expected)
    log_odds = weight @ expected[:-1] + expected[-1]
    torch.testing.assert_close(scorer.log_odds(weight), log_odds, rtol=1e-4, atol=1e-4)
    gradient = torch.randn(2100, generator=seeded(2))
    expected = torch.cat([gradient @ weight, gradient.sum()[None]])
    found = scorer.gradient(weight, gradient)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_the_bytes_of_hidden_units_are_those_of_weights_and_both_moments():
    scorer = new_scorer(6, 1100)
    scorer.step(torch.ones(7))
    held = [
        tensor.nbytes
        for units in scorer.units
        for tensor in (units.weight_NE, *units._optimizer.state[units.weight_NE].values())
        if tensor.dim() == 2
    ]
    assert scorer_bytes(6, 1100) == sum(held)


def test_initial_values_are_distributed_as_the_references():
    (units,) = new_scorer(25, 500).units
    weight, bias = units.weight_NE.detach()[:, :-1], units.weight_NE.detach()[:, -1]
    row_vector = units.row_vector_N.detach()
    linear = torch.nn.Linear(25, 4000)
    for ours, theirs in ((weight, linear.weight), (bias, linear.bias)):
        assert float(ours.abs().max()) == pytest.approx(0.2, rel=0.01)
        assert float(ours.std()) == pytest.approx(float(theirs.detach().std()), rel=0.05)
    assert 0 <= row_vector.min() < 0.01
    assert 0.99 < row_vector.max() < 1
    assert float(row_vector.mean()) == pytest.approx(0.5, abs=0.03)


def test_initial_values_come_from_the_generator_alone():
    before = torch.get_rng_state()
    (one,), (same,) = (new_scorer(5, 7, seed=3).units for _ in range(2))
    assert torch.equal(one.weight_NE, same.weight_NE)
    assert torch.equal(one.row_vector_N, same.row_vector_N)
    assert torch.equal(torch.get_rng_state(), before)


def test_log_odds_of_certainty_stay_finite_in_the_regulariser_and_its_gradient():
    log_odds = torch.tensor([1e4, -1e4, 0.0, 90.0], requires_grad=True)
    value = kl_to_fair_coin(log_odds)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(log_odds.grad).all()


def test_the_regulariser_is_least_where_every_row_is_kept_with_probability_one_half():
    at = [float(kl_to_fair_coin(torch.tensor([x]))) for x in (-3.0, -0.5, 0.0, 0.5, 3.0)]
    assert min(at) == at[2] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_noise_is_logistic_seeded_finite_and_keeps_the_dtype(dtype):
    log_odds = torch.zeros(200_000, dtype=dtype)
    noisy = noisy_log_odds(log_odds, generator=seeded(1))
    assert noisy.dtype == dtype
    assert torch.isfinite(noisy).all()
    assert torch.equal(noisy, noisy_log_odds(log_odds, generator=seeded(1)))
    # The standard logistic distribution: mean 0, variance π²/3, 7 in 10 below logit(0.7).
    assert float(noisy.double().mean()) == pytest.approx(0.0, abs=0.02)
    assert float(noisy.double().var()) == pytest.approx(torch.pi**2 / 3, rel=0.02)
    assert float((noisy.double() < 0.8473).double().mean()) == pytest.approx(0.7, abs=0.005)


def test_the_edges_of_uniform_noise_give_no_nan_where_probabilities_would():
    edges = torch.tensor([torch.finfo(torch.float64).tiny, 1 - 2**-53], dtype=torch.float64)
    assert torch.isfinite(noisy_log_odds(torch.zeros(2), edges)).all()
