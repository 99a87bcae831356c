"""Decisions that come one at a time, from models in memory and from such as lie elsewhere."""

import gc
import weakref

import pytest
import torch

import yopo
from yopo.decision import decide, decisions
from yopo.evidence import Evidence

TOKENS = torch.arange(8 * 24).view(8, 24) * 11 % 60 + 3
RECIPES = {
    "lean": yopo.PolicyPruner.lean,
    "weights": lambda: yopo.PolicyPruner(evidence="weights"),
    "tokens": lambda: yopo.PolicyPruner(evidence=TOKENS),
    "spectral": lambda: yopo.PolicyPruner(reward="spectral", restore=False, episodes=1),
}
EVERY = pytest.mark.parametrize("make", RECIPES.values(), ids=RECIPES)


def arguments_of(pruner, model, *, uncut=()):
    ffns = yopo.find_ffns(model)
    widths = {ffn.name: ffn.rows if ffn.name in uncut else ffn.rows // 2 for ffn in ffns}
    common = {"policy": pruner._policy, "evidence": pruner._evidence, "widths": widths}
    common |= {"restore": pruner._recipe.restore, "generator": None}
    return (model, ffns), common


@EVERY
def test_what_comes_one_at_a_time_is_what_is_decided(tiny_model, make):
    model = tiny_model("llama", num_hidden_layers=4)
    uncut = ["model.layers.1.mlp"]
    given, common = arguments_of(make().fit(model), model, uncut=uncut)
    whole = decide(*given, **common, ratio=0.5)
    found = list(decisions(*given, **common))
    assert [name for name, *_ in found] == [f"model.layers.{layer}.mlp" for layer in (0, 2, 3)]
    assert whole.plan.kept.keys() == {*uncut, *(name for name, *_ in found)}
    assert whole.plan.kept[uncut[0]].tolist() == list(range(80))
    for name, kept, restored in found:
        assert torch.equal(kept, whole.plan.kept[name])
        assert len(kept) == 40
        if restored is None:
            assert name not in whole.restored
        else:
            assert torch.equal(restored.contract_KD, whole.restored[name].contract_KD)


@EVERY
def test_what_was_handed_over_is_not_held_on_to(tiny_model, make):
    model = tiny_model("opt", num_hidden_layers=4)
    pruner = make().fit(model)
    given, common = arguments_of(pruner, model)
    alive = []
    for name, kept, restored in decisions(*given, **common):
        gc.collect()
        assert [ref() for ref in alive if ref() is not None] == []
        alive += [weakref.ref(kept), *([weakref.ref(restored.contract_KD)] if restored else [])]
        del name, kept, restored
    assert alive


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "opt", "phi3", "gpt2", "t5", "qwen2_moe", "gpt_oss"])
@pytest.mark.parametrize("recipe", ["lean", "weights"])
def test_a_model_that_lies_elsewhere_is_decided_on_as_in_memory(
    tiny_model, skeleton_of, kind, recipe, dtype
):
    model = tiny_model(kind, dtype=dtype)
    pruner = RECIPES[recipe]().fit(model)
    skeleton = skeleton_of(model)
    given, common = arguments_of(pruner, model)
    expected = list(decisions(*given, **common))
    given, common = arguments_of(RECIPES[recipe]().fit(skeleton), skeleton)
    found = list(decisions(*given, **common))
    assert len(found) == len(expected) == len(yopo.find_ffns(model))
    for (name, kept, restored), (other, rows, matrix) in zip(found, expected, strict=True):
        assert name == other
        assert torch.equal(kept, rows)
        assert torch.equal(restored.contract_KD, matrix.contract_KD)
        assert restored.contract_KD.dtype == dtype
        assert (restored.bias_D is None) == (matrix.bias_D is None)
        if matrix.bias_D is not None:
            assert torch.equal(restored.bias_D, matrix.bias_D)
    assert all(parameter.is_meta for parameter in skeleton.parameters())


def test_wide_models_imagine_as_many_inputs_as_they_are_wide(tiny_model, monkeypatch):
    seen = []
    real = yopo.decision.read_units

    def read_units(model, ffn, *inputs):
        seen.append([tuple(part.shape) for part in inputs])
        return real(model, ffn, *inputs)

    monkeypatch.setattr("yopo.decision.read_units", read_units)
    model = tiny_model("llama")
    given, common = arguments_of(
        yopo.PolicyPruner.lean().fit(model), model, uncut=["model.layers.0.mlp"]
    )
    for inputs, tokens in ((4096, 4096), (10, 32)):
        monkeypatch.setattr("yopo.decision.INPUTS", inputs)
        list(decisions(*given, **common))
        half = (tokens // 2, 32)
        assert seen == [[half], [half, half]]  # nothing more than the stream where nothing is cut
        seen.clear()


def test_the_lean_recipe_asks_for_no_moments(tiny_model, monkeypatch):
    monkeypatch.setattr(Evidence, "moments", None)
    model = tiny_model("llama")
    given, common = arguments_of(yopo.PolicyPruner.lean().fit(model), model)
    assert len(list(decisions(*given, **common))) == 2
