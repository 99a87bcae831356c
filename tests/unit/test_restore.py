import pytest
import torch

from yopo.moments import Moments
from yopo.restore import restore_contract


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(24, 24, generator=generator).double()
    units = torch.randn(500, 24, generator=generator).double() @ mixing + 0.5
    contract = torch.randn(24, 6, generator=generator).double()
    kept = torch.tensor([0, 2, 3, 5, 8, 11, 12, 13, 17, 20, 21, 23])
    return units, contract, kept


def moments_of(units):
    return Moments(units.T @ units / len(units), units.mean(dim=0), len(units))


def test_without_a_bias_it_is_the_least_squares_solution(data):
    units, contract, kept = data
    solution = torch.linalg.lstsq(units[:, kept], units @ contract).solution
    restored = restore_contract(
        moments_of(units), contract, None, kept, dtype=torch.float64, ridge=1e-12
    )
    torch.testing.assert_close(restored.contract_KD, solution, rtol=1e-6, atol=1e-8)
    assert restored.bias_D is None
    target = units @ contract
    error = (units[:, kept] @ solution - target).square().sum() / target.square().sum()
    assert restored.error == pytest.approx(float(error), rel=1e-6)


def test_with_a_bias_it_is_the_least_squares_solution_with_an_intercept(data):
    units, contract, kept = data
    bias = torch.linspace(-1, 1, 6).double()
    ones = torch.ones(len(units), 1).double()
    solution = torch.linalg.lstsq(
        torch.cat([units[:, kept], ones], dim=1), units @ contract + bias
    ).solution
    restored = restore_contract(
        moments_of(units), contract, bias, kept, dtype=torch.float64, ridge=1e-12
    )
    torch.testing.assert_close(restored.contract_KD, solution[:-1], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(restored.bias_D, solution[-1], rtol=1e-6, atol=1e-7)


def test_the_ridge_is_a_share_of_the_mean_diagonal_over_the_rows_that_stay(data):
    units, contract, kept = data
    scaled = units.clone()
    dropped = [n for n in range(24) if n not in kept.tolist()]
    scaled[:, dropped] *= 3.0  # so that the mean over all rows would be another
    second = scaled.T @ scaled / len(scaled)
    damped = second[kept][:, kept]
    damped = damped + 0.1 * damped.trace() / len(kept) * torch.eye(len(kept)).double()
    expected = contract[kept] + damped.inverse() @ second[kept][:, dropped] @ contract[dropped]
    restored = restore_contract(
        moments_of(scaled), contract, None, kept, dtype=torch.float64, ridge=0.1
    )
    torch.testing.assert_close(restored.contract_KD, expected)


def test_weights_without_evidence_stay_as_they_are(data):
    _, contract, kept = data
    silent = Moments(torch.zeros(24, 24).double(), torch.zeros(24).double(), 0)
    restored = restore_contract(silent, contract, None, kept, dtype=torch.float64)
    assert torch.equal(restored.contract_KD, contract[kept])


def test_fewer_tokens_than_rows_never_make_the_output_worse(data):
    units, contract, kept = data
    restored = restore_contract(moments_of(units[:5]), contract, None, kept, dtype=torch.float64)
    assert restored.error <= restored.error_before
    assert torch.isfinite(restored.contract_KD).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_error_is_that_of_the_rounded_weights(data, dtype):
    units, contract, kept = data
    contract = contract.to(dtype)
    restored = restore_contract(moments_of(units), contract, None, kept, dtype=dtype)
    assert restored.contract_KD.dtype == dtype
    target = units @ contract.double()
    error = (units[:, kept] @ restored.contract_KD.double() - target).square().sum()
    assert restored.error == pytest.approx(float(error / target.square().sum()), rel=1e-6)


def test_rounding_that_spoils_the_solution_falls_back_to_the_weights_as_they_are(data):
    units, contract, kept = data
    alone = units.clone()
    dropped = torch.ones(24, dtype=torch.bool)
    dropped[kept] = False
    alone[:, dropped] = 0.0  # nothing to win: the dropped units are silent
    restored = restore_contract(moments_of(alone), contract, None, kept, dtype=torch.float32)
    assert torch.equal(restored.contract_KD, contract[kept])
    assert restored.error == restored.error_before


def test_solutions_beyond_the_range_of_the_dtype_are_not_taken_and_the_ffn_is_named(data, caplog):
    units, contract, kept = data
    contract = contract * 6e4
    restored = restore_contract(
        moments_of(units), contract, None, kept, dtype=torch.float16, name="layers.3.mlp"
    )
    assert torch.equal(restored.contract_KD, contract[kept])
    assert restored.error == restored.error_before > 0
    assert "`layers.3.mlp`" in caplog.text
    assert "left as they are" in caplog.text


@pytest.mark.parametrize(("tokens", "told"), [(5, True), (500, False)])
def test_evidence_smaller_than_the_rows_that_stay_is_told(data, caplog, tokens, told):
    units, contract, kept = data
    with caplog.at_level("INFO", logger="yopo"):
        restore_contract(moments_of(units[:tokens]), contract, None, kept, dtype=torch.float64)
    assert ("5 tokens, is less than the 12 rows" in caplog.text) == told
    assert "left as they are" not in caplog.text


@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, 6).double()])
def test_both_errors_are_those_of_the_output(data, bias):
    units, contract, kept = data
    shift = torch.zeros(6).double() if bias is None else bias
    restored = restore_contract(moments_of(units), contract, bias, kept, dtype=torch.bfloat16)
    target = units @ contract
    new_bias = shift if restored.bias_D is None else restored.bias_D
    plain = units[:, kept] @ contract[kept] - target
    solved = units[:, kept] @ restored.contract_KD.double() + new_bias - shift - target
    total = float(target.square().sum())
    assert restored.error_before == pytest.approx(float(plain.square().sum()) / total, rel=1e-9)
    assert restored.error == pytest.approx(float(solved.square().sum()) / total, rel=1e-6)
