"""The reward that compares predictions: what it is, and that it leaves the model as it was."""

import math

import pytest
import torch

import yopo
from yopo.adapters import find_ffns
from yopo.divergence import Divergence
from yopo.evidence import Evidence
from yopo.restore import restore_contract
from yopo.writing import write_tokens


def drawn(ffns, *, draws=2, keep=20):
    generator = torch.Generator().manual_seed(3)
    return {
        ffn.name: torch.stack(
            [torch.randperm(ffn.rows, generator=generator)[:keep].sort().values] * draws
        )
        for ffn in ffns
    }


def divergence_of(dense, pruned, ids):
    """The definition, token by token: sum over the vocabulary of p log(p / q)."""
    total = 0.0
    with torch.no_grad():
        p, q = (model(input_ids=ids).logits.double().softmax(-1) for model in (dense, pruned))
    for row in range(len(ids)):
        for token in range(ids.shape[1]):
            total += float((p[row, token] * (p[row, token] / q[row, token]).log()).sum())
    return total / ids.numel()


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("restores", [False, True])
def test_the_reward_is_that_of_the_model_which_is_really_cut(tiny_model, kind, restores):
    model = tiny_model(kind)
    ffns = find_ffns(model)
    moments = {ffn.name: found for ffn, found in Evidence("weights", seed=0).moments(model, ffns)}
    kept = drawn(ffns)
    reward = Divergence(model, ffns, moments if restores else None, seed=0)
    earned = reward(kept)
    assert earned.shape == (2,)
    assert earned[0] == earned[1]

    cut = tiny_model(kind)
    own = find_ffns(cut)
    for ffn in own:
        rows = kept[ffn.name][0]
        if restores:
            found = restore_contract(
                moments[ffn.name], ffn.contract_weight(), ffn.contract_bias(), rows,
                dtype=torch.float32,
            )  # fmt: skip
            with torch.no_grad():
                ffn.contract_weight()[rows] = found.contract_KD
                if found.bias_D is not None:
                    ffn.contract_bias().copy_(found.bias_D)
    plan = yopo.PruningPlan(
        kept={name: rows[0] for name, rows in kept.items()},
        rows={ffn.name: ffn.rows for ffn in own},
        ratio=0.5,
    )
    yopo.apply_plan(cut, plan)
    ids = write_tokens(model, sequences=8, length=256, seed=1)["input_ids"]
    assert math.exp(-float(earned[0])) == pytest.approx(divergence_of(model, cut, ids), rel=1e-3)


def test_the_model_is_as_it_was_also_after_a_failure(tiny_model, monkeypatch):
    model = tiny_model("opt")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ffns = find_ffns(model)
    moments = {ffn.name: found for ffn, found in Evidence("weights", seed=0).moments(model, ffns)}
    reward = Divergence(model, ffns, moments, seed=0)
    reward(drawn(ffns, draws=1))

    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(KeyboardInterrupt):
        reward(drawn(ffns, draws=1))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_model_that_loses_nothing_earns_the_most(tiny_model):
    model = tiny_model("llama")
    ffns = find_ffns(model)
    reward = Divergence(model, ffns, None, seed=0)
    everything = {ffn.name: torch.arange(ffn.rows)[None] for ffn in ffns}
    assert reward(everything).item() == pytest.approx(-math.log(1e-12))
    assert reward(drawn(ffns, draws=1)).item() < 10


def test_a_policy_learns_from_it_and_never_ends_below_the_closed_form(tiny_model):
    model = tiny_model("llama")
    ffns = find_ffns(model)
    pruner = yopo.PolicyPruner(
        reward="divergence", evidence="weights", episodes=3, samples=4, ratio=0.5, multiple_of=1
    ).fit(model)
    closed = yopo.PolicyPruner(evidence="weights", ratio=0.5, multiple_of=1).fit(model)
    moments = {ffn.name: found for ffn, found in Evidence("weights", seed=0).moments(model, ffns)}
    reward = Divergence(model, ffns, moments, seed=0)
    learned, start = (
        reward({name: rows[None] for name, rows in tried.plan(model).kept.items()}).item()
        for tried in (pruner, closed)
    )
    assert learned >= start - 1e-6
    assert len(pruner.history) == 3
    assert pruner.history[0].ks == ()


def test_a_model_without_a_head_is_refused_with_a_way_out(tiny_model):
    headless = tiny_model("llama").model
    pruner = yopo.PolicyPruner(reward="divergence", evidence="weights")
    with pytest.raises(yopo.UnsupportedModelError, match="reward='output'"):
        pruner.fit(headless)
