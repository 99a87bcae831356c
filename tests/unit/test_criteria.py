import pytest
import torch

import yopo
from yopo import InvalidArgumentError, UnsupportedModelError
from yopo.criteria import norm_product, plan_by_criterion, random_rows, row_norm


def test_row_norm_is_the_length_of_a_row_of_the_gate(tiny_llama, tiny_opt):
    model = tiny_llama()
    gate = model.model.layers[1].mlp.gate_proj.weight.detach()
    scores = row_norm(yopo.find_ffns(model)[1])
    assert scores.tolist() == pytest.approx(
        [sum(x * x for x in row) ** 0.5 for row in gate.tolist()]
    )
    model = tiny_opt()
    fc1 = model.model.decoder.layers[0].fc1.weight.detach()
    assert torch.equal(row_norm(yopo.find_ffns(model)[0]), fc1.norm(dim=1))


def test_norm_product_multiplies_the_lengths_of_gate_up_and_down(tiny_llama):
    model = tiny_llama()
    mlp = model.model.layers[0].mlp
    expected = (
        mlp.gate_proj.weight.norm(dim=1)
        * mlp.up_proj.weight.norm(dim=1)
        * mlp.down_proj.weight.norm(dim=0)
    )
    torch.testing.assert_close(norm_product(yopo.find_ffns(model)[0]).exp(), expected.detach())


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2", "phi3", "qwen2_moe", "gpt_oss", "t5"])
@pytest.mark.parametrize("criterion", [row_norm, norm_product], ids=["row_norm", "norm_product"])
def test_the_rows_of_largest_score_are_kept(tiny_model, kind, criterion):
    model = tiny_model(kind)
    plan = plan_by_criterion(model, 0.4, criterion=criterion)
    for ffn in yopo.find_ffns(model):
        kept, scores = plan.kept[ffn.name], criterion(ffn)
        dropped = torch.ones(ffn.rows, dtype=torch.bool).scatter(0, kept, False)
        assert scores[kept].min() >= scores[dropped].max()


def test_rows_of_zeros_go_first_and_cause_no_nan(tiny_llama):
    model = tiny_llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight[::4] = 0
            layer.mlp.down_proj.weight[:, ::8] = 0
    for criterion in (row_norm, norm_product):
        assert not any(torch.isnan(criterion(ffn)).any() for ffn in yopo.find_ffns(model))
        plan = plan_by_criterion(model, 0.25, criterion=criterion)
        assert all((kept % 4 > 0).all() for kept in plan.kept.values())


def test_random_rows_are_the_same_for_the_same_seed_and_leave_the_global_generator(tiny_llama):
    model = tiny_llama()
    before = torch.get_rng_state()
    one, same, other = (
        plan_by_criterion(model, 0.3, criterion=random_rows(seed)) for seed in (1, 1, 2)
    )
    assert one == same
    assert one != other
    assert not torch.equal(*one.kept.values())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_half_precision_model_is_scored_in_single_precision(tiny_llama):
    model = tiny_llama(dtype=torch.float16)
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight.mul_(1e3)
    ffn = yopo.find_ffns(model)[0]
    assert row_norm(ffn).dtype == torch.float32
    assert torch.isfinite(norm_product(ffn)).all()


def test_any_function_of_an_ffn_is_a_criterion(tiny_llama):
    plan = plan_by_criterion(tiny_llama(), 0.5, criterion=lambda ffn: torch.arange(ffn.rows))
    assert all(kept.tolist() == list(range(40, 80)) for kept in plan.kept.values())
    assert plan.ratio == 0.5


@pytest.mark.parametrize(
    ("scores", "told"),
    [
        (torch.ones(79), r"torch\.float32 of shape \(79,\)\."),
        (torch.ones(80, 1), r"torch\.float32 of shape \(80, 1\)\."),
        (torch.full((80,), torch.nan), r"torch\.float32 of shape \(80,\) with NaN\."),
        ([1.0] * 80, r"a list\."),
    ],
    ids=["too few", "a matrix", "nan", "a list"],
)
def test_a_criterion_that_gives_no_score_for_each_row_is_refused(tiny_llama, scores, told):
    with pytest.raises(
        InvalidArgumentError,
        match=r"`criterion` must return one score, no NaN, for each of the 80 rows of "
        rf"`model\.layers\.0\.mlp`, got {told}$",
    ):
        plan_by_criterion(tiny_llama(), 0.5, criterion=lambda ffn: scores)


def test_bad_ratios_and_bad_weights_are_refused_before_anything_is_scored(tiny_llama):
    def unused(ffn):
        raise AssertionError("scored")

    model = tiny_llama()
    with pytest.raises(InvalidArgumentError, match=r"`ratio` must be in \[0, 1\), got 1\.2\."):
        plan_by_criterion(model, 1.2, criterion=unused)
    with pytest.raises(
        InvalidArgumentError, match=r"`ratio=0\.99` keeps 0 of 80 rows; use at most"
    ):
        plan_by_criterion(model, 0.99, criterion=unused)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    with pytest.raises(
        UnsupportedModelError, match=r"`model\.layers\.1\.mlp` has weights that are NaN"
    ):
        plan_by_criterion(model, 0.3, criterion=unused)


def test_a_criterion_of_random_rows_serves_twice_and_draws_others_in_each_ffn(tiny_llama):
    model = tiny_llama()
    criterion = random_rows(3)
    plans = [
        plan_by_criterion(model, 0.5, criterion=used)
        for used in (criterion, criterion, random_rows(3), random_rows(4))
    ]
    first, second = plans[0].kept.values()
    assert not torch.equal(first, second)
    for name, kept in plans[0].kept.items():
        assert torch.equal(kept, plans[1].kept[name])
        assert torch.equal(kept, plans[2].kept[name])
        assert not torch.equal(kept, plans[3].kept[name])
