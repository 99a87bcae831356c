import pytest
import torch
from torch.nn.functional import logsigmoid

from yopo.scorer import PruneNetScorer, kl_to_fair_coin, noisy_log_odds


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=["square", "wide"])
def reference(request, golden):
    """Return the reference's tensors of one case, and our scorer with its parameters."""
    prefix = f"scorer.{request.param}."
    case = {key.removeprefix(prefix): t for key, t in golden[1].items() if key.startswith(prefix)}
    rows, columns = case["weight"].shape
    scorer = PruneNetScorer(columns, rows, generator=seeded())
    with torch.no_grad():
        scorer.weight_ND.copy_(case["proj_weight"])
        scorer.bias_N.copy_(case["proj_bias"])
        scorer.row_vector_N.copy_(case["row_vector"][:, 0])
    return case, scorer


def test_the_probability_of_keeping_is_that_of_the_reference(reference):
    case, scorer = reference
    torch.testing.assert_close(torch.sigmoid(scorer(case["weight"])), case["alpha"])


def test_the_probability_with_noise_is_that_of_the_reference(reference):
    case, scorer = reference
    noisy = noisy_log_odds(scorer(case["weight"]), case["eps"])
    torch.testing.assert_close(torch.sigmoid(noisy), case["keep_probs"], rtol=1e-5, atol=1e-6)


def test_the_regulariser_is_that_of_the_reference(reference):
    case, scorer = reference
    value = kl_to_fair_coin(scorer(case["weight"]))
    torch.testing.assert_close(value, case["kl_bernoulli_half"][0], rtol=1e-5, atol=1e-5)


def test_the_collapsed_vector_scores_as_the_two_maps_do(reference):
    case, scorer = reference
    two_maps = (case["weight"] @ case["proj_weight"].T + case["proj_bias"]) @ case["row_vector"]
    vector, constant = scorer.collapsed()
    torch.testing.assert_close(case["weight"] @ vector + constant, two_maps[:, 0])
    torch.testing.assert_close(scorer(case["weight"]), two_maps[:, 0])


def test_gradients_reach_the_parameters_as_through_the_two_maps(reference):
    case, scorer = reference
    logsigmoid(scorer(case["weight"])).sum().backward()
    a, b, s = (
        case[key].clone().requires_grad_() for key in ("proj_weight", "proj_bias", "row_vector")
    )
    logsigmoid((case["weight"] @ a.T + b) @ s).sum().backward()
    torch.testing.assert_close(scorer.weight_ND.grad, a.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scorer.bias_N.grad, b.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scorer.row_vector_N.grad, s.grad[:, 0], rtol=1e-4, atol=1e-4)


def test_initial_values_are_distributed_as_the_references():
    scorer = PruneNetScorer(25, 4000, generator=seeded()).requires_grad_(False)
    linear = torch.nn.Linear(25, 4000)
    for ours, theirs in ((scorer.weight_ND, linear.weight), (scorer.bias_N, linear.bias)):
        assert ours.shape == theirs.shape
        assert float(ours.abs().max()) == pytest.approx(0.2, rel=0.01)
        assert float(ours.std()) == pytest.approx(float(theirs.detach().std()), rel=0.05)
    assert 0 <= scorer.row_vector_N.min() < 0.01
    assert 0.99 < scorer.row_vector_N.max() < 1
    assert float(scorer.row_vector_N.mean()) == pytest.approx(0.5, abs=0.02)


def test_initial_values_come_from_the_generator_alone():
    before = torch.get_rng_state()
    one, same = (PruneNetScorer(5, 7, generator=seeded(3)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
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
