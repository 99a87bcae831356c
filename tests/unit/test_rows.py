"""Symbolic metrics of FFN rows: what their terminals are, and which rows they keep."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import yopo
from yopo import InvalidArgumentError
from yopo.criteria import norm_product, plan_by_criterion, row_norm
from yopo.symbolic import Expression
from yopo.symbolic.growing import random_expression
from yopo.symbolic.names import ROW_TERMINALS
from yopo.symbolic.rows import row_criterion, row_scores, row_terminals

AGGREGATES = {
    "sum": lambda values: values.sum(axis=1),
    "mean": lambda values: values.mean(axis=1),
    "max": lambda values: values.max(axis=1),
    "norm": lambda values: np.sqrt((values**2).sum(axis=1)),
}


def parsed(text):
    return Expression.parse(text)


def terminals_by_hand(gate, up, down, gain):
    """Return the terminals of three matrices `(F, D)`, in float64, by NumPy alone."""
    gate, up, down, gain = (tensor.detach().double().numpy() for tensor in (gate, up, down, gain))
    gate, up = gate * gain, up * gain
    spanning = np.linalg.svd(gate, full_matrices=False)[0]
    found = {
        "gate": abs(gate),
        "up": abs(up),
        "down": abs(down),
        "gate_norm": np.sqrt((gate**2).sum(axis=1, keepdims=True)),
        "up_norm": np.sqrt((up**2).sum(axis=1, keepdims=True)),
        "down_norm": np.sqrt((down**2).sum(axis=1, keepdims=True)),
        "leverage": (spanning**2).sum(axis=1, keepdims=True),
    }
    return {name: value / np.sqrt((value**2).mean()) for name, value in found.items()}


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == torch.float32, name
        assert found[name].shape == value.shape, name
        np.testing.assert_allclose(found[name].numpy(), value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_terminals_of_a_gated_ffn_have_the_gain_of_the_norm_folded_in(tiny_llama):
    model = tiny_llama()
    layer = model.model.layers[1]
    mlp, gain = layer.mlp, layer.post_attention_layernorm.weight
    assert (gain - 1).abs().max() > 0.1
    assert_close(
        row_terminals(yopo.find_ffns(model)[1], ROW_TERMINALS),
        terminals_by_hand(mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T, gain),
    )


def test_an_ffn_with_one_expand_matrix_has_it_as_gate_and_ones_as_up(tiny_opt):
    model = tiny_opt()
    layer = model.model.decoder.layers[0]
    gain = layer.final_layer_norm.weight
    ones = torch.ones_like(layer.fc1.weight)
    expected = terminals_by_hand(layer.fc1.weight, ones, layer.fc2.weight.T, gain)
    expected |= {"up": np.ones((96, 32)), "up_norm": np.ones((96, 1))}
    assert_close(row_terminals(yopo.find_ffns(model)[0], ROW_TERMINALS), expected)


def test_a_fused_pair_is_taken_apart(tiny_model):
    model = tiny_model("phi3")
    layer = model.model.layers[0]
    gate, up = layer.mlp.gate_up_proj.weight.chunk(2)
    down, gain = layer.mlp.down_proj.weight.T, layer.post_attention_layernorm.weight
    assert_close(
        row_terminals(yopo.find_ffns(model)[0], ROW_TERMINALS),
        terminals_by_hand(gate, up, down, gain),
    )


def test_each_expert_of_one_tensor_has_terminals_of_its_own(tiny_model):
    model = tiny_model("gpt_oss")
    layer = model.model.layers[1]
    experts, gain = layer.mlp.experts, layer.post_attention_layernorm.weight
    ffn = next(ffn for ffn in yopo.find_ffns(model) if ffn.name.endswith("1.mlp.experts.2"))
    pairs, down = experts.gate_up_proj[2].T, experts.down_proj[2]
    assert_close(
        row_terminals(ffn, ROW_TERMINALS),
        terminals_by_hand(pairs[0::2], pairs[1::2], down, gain),
    )


def test_leverage_says_nothing_where_rows_are_no_more_than_columns(tiny_llama):
    for rows in (24, 32):
        ffn = yopo.find_ffns(tiny_llama(intermediate_size=rows))[0]
        assert row_terminals(ffn, ["leverage"])["leverage"].tolist() == [[1.0]] * rows


def test_leverage_of_a_matrix_that_is_not_of_full_rank_is_that_of_its_row_space(tiny_llama):
    model = tiny_llama()
    gate = model.model.layers[0].mlp.gate_proj.weight
    with torch.no_grad():
        gate[:, 16:] = gate[:, :16]
        model.model.layers[0].post_attention_layernorm.weight.fill_(1.0)
    spanning = torch.linalg.svd(gate.detach().double(), full_matrices=False)[0][:, :16]
    found = row_terminals(yopo.find_ffns(model)[0], ["leverage"])["leverage"]
    expected = spanning.square().sum(dim=1)
    expected /= expected.square().mean().sqrt()
    torch.testing.assert_close(found[:, 0].double(), expected, rtol=1e-3, atol=1e-4)


def test_only_what_is_asked_for_is_computed(tiny_llama):
    ffn = yopo.find_ffns(tiny_llama())[0]
    assert set(row_terminals(ffn, ["up", "down_norm"])) == {"up", "down_norm"}
    assert row_terminals(ffn, []) == {}


def test_a_half_precision_model_has_terminals_in_single_precision(tiny_llama):
    model = tiny_llama(dtype=torch.float16)
    found = row_terminals(yopo.find_ffns(model)[0], ROW_TERMINALS)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    weight = model.model.layers[0].mlp.down_proj.weight.detach().float().abs().T
    torch.testing.assert_close(found["down"], weight / weight.square().mean().sqrt())


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("shape", ["entries", "rows"])
def test_scores_are_the_values_of_the_expression_made_one_a_row(tiny_llama, aggregate, shape):
    ffn = yopo.find_ffns(tiny_llama())[0]
    text = {"entries": "sub(sqr(gate), mul(up, down_norm))", "rows": "sub(leverage, down_norm)"}
    found = row_scores(ffn, parsed(text[shape]), aggregate=aggregate)
    known = {name: t.double().numpy() for name, t in row_terminals(ffn, ROW_TERMINALS).items()}
    if shape == "entries":
        values = known["gate"] ** 2 - known["up"] * known["down_norm"]
    else:
        values = known["leverage"] - known["down_norm"]
    assert found.dtype == torch.float64
    assert found.shape == (80,)
    np.testing.assert_allclose(found.numpy(), AGGREGATES[aggregate](values), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "kind", ["llama", "opt", "gpt2", "phi", "phi3", "qwen2_moe", "gpt_oss", "t5"]
)
def test_one_formula_prunes_every_layout(tiny_model, kind, logits):
    model = tiny_model(kind)
    criterion = row_criterion(parsed("mul(mul(gate, up_norm), sqrt(down_norm))"))
    plan = plan_by_criterion(model, 0.4, criterion=criterion)
    for ffn in yopo.find_ffns(model):
        kept, scores = plan.kept[ffn.name], criterion(ffn)
        dropped = torch.ones(ffn.rows, dtype=torch.bool).scatter(0, kept, False)
        assert scores[kept].min() >= scores[dropped].max()
    yopo.apply_plan(model, plan)
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2"])
def test_the_criteria_made_by_hand_are_formulas_where_norms_have_no_gain(tiny_model, kind):
    model = tiny_model(kind)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and name.endswith("weight"):
                parameter.fill_(1.0)
    for text, known in (
        ("gate_norm", row_norm),
        ("mul(mul(gate_norm, up_norm), down_norm)", norm_product),
    ):
        plans = [
            plan_by_criterion(model, 0.3, criterion=criterion)
            for criterion in (row_criterion(parsed(text)), known)
        ]
        assert plans[0] == plans[1]


def test_a_factor_that_moves_from_the_norm_into_the_matrices_changes_nothing(tiny_llama):
    model, other = tiny_llama(), tiny_llama()
    factor = torch.exp2(torch.arange(32) % 4)
    with torch.no_grad():
        for layer in other.model.layers:
            layer.post_attention_layernorm.weight.div_(factor)
            layer.mlp.gate_proj.weight.mul_(factor)
            layer.mlp.up_proj.weight.mul_(factor)
    formula = row_criterion(parsed("mul(add(gate, up_norm), mms(down))"), "max")
    for criterion, is_same in ((formula, True), (row_norm, False)):
        plans = [plan_by_criterion(m, 0.3, criterion=criterion) for m in (model, other)]
        assert (plans[0] == plans[1]) is is_same


@pytest.fixture(scope="module")
def two_ffns(tiny_llama, tiny_opt):
    return [yopo.find_ffns(make(num_hidden_layers=1))[0] for make in (tiny_llama, tiny_opt)]


@given(seed=st.integers(0, 10**6), aggregate=st.sampled_from(sorted(AGGREGATES)))
def test_any_expression_gives_finite_scores_or_says_why_not(two_ffns, seed, aggregate):
    expression = random_expression(random.Random(seed), terminals=ROW_TERMINALS)
    for ffn in two_ffns:
        try:
            scores = row_scores(ffn, expression, aggregate=aggregate)
        except InvalidArgumentError as error:
            assert "cannot choose rows" in str(error)  # noqa: PT017
        else:
            assert torch.isfinite(scores).all()
            assert len(scores.unique()) > 1


@pytest.mark.parametrize(
    ("kind", "text"), [("llama", "sub(gate, gate)"), ("opt", "up"), ("opt", "tanh(up_norm)")]
)
def test_scores_that_are_all_the_same_are_refused(tiny_model, kind, text):
    ffn = yopo.find_ffns(tiny_model(kind))[0]
    with pytest.raises(
        InvalidArgumentError,
        match=r"cannot choose rows of `model\..*`: it scores all rows the same",
    ):
        row_scores(ffn, parsed(text))


def test_scores_that_are_not_finite_are_refused(tiny_llama):
    model = tiny_llama()
    model.model.layers[0].mlp.gate_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(InvalidArgumentError, match=r"its scores are not finite"):
        row_scores(yopo.find_ffns(model)[0], parsed("gate_norm"))


@pytest.mark.parametrize("factor", [1e-25, 1e-3, 1e3, 1e25])
def test_a_formula_means_the_same_whatever_the_weights_are_measured_in(tiny_llama, factor):
    model, other = tiny_llama(), tiny_llama()
    for part in ("gate_proj", "down_proj"):
        other.model.layers[0].mlp.get_submodule(part).weight.data *= factor
    formula = parsed("add(exp(gate), sub(mul(gate_norm, leverage), tanh(down)))")
    scores = [row_scores(yopo.find_ffns(m)[0], formula) for m in (model, other)]
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-4)


def test_an_expression_over_single_weights_is_sent_to_where_it_belongs(tiny_llama):
    ffn = yopo.find_ffns(tiny_llama())[0]
    for use in (row_criterion, lambda expression: row_scores(ffn, expression)):
        with pytest.raises(
            InvalidArgumentError,
            match=r"`G` is no terminal of rows, which are gate, up, .*`yopo\.MetricPruner`",
        ):
            use(parsed("mul(abs(mul(W, W)), mms(G))"))
    with pytest.raises(InvalidArgumentError, match=r"`fc1` is no terminal of rows") as error:
        row_terminals(ffn, ["fc1"])
    assert "MetricPruner" not in str(error.value)


def test_an_aggregate_that_does_not_exist_is_refused_at_once(tiny_llama):
    told = r'`aggregate` must be one of "sum", "mean", "max", "norm", got \'median\'\.'
    with pytest.raises(InvalidArgumentError, match=told):
        row_criterion(parsed("gate"), "median")
    with pytest.raises(InvalidArgumentError, match=told):
        row_scores(yopo.find_ffns(tiny_llama())[0], parsed("gate"), aggregate="median")


def test_matrices_of_different_widths_combine_only_by_their_norms(tiny_opt):
    model = tiny_opt()
    layer = model.model.decoder.layers[0]
    layer.fc2 = torch.nn.Linear(96, 24)
    ffn = yopo.find_ffns(model, prove_unknown=False)[0]
    with pytest.raises(InvalidArgumentError, match=r"different widths \(`down` 24, `gate` 32\)"):
        row_scores(ffn, parsed("mul(gate, down)"))
    assert row_scores(ffn, parsed("mul(gate, down_norm)")).shape == (96,)


def test_nothing_changes_by_scoring(tiny_llama):
    model = tiny_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for name in ROW_TERMINALS:
        row_scores(yopo.find_ffns(model)[0], parsed(name))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
