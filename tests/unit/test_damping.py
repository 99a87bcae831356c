import pytest
import torch

from yopo.damping import damped_cholesky


def test_it_is_the_factor_of_the_moments_with_the_ridge():
    units = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)).double()
    second = units.T @ units / 50
    before = second.clone()
    factor = damped_cholesky(second, 0.1)
    damped = second + 0.1 * second.diagonal().mean() * torch.eye(8)
    torch.testing.assert_close(factor @ factor.T, damped)
    assert torch.equal(factor, factor.tril())
    assert torch.equal(second, before)


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_fewer_tokens_than_rows_are_no_obstacle(tokens):
    units = torch.randn(tokens, 40, generator=torch.Generator().manual_seed(0)).double()
    assert torch.isfinite(damped_cholesky(units.T @ units, 1e-3)).all()


def test_a_ridge_that_rounding_outweighs_grows_until_it_does_not():
    second = torch.ones(40, 40).double()
    second -= 0.05 * torch.eye(40).double()  # eigenvalues of -0.05, far below the ridge
    factor = damped_cholesky(second, 1e-3)
    excess = (factor @ factor.T - second).diagonal()
    torch.testing.assert_close(
        excess, torch.full((40,), 0.095, dtype=torch.float64), rtol=1e-9, atol=0.0
    )
