import itertools
import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from yopo import InvalidArgumentError, find_ffns
from yopo.adapters import Ffn, Slot, WidthField
from yopo.allocation import Losses, Spread, ffn_losses
from yopo.elimination import Elimination
from yopo.moments import Moments

RATIOS = st.floats(0.0, 0.9)


def ffns_of(sizes, columns=4):
    ffns = []
    for i, rows in enumerate(sizes):
        linear = nn.Linear(rows, columns, bias=False, device="meta")
        width = WidthField((), "intermediate_size", Fraction(1))
        name = f"layers.{i}.mlp"
        ffns.append(Ffn(name, name, rows, (), Slot(linear, "weight", 1), width=width))
    return ffns


def losses_of(loss_F, *, added=1.0, tokens=1):
    loss_F = torch.as_tensor(loss_F, dtype=torch.float64)
    return Losses(Elimination(torch.arange(len(loss_F)), loss_F), added, tokens)


def random_losses(ffns, seed, **fields):
    generator = torch.Generator().manual_seed(seed)
    return {
        ffn.name: losses_of(
            torch.rand(ffn.rows, generator=generator, dtype=torch.float64).sort().values,
            added=float(torch.rand((), generator=generator)),
            **fields,
        )
        for ffn in ffns
    }


SIZES = st.lists(st.integers(8, 600), min_size=1, max_size=5)
MULTIPLES = st.sampled_from(["auto", 1, 8])


