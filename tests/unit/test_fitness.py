"""Perplexity of a model that an expression has pruned, as a fitness."""

import copy
import math
import pickle

import pytest
import torch

import yopo
from yopo import InvalidArgumentError, MetricPruner, UnsupportedModelError
from yopo.symbolic import (
    EvolutionSettings,
    Expression,
    PerplexityFitness,
    collect_statistics,
    evolve,
)

IDS = torch.arange(320).view(20, 16) * 7 % 60 + 3
TEST = torch.arange(160).view(10, 16) * 11 % 60 + 3


@pytest.fixture
def model(tiny_llama):
    return tiny_llama()


@pytest.fixture
def statistics(model):
    return collect_statistics(model, data=IDS)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("text", ["mul(W, sqrt(X))", "mul(abs(mul(W, W)), mms(G))"])
def test_the_fitness_is_the_perplexity_of_the_pruned_model(model, statistics, text, pattern):
    before = copy.deepcopy(model.state_dict())
    fitness = PerplexityFitness(model, statistics, data=TEST, pattern=pattern)
    found = fitness(Expression.parse(text))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    pruned = MetricPruner(text, statistics=statistics).prune(copy.deepcopy(model), pattern=pattern)
    assert found == yopo.perplexity(pruned, TEST.flatten(), window=16)


def test_expressions_of_one_mask_share_a_signature(model, statistics):
    fitness = PerplexityFitness(model, statistics, data=TEST)
    wanda, same, other = (
        fitness.signature(Expression.parse(text))
        for text in ("mul(W, sqrt(X))", "log(mul(X, sqr(W)))", "mul(W, X)")
    )
    assert wanda == same != other
    assert fitness.signature(Expression.parse("sub(W, W)")) is None


def test_the_fingerprint_tells_searches_apart(model, statistics):
    prints = {
        PerplexityFitness(model, statistics, **changes).fingerprint
        for changes in (
            {"data": TEST},
            {"data": IDS},
            {"data": TEST, "sparsity": 0.6},
            {"data": TEST, "pattern": "2:4"},
        )
    }
    assert len(prints) == 4


def test_statistics_of_other_texts_make_another_search(model):
    own, again, another = (
        PerplexityFitness(
            model, collect_statistics(model, terminals=["X"], data=ids), data=TEST
        ).fingerprint
        for ids in (IDS, IDS, IDS.flip(1))
    )
    assert own == again != another


def test_a_pickled_fitness_measures_the_same(model, statistics):
    fitness = PerplexityFitness(model, statistics, data=TEST)
    other = pickle.loads(pickle.dumps(fitness))
    metric = Expression.parse("mul(W, G)")
    assert other(metric) == fitness(metric)
    assert other.signature(metric) == fitness.signature(metric)


def test_metrics_can_be_evolved_by_it_with_no_data_at_all(model):
    statistics = collect_statistics(model, sequences=8, length=12)
    fitness = PerplexityFitness(model, statistics, sequences=4, length=12)
    settings = EvolutionSettings(population=4, iterations=4, parents=2)
    found = evolve(fitness, settings=settings, seed=0)
    assert len(found.history) == len(found.random) == 8
    assert found.best.fitness == fitness(found.expression) < math.inf


def test_a_search_over_terminals_that_were_not_collected_is_refused_at_once(model):
    statistics = collect_statistics(model, terminals=["G"], data=IDS)
    fitness = PerplexityFitness(model, statistics, data=TEST)
    for use in (fitness, fitness.signature):
        with pytest.raises(InvalidArgumentError, match=r"`mul\(W, X\)` needs X of .* only G, W\."):
            use(Expression.parse("mul(W, X)"))
    settings = EvolutionSettings(population=8, iterations=0, random_search=False)
    with pytest.raises(InvalidArgumentError, match=r"needs X of .* only G, W\."):
        evolve(fitness, settings=settings)
    found = evolve(fitness, settings=settings, terminals=("W", "G"))
    assert len(found.history) == 8


@pytest.mark.parametrize(
    ("damage", "told"),
    [(torch.Tensor.zero_, "up_proj.weight` is zero everywhere"), (None, "needs X of .*up_proj")],
)
def test_what_one_matrix_lacks_is_told_and_not_taken_for_bad_formulas(tiny_llama, damage, told):
    model = tiny_llama(num_hidden_layers=4)
    statistics = collect_statistics(model, terminals=["X"], data=IDS)
    lacking = statistics.activations.pop("model.layers.1.mlp.up_proj.weight")
    if damage is not None:
        statistics.activations["model.layers.1.mlp.up_proj.weight"] = damage(lacking)
    fitness = PerplexityFitness(model, statistics, data=TEST)
    with pytest.raises(InvalidArgumentError, match=told):
        fitness.signature(Expression.parse("mul(W, X)"))


def test_what_does_not_fit_is_told(model, statistics, tiny_llama):
    with pytest.raises(InvalidArgumentError, match="a model with other weights"):
        PerplexityFitness(tiny_llama(seed=1), statistics)
    with pytest.raises(InvalidArgumentError, match="groups of 5 do not divide"):
        PerplexityFitness(model, statistics, pattern="2:5")
    with pytest.raises(InvalidArgumentError, match=r"`statistics` must be .*, got a dict"):
        PerplexityFitness(model, {})
    fitness = PerplexityFitness(model, statistics, data=TEST)
    with pytest.raises(InvalidArgumentError, match="looks at `gate` of an FFN"):
        fitness(Expression.parse("gate"))
    with pytest.raises(InvalidArgumentError, match="the same score"):
        fitness(Expression.parse("sub(W, W)"))


def test_a_model_without_a_perplexity_is_refused(tiny_model):
    model = tiny_model("t5")
    statistics = collect_statistics(model, terminals=["X"], data=IDS)
    with pytest.raises(UnsupportedModelError, match="T5ForConditionalGeneration has no perplexity"):
        PerplexityFitness(model, statistics, data=TEST)
