import pytest
import torch

import yopo
from yopo import find_ffns
from yopo.elimination import (
    _drop_block,
    eliminate,
    elimination_order,
    ffn_elimination,
    ffn_elimination_order,
)
from yopo.evidence import Evidence
from yopo.imagining import imagine_moments


def moments(rows, *, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(rows, rows, generator=generator, dtype=torch.float64) / rows**0.5
    units = torch.randn(tokens, rows, generator=generator, dtype=torch.float64) @ mixing
    return units.T @ units / tokens


def loss_after_solving(second, contract, dropped):
    """Return the output error without `dropped` rows when the others are re-solved."""
    kept = [row for row in range(len(second)) if row not in dropped]
    solved = torch.linalg.solve(second[kept][:, kept], second[kept][:, dropped] @ contract[dropped])
    change = contract.clone()
    change[kept] = -solved
    return float((change * (second @ change)).sum())


def eliminate_by_brute_force(second, contract):
    """Return the rows in order, and by how much each raises the error."""
    dropped, totals = [], [0.0]
    for _ in range(len(second)):
        left = [row for row in range(len(second)) if row not in dropped]
        losses = {row: loss_after_solving(second, contract, [*dropped, row]) for row in left}
        dropped.append(min(losses, key=losses.get))
        totals.append(losses[dropped[-1]])
    return dropped, torch.tensor(totals, dtype=torch.float64).diff()


@pytest.mark.parametrize(("rows", "columns"), [(1, 3), (7, 3), (12, 20)])
def test_each_row_dropped_is_the_one_that_costs_least_once_the_others_are_solved(rows, columns):
    second = moments(rows, tokens=400)
    contract = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).double()
    found = eliminate(second, contract, ridge=1e-12)
    order, losses = eliminate_by_brute_force(second, contract)
    assert found.order_F.tolist() == order
    assert found.loss_F.dtype == torch.float64
    torch.testing.assert_close(found.loss_F, losses, rtol=1e-6, atol=1e-9)


def test_all_losses_add_up_to_the_mean_square_of_the_output():
    second = moments(150, tokens=60)
    contract = torch.randn(150, 8, generator=torch.Generator().manual_seed(1)).double()
    damped = second + 1e-2 * second.diagonal().mean() * torch.eye(150)
    found = eliminate(second, contract)
    assert float(found.loss_F.min()) >= 0
    assert float(found.loss_F.sum()) == pytest.approx(
        float((contract * (damped @ contract)).sum()), rel=1e-9
    )


@pytest.mark.parametrize("drops", [0, 1, 64, 65, 89, 90, 91])
def test_whoever_stops_early_gets_the_same_drops_and_the_others_by_what_they_would_cost(drops):
    second = moments(90, tokens=300)
    contract = torch.randn(90, 16, generator=torch.Generator().manual_seed(1))
    full, part = eliminate(second, contract), eliminate(second, contract, drops=drops)
    assert part.order_F[:drops].tolist() == full.order_F[:drops].tolist()
    torch.testing.assert_close(part.loss_F[:drops], full.loss_F[:drops])
    assert part.order_F.sort().values.tolist() == list(range(90))
    if drops < 90:
        assert part.order_F[drops] == full.order_F[drops]
        assert part.loss_F[drops:].tolist() == part.loss_F[drops:].sort().values.tolist()


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_an_ffn_with_a_bias_is_judged_by_central_moments(tiny_model, kind):
    model = tiny_model(kind)
    ffn = find_ffns(model)[0]
    found = imagine_moments(model, [ffn], tokens=500, seed=0)[ffn.name]
    central = found.covariance() if kind == "opt" else found.second_FF
    expected = eliminate(central, ffn.contract_weight())
    eliminated = ffn_elimination(ffn, found)
    assert torch.equal(eliminated.order_F, expected.order_F)
    assert torch.equal(eliminated.loss_F, expected.loss_F)
    assert torch.equal(ffn_elimination_order(ffn, found), expected.order_F)


def test_blocks_change_nothing(monkeypatch):
    second = moments(90, tokens=300)
    contract = torch.randn(90, 16, generator=torch.Generator().manual_seed(1))
    orders = []
    for size in (1, 7, 64, 1000):
        monkeypatch.setattr("yopo.elimination._BLOCK", size)
        orders.append(elimination_order(second, contract).tolist())
    assert orders[0] == orders[1] == orders[2] == orders[3]


def test_the_loop_over_rows_asks_nothing_of_the_device():
    both = torch.empty(2, 40, 40, dtype=torch.float64, device="meta")  # has no values to tell
    for found in _drop_block(both, both.diagonal(dim1=1, dim2=2).clone(), 7):
        assert found.is_meta


def test_units_that_are_always_zero_go_first():
    second = moments(10, tokens=200)
    second[3] = second[:, 3] = second[8] = second[:, 8] = 0.0
    order = elimination_order(second, torch.ones(10, 4))
    assert set(order[:2].tolist()) == {3, 8}


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_too_little_evidence_still_gives_an_order_of_all_rows(tokens):
    second = moments(20, tokens=tokens) if tokens else torch.zeros(20, 20).double()
    order = elimination_order(second, torch.randn(20, 4))
    assert sorted(order.tolist()) == list(range(20))


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_the_default_keeps_the_last_of_the_order(tiny_model, kind):
    model = tiny_model(kind)
    ids = torch.randint(3, 60, (8, 16), generator=torch.Generator().manual_seed(0))
    plan = yopo.PolicyPruner(evidence=ids).fit(model).plan(model, 0.4)
    for ffn, moments in Evidence(ids, seed=0).moments(model, find_ffns(model)):
        kept = plan.kept[ffn.name]
        order = ffn_elimination_order(ffn, moments)
        assert kept.tolist() == order[-len(kept) :].sort().values.tolist()
