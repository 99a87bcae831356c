from contextlib import nullcontext

import pytest
import torch

from yopo.reward import PERFECT, discounted, output_reward, spectral_reward
from yopo.spectrum import spectra_of, spectral_distances


def kept_rows(golden, case):
    key = f"reward.{case['case']}.kept.{case['ratio']}"
    return golden[1].get(key, torch.arange(case["kept"]))  # ratio 0 keeps all, in order


def distances_in(weight, kept_MK):
    return spectral_distances(spectra_of([lambda: nullcontext(weight)]), [kept_MK])[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rewards_are_those_of_the_reference(golden, dtype):
    figures, tensors = golden
    for case in figures["reward"]:
        kept = kept_rows(golden, case)
        assert len(kept) == case["kept"]
        ks = distances_in(tensors[f"reward.{case['case']}.weight"].to(dtype), kept[None])
        assert float(spectral_reward(ks)) == pytest.approx(case["reward"], rel=1e-12), case


def test_every_draw_of_a_batch_earns_what_it_earns_alone():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(60, 24, generator=generator)
    kept = torch.rand(5, 60, generator=generator).topk(40).indices.sort().values
    ks = distances_in(weight, kept)
    for index, rows in enumerate(kept):
        assert ks[index] == distances_in(weight, rows[None])[0]
    assert (spectral_reward(ks) * ks).tolist() == pytest.approx([1.0] * 5)


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (6, 6), (1, 4), (4, 1)])
def test_keeping_every_row_is_perfect(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    ks = distances_in(weight, torch.arange(shape[0]).expand(3, -1))
    assert ks.tolist() == [0.0] * 3
    assert spectral_reward(ks).tolist() == [PERFECT] * 3 == [99999.0] * 3


def test_a_matrix_of_zeros_earns_the_perfect_reward_and_no_nan():
    ks = distances_in(torch.zeros(12, 5), torch.arange(6)[None])
    assert spectral_reward(ks).tolist() == [PERFECT]


def test_returns_are_those_of_the_reference(golden):
    figures = golden[0]["discount"]
    returns = discounted(torch.tensor(figures["rewards"], dtype=torch.float64), figures["gamma"])
    assert returns.tolist() == pytest.approx(figures["out"], rel=1e-12)


@pytest.mark.parametrize("discount", [0.5, 0.99, 1.0])
def test_a_discount_weighs_every_draw_of_a_layer_alike(discount):
    rewards = torch.rand(4, 3, generator=torch.Generator().manual_seed(0))
    returns = discounted(rewards, discount)
    expected = [[float(r) * discount**layer for r in row] for layer, row in enumerate(rewards)]
    torch.testing.assert_close(returns, torch.tensor(expected))


@pytest.mark.parametrize("kept", [[0, 3, 5, 9], [1], list(range(11)), list(range(12))], ids=len)
def test_the_output_reward_is_what_least_squares_on_the_hidden_units_leaves(kept):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    hidden = torch.randn(500, 12, generator=generator, dtype=torch.float64) @ mixing
    contract = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    reward = output_reward(hidden.T @ hidden / 500, contract, torch.tensor([kept, kept]))
    output = hidden @ contract
    ridge = 1e-3 * hidden[:, kept].square().mean()  # towards the weights as they are
    solved = torch.linalg.solve(
        hidden[:, kept].T @ hidden[:, kept] / 500 + ridge * torch.eye(len(kept)),
        hidden[:, kept].T @ (output - hidden[:, kept] @ contract[kept]) / 500,
    )
    error = (output - hidden[:, kept] @ (contract[kept] + solved)).square().sum()
    expected = -float((error / output.square().sum()).clamp_min(1e-12).log())
    assert reward.tolist() == pytest.approx([expected] * 2, rel=0.02)


def test_the_output_reward_of_units_that_never_fire_is_no_nan():
    rewards = output_reward(
        torch.zeros(6, 6, dtype=torch.float64), torch.ones(6, 3), torch.tensor([[0, 1, 2]])
    )
    assert torch.isfinite(rewards).all()
