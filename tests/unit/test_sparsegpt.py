"""SparseGPT beside the same written column by column, as the paper has it."""

import pytest
import torch

from yopo import InvalidArgumentError, UnsupportedModelError
from yopo.symbolic.masks import Pattern
from yopo.symbolic.sparsegpt import sparsegpt


def problem(inputs=16, outputs=6, tokens=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator)
    x = torch.randn(tokens, inputs, generator=generator) @ mix
    return torch.randn(outputs, inputs, generator=generator), x


def by_hand(weight, x, zero_rows_of, damping=0.01):
    """Solve column by column with the inverse of what is left of H, in float64.

    Args:
        zero_rows_of: From a column, the weights so far and the diagonal of the inverse ahead, to
            where this column becomes zero.
    """
    weight, hessian = weight.double().clone(), 2 * x.double().T @ x.double() / len(x)
    hessian += damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    columns = weight.shape[1]
    inverses = [torch.linalg.inv(hessian[c:, c:]) for c in range(columns)]
    scale = torch.stack([inverse[0, 0] for inverse in inverses])
    for column in range(columns):
        gone = zero_rows_of(column, weight, scale)
        error = torch.where(gone, weight[:, column] / scale[column], 0.0)
        weight[:, column:] -= error[:, None] * inverses[column][0]
        weight[gone, column] = 0.0
    return weight


def test_unstructured_zeros_are_those_of_the_paper():
    weight, x = problem()
    chosen = {}

    def zero_rows_of(column, now, scale):
        if column == 0:
            scores = (now**2 / scale).flatten()
            gone = torch.zeros_like(scores, dtype=torch.bool)
            gone[scores.argsort()[: len(scores) // 2]] = True
            chosen["gone"] = gone.view_as(now)
        return chosen["gone"][:, column]

    expected = by_hand(weight, x, zero_rows_of)
    found = sparsegpt(weight, x.T @ x, Pattern.of("unstructured", 0.5), name="w")
    torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-4)
    assert int((found == 0).sum()) == found.numel() // 2


def test_zeros_of_groups_are_those_of_the_paper():
    weight, x = problem(seed=1)
    chosen = {}

    def zero_rows_of(column, now, scale):
        if column % 4 == 0:
            scores = now[:, column : column + 4] ** 2 / scale[column : column + 4]
            lowest = scores.argsort(dim=1)[:, :2]
            chosen["gone"] = torch.zeros_like(scores, dtype=torch.bool).scatter(1, lowest, True)
        return chosen["gone"][:, column % 4]

    expected = by_hand(weight, x, zero_rows_of)
    found = sparsegpt(weight, x.T @ x, Pattern.of("2:4", None), name="w")
    torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-4)
    assert (found.view(6, 4, 4) == 0).sum(dim=2).eq(2).all()


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "1:3"])
def test_the_output_changes_less_than_by_zeros_alone(pattern):
    weight, _ = problem(inputs=300)
    generator = torch.Generator().manual_seed(1)
    known = torch.randn(2000, 60, generator=generator)  # inputs that tell much of one another
    x = known @ torch.randn(60, 300, generator=generator)
    chosen = Pattern.of(pattern, None)
    found = sparsegpt(weight, x.T @ x, chosen, name="w")
    alone = torch.where(found == 0, 0.0, weight)
    error, error_alone = ((x @ (w - weight).T).square().sum() for w in (found, alone))
    assert error < 0.5 * error_alone


def test_inputs_that_are_always_zero_lose_their_weights_first_and_no_more_go_than_asked_for():
    weight, x = problem()
    x[:, 3] = 0.0
    found = sparsegpt(weight, x.T @ x, Pattern.of("unstructured", 0.25), name="w")
    assert found[:, 3].eq(0).all()
    assert int((found == 0).sum()) == found.numel() // 4
    assert found.isfinite().all()
    x[:, :10] = 0.0
    for pattern in ("unstructured", "2:4"):
        found = sparsegpt(weight, x.T @ x, Pattern.of(pattern, 0.5), name="w")
        assert int((found == 0).sum()) == found.numel() // 2
        assert torch.equal(found[:, :8][found[:, :8] != 0], weight[:, :8][found[:, :8] != 0])


def test_a_matrix_that_no_token_reaches_is_refused_and_not_emptied():
    weight, x = problem()
    with pytest.raises(InvalidArgumentError, match=r"no token reaches `w`.*Pass more `data`"):
        sparsegpt(weight, 0 * x.T @ x, Pattern.of("2:4", None), name="w")


def test_inputs_that_are_not_finite_are_told():
    weight, x = problem()
    x[0, 0] = torch.nan
    with pytest.raises(UnsupportedModelError, match="inputs of `w` are NaN"):
        sparsegpt(weight, x.T @ x, Pattern.of("2:4", None), name="w")


def test_the_matrix_itself_is_left_as_it_was():
    weight, x = problem()
    before = weight.clone()
    sparsegpt(weight, x.T @ x, Pattern.of("2:4", None), name="w")
    assert torch.equal(weight, before)