@given(SIZES, RATIOS, MULTIPLES, st.integers(0, 9))
@example([384] * 4, 0.3, "auto", 0)
@example([11008] * 3, 0.3, "auto", 0)
def test_widths_add_up_to_the_ratio_within_one_step(sizes, ratio, multiple_of, seed):
    ffns = ffns_of(sizes)
    spread = Spread.over(ffns, random_losses(ffns, seed), multiple_of=multiple_of)
    try:
        widths = spread.widths(ratio)
    except InvalidArgumentError as error:
        most = float(str(error).rpartition("at most ")[2].rstrip("."))
        assert most < ratio
        spread.widths(most)
        return
    removed = sum(sizes) - sum(widths.values())
    step = {"auto": max(max(sizes) // 50, 1), 1: 1, 8: 8}[multiple_of]
    assert abs(removed - ratio * sum(sizes)) <= step / 2 + 1e-6
    for ffn in ffns:
        width = widths[ffn.name]
        assert 1 <= width <= ffn.rows
        assert width >= min(0.25 * (1 - ratio) * ffn.rows, ffn.rows - 1)
        if multiple_of == 8 and width < ffn.rows:
            assert width % 8 == 0


@given(SIZES, RATIOS, RATIOS, st.integers(0, 9))
def test_the_larger_the_ratio_the_fewer_rows_stay(sizes, one, other, seed):
    ffns = ffns_of(sizes)
    spread = Spread.over(ffns, random_losses(ffns, seed), multiple_of=1)
    more, less = (sum(spread.widths(r).values()) for r in sorted((one, other)))
    assert less <= more


@given(st.integers(0, 200), st.sampled_from([0.1, 0.25, 0.4]))
def test_no_other_widths_lose_less(seed, ratio):
    """Compare with every way to remove as many rows."""
    sizes = (8, 6, 6)
    ffns = ffns_of(sizes)
    losses = random_losses(ffns, seed)
    widths = Spread.over(ffns, losses, multiple_of=1).widths(ratio)
    stream = list(itertools.accumulate(losses[ffn.name].added for ffn in ffns))

    def lost(removed):
        return sum(
            float(losses[ffn.name].elimination.loss_F[:count].sum()) / held
            for ffn, count, held in zip(ffns, removed, stream, strict=True)
        )

    ours = [ffn.rows - widths[ffn.name] for ffn in ffns]
    most = [rows - math.ceil(0.25 * (1 - ratio) * rows) for rows in sizes]
    others = itertools.product(*(range(count + 1) for count in most))
    least = min(lost(removed) for removed in others if sum(removed) == sum(ours))
    assert lost(ours) == pytest.approx(least)


def test_what_the_stream_holds_makes_the_same_error_count_less():
    ffns = ffns_of([64, 64])
    curve = torch.arange(64) + 1.0
    losses = {ffn.name: losses_of(curve, added=10.0) for ffn in ffns}
    first, second = Spread.over(ffns, losses, multiple_of=1).widths(0.3).values()
    assert first > second
    stacks = ("encoder", "decoder")
    apart = [replace(f, name=f"{n}.layers.0.mlp") for f, n in zip(ffns, stacks, strict=True)]
    losses = {ffn.name: losses_of(curve, added=10.0) for ffn in apart}
    assert set(Spread.over(apart, losses, multiple_of=1).widths(0.25).values()) == {48}


def test_rows_go_where_they_are_worth_least_for_the_parameters_they_hold():
    small, large = ffns_of([64])[0], replace(ffns_of([64], columns=40)[0], name="other.0.mlp")
    losses = {ffn.name: losses_of(torch.arange(64) + 1.0) for ffn in (small, large)}
    widths = Spread.over([small, large], losses, multiple_of=1).widths(0.3)
    assert widths["other.0.mlp"] < widths["layers.0.mlp"]
    removed = sum((64 - widths[f.name]) * f.parameters_per_row for f in (small, large))
    assert removed == pytest.approx(0.3 * 64 * 44, abs=20)


def test_an_ffn_that_no_token_reached_takes_the_ratio_as_it_is():
    ffns = ffns_of([64, 64, 64])
    losses = random_losses(ffns, 0)
    losses[ffns[1].name] = losses_of(torch.zeros(64), added=0.0, tokens=0)
    widths = Spread.over(ffns, losses, multiple_of=1).widths(0.25)
    assert widths[ffns[1].name] == 48
    assert sum(widths.values()) == 3 * 48
    unseen = {ffn.name: losses_of(torch.zeros(64), added=0.0, tokens=0) for ffn in ffns}
    assert set(Spread.over(ffns, unseen, multiple_of=8).widths(0.25).values()) == {48}


def test_losses_that_fall_count_as_much_as_those_before_them():
    """A row behind a dear one cannot go alone, so it is no bargain."""
    ffns = ffns_of([8, 8])
    losses = {
        ffns[0].name: losses_of([9.0] + [0.0] * 7),
        ffns[1].name: losses_of([1.0] * 8, added=0.0),
    }
    assert list(Spread.over(ffns, losses, multiple_of=1).widths(0.25).values()) == [8, 4]


def test_even_the_least_important_ffn_keeps_a_quarter_of_its_share():
    ffns = ffns_of([400, 400])
    losses = {
        ffns[0].name: losses_of(torch.zeros(400)),
        ffns[1].name: losses_of(torch.ones(400)),
    }
    assert list(Spread.over(ffns, losses, multiple_of=1).widths(0.6).values()) == [40, 280]


def test_experts_of_one_tensor_get_one_width_and_count_by_the_tokens_they_saw(tiny_model):
    ffns = find_ffns(tiny_model("qwen2_moe"))
    losses = random_losses(ffns, 0, tokens=5)
    widths = Spread.over(ffns, losses, multiple_of=1).widths(0.4)
    for layer in (0, 1):
        found = {w for name, w in widths.items() if f"layers.{layer}.mlp.experts" in name}
        assert len(found) == 1
        assert found.pop() % 8 == 0
    idle = {
        name: replace(loss, tokens=0) if "layers.0.mlp.experts" in name else loss
        for name, loss in losses.items()
    }
    one_idle = idle | {"model.layers.0.mlp.experts.0": losses["model.layers.0.mlp.experts.0"]}
    spread = Spread.over(ffns, one_idle, multiple_of=1)
    assert not spread.unseen
    assert spread.widths(0.4)["model.layers.0.mlp.experts.0"] == 8
    assert len(Spread.over(ffns, idle, multiple_of=1).unseen) == 1


def test_a_multiple_wider_than_an_ffn_is_refused():
    ffns = ffns_of([8, 64])
    with pytest.raises(InvalidArgumentError, match=r"at most the width 8, got 16"):
        Spread.over(ffns, random_losses(ffns, 0), multiple_of=16)


@pytest.mark.parametrize("rows", [100, 384, 1000, 11008])
def test_auto_moves_no_width_by_more_than_a_percentage_point(rows):
    ffns = ffns_of([rows])
    spread = Spread.over(ffns, random_losses(ffns, 0), multiple_of="auto")
    step = int(spread.step_C[0])
    assert step / 2 < 0.01 * rows or step == 1
    assert step == 256 or step >= 0.01 * rows


def test_what_an_ffn_adds_is_the_median_over_its_outputs_of_their_squares(tiny_llama):
    model = tiny_llama()
    ffn = find_ffns(model)[0]
    hidden_TF = torch.randn(500, ffn.rows, generator=torch.Generator().manual_seed(0)).double()
    moments = Moments(hidden_TF.T @ hidden_TF / 500, hidden_TF.mean(0), 500)
    found = ffn_losses(ffn, moments)
    with torch.no_grad():
        squares_D = (hidden_TF @ model.model.layers[0].mlp.down_proj.weight.double().T).square()
    assert found.added == pytest.approx(float(squares_D.sum(0).median()) * 32)
    assert found.tokens == 500
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3] *= 1000  # a massive activation
    assert ffn_losses(ffn, moments).added < 1.2 * found.added
