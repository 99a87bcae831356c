"""What a symbolic metric of rows is worth, by spectra and by the model's own text."""

import math
import pickle

import pytest
import torch
from scipy import stats

import yopo
from yopo import InvalidArgumentError, UnsupportedModelError
from yopo.criteria import plan_by_criterion
from yopo.decision import write_restored
from yopo.evidence import Evidence
from yopo.restore import restore_contract
from yopo.symbolic import Expression
from yopo.symbolic.row_fitness import DivergenceFitness, SpectralFitness
from yopo.symbolic.rows import row_criterion
from yopo.writing import write_tokens

SHORT = {"max_position_embeddings": 32}
"""Whoever can read no more writes no more, which is what takes time here."""

FORMULA = Expression.parse("mul(add(gate, up_norm), down_norm)")
CONSTANT = Expression.parse("sub(gate, gate)")


@pytest.fixture(scope="module", params=["spectral", "divergence"])
def make(request, tiny_model):
    """Return the function that makes a fitness of either kind, of a model as small as can be."""
    kind = {"spectral": SpectralFitness, "divergence": DivergenceFitness}[request.param]

    def fitness(ratio=0.3, *, model=None, **arguments):
        return kind(model or tiny_model("llama", **SHORT), ratio, **arguments)

    return fitness


@pytest.fixture(scope="module")
def fitness(make):
    return make()


@pytest.mark.parametrize("kind", ["llama", "opt", "phi3", "gpt_oss"])
@pytest.mark.parametrize("ratio", [0.3, 0.7])
def test_spectral_fitness_is_the_mean_distance_and_a_millionth_to_break_ties(
    tiny_model, kind, ratio
):
    model = tiny_model(kind)
    plan = plan_by_criterion(model, ratio, criterion=row_criterion(FORMULA))
    distances, log_distances = [], []
    for ffn in yopo.find_ffns(model):
        gate = ffn.expand_weights()[0].double()
        dense, part = (
            torch.linalg.svdvals(matrix).numpy() for matrix in (gate, gate[plan.kept[ffn.name]])
        )
        distances.append(stats.ks_2samp(dense, part).statistic)
        logs = [[math.log(value) for value in values] for values in (dense, part)]
        log_distances.append(stats.wasserstein_distance(*logs))
    ks, tie = (sum(found) / len(found) for found in (distances, log_distances))
    found = SpectralFitness(model, ratio)(FORMULA)
    assert found == pytest.approx(ks + 1e-6 * tie / (1 + tie), abs=1e-9)
    assert ks < found < ks + 1e-6


def test_the_tie_break_prefers_the_spectrum_whose_logarithms_are_nearer(tiny_llama):
    """A third of the rows is as far from all at either end, but logarithms are denser above."""
    model = tiny_llama(intermediate_size=24)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight.copy_(torch.diag(torch.arange(1.0, 33.0))[:24])
            layer.post_attention_layernorm.weight.fill_(1.0)
    fitness = SpectralFitness(model, 2 / 3, multiple_of=1)
    large, small = (fitness(Expression.parse(text)) for text in ("gate_norm", "neg(gate_norm)"))
    assert large == pytest.approx(2 / 3, abs=1e-6)
    assert small == pytest.approx(2 / 3, abs=1e-6)
    assert large < small


@pytest.mark.parametrize("kind", ["llama", "opt"])
@pytest.mark.parametrize("restore", [False, True])
def test_divergence_fitness_is_that_of_the_model_which_is_really_cut(tiny_model, kind, restore):
    model, cut = tiny_model(kind, **SHORT), tiny_model(kind, **SHORT)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = DivergenceFitness(model, 0.4, restore=restore, seed=3)(FORMULA)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    plan = plan_by_criterion(cut, 0.4, criterion=row_criterion(FORMULA))
    ffns = yopo.find_ffns(cut)
    restored = {
        ffn.name: restore_contract(
            moments, ffn.contract_weight(), ffn.contract_bias(), plan.kept[ffn.name],
            dtype=torch.float32,
        )
        for ffn, moments in Evidence("self", seed=3).moments(cut, ffns)
    }  # fmt: skip
    yopo.apply_plan(cut, plan, ffns=ffns)
    write_restored(ffns, restored if restore else {})
    ids = write_tokens(model, sequences=8, seed=4)["input_ids"]
    with torch.no_grad():
        p, q = (m(input_ids=ids).logits.double().log_softmax(-1) for m in (model, cut))
    assert found == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)


