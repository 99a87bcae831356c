import pytest
import torch

from yopo.elimination import elimination_order


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


def order_by_brute_force(second, contract):
    dropped = []
    for _ in range(len(second)):
        left = [row for row in range(len(second)) if row not in dropped]
        if len(left) == 1:
            return dropped + left
        losses = {row: loss_after_solving(second, contract, [*dropped, row]) for row in left}
        dropped.append(min(losses, key=losses.get))
    return dropped


@pytest.mark.parametrize(("rows", "columns"), [(1, 3), (7, 3), (12, 20)])
def test_each_row_dropped_is_the_one_that_costs_least_once_the_others_are_solved(rows, columns):
    second = moments(rows, tokens=400)
    contract = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).double()
    order = elimination_order(second, contract, ridge=1e-12)
    assert order.tolist() == order_by_brute_force(second, contract)


def test_blocks_change_nothing(monkeypatch):
    second = moments(90, tokens=300)
    contract = torch.randn(90, 16, generator=torch.Generator().manual_seed(1))
    orders = []
    for size in (1, 7, 64, 1000):
        monkeypatch.setattr("yopo.elimination._BLOCK", size)
        orders.append(elimination_order(second, contract).tolist())
    assert orders[0] == orders[1] == orders[2] == orders[3]


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