def test_expressions_that_keep_the_same_rows_have_one_signature_and_fitness(fitness):
    one, same, other = (
        Expression.parse(text) for text in ("gate_norm", "exp(sqrt(gate_norm))", "neg(gate_norm)")
    )
    signature = fitness.signature(one)
    assert isinstance(signature, bytes)
    assert fitness.signature(same) == signature
    assert fitness.signature(other) != signature
    assert fitness(one) == fitness(same) != fitness(other)


def test_scores_that_choose_nothing_have_no_signature_and_no_worth(fitness):
    assert fitness.signature(CONSTANT) is None
    assert fitness(CONSTANT) == math.inf


def test_matrices_of_different_widths_that_are_combined_choose_nothing(tiny_opt):
    model = tiny_opt()
    for layer in model.model.decoder.layers:
        layer.fc2 = torch.nn.Linear(96, 24)
    fitness = SpectralFitness(model, 0.3)
    assert fitness.signature(Expression.parse("mul(gate, down)")) is None
    assert fitness.signature(Expression.parse("mul(gate, down_norm)")) is not None


def test_the_aggregate_decides_what_is_kept(make):
    formula = Expression.parse("gate")
    sums, largest = make(), make(aggregate="max")
    assert sums.signature(formula) != largest.signature(formula)
    assert sums(formula) != largest(formula)


def test_a_fitness_can_be_sent_to_another_process(fitness):
    copy = pickle.loads(pickle.dumps(fitness))
    assert copy.fingerprint == fitness.fingerprint
    assert copy.signature(FORMULA) == fitness.signature(FORMULA)
    assert copy(FORMULA) == fitness(FORMULA)


def test_a_fitness_is_known_by_model_ratio_and_whatever_else_decides(make, tiny_llama):
    known = make().fingerprint
    assert make().fingerprint == known
    others = [
        make(0.4),
        make(aggregate="max"),
        make(multiple_of=1),
        make(model=tiny_llama(seed=1, **SHORT)),
    ]
    assert len({known, *(other.fingerprint for other in others)}) == 5
    assert "spectral" in known or "divergence" in known


def test_the_text_and_restoring_are_part_of_what_divergence_is_known_by(tiny_llama):
    model = tiny_llama(**SHORT)
    found = [
        DivergenceFitness(model, 0.3, **arguments).fingerprint
        for arguments in ({}, {"seed": 1}, {"restore": True})
    ]
    assert len(set(found)) == 3


def test_expressions_over_single_weights_are_refused(fitness):
    for use in (fitness, fitness.signature):
        with pytest.raises(InvalidArgumentError, match=r"`W` is no terminal of rows"):
            use(Expression.parse("abs(W)"))


def test_bad_arguments_are_refused_before_anything_is_computed(make):
    with pytest.raises(InvalidArgumentError, match=r"`ratio` must be in \[0, 1\), got 1\.5\."):
        make(1.5)
    with pytest.raises(InvalidArgumentError, match=r"`ratio=0` removes no row"):
        make(0)
    with pytest.raises(InvalidArgumentError, match=r"`aggregate` must be one of"):
        make(aggregate="median")


def test_a_model_that_cannot_write_is_refused_by_divergence_alone(tiny_llama):
    headless = tiny_llama().model
    assert SpectralFitness(headless, 0.3)(FORMULA) < 1
    with pytest.raises(UnsupportedModelError, match=r"predicts no tokens"):
        DivergenceFitness(headless, 0.3)
