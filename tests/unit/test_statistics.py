"""G and X of a model: how they are collected, kept, and told from another model's."""

import copy
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from yopo import InvalidArgumentError, UnsupportedModelError, YopoError
from yopo.evaluation.texts import NAMED
from yopo.symbolic import Statistics, collect_statistics
from yopo.symbolic.matrices import find_blocks

IDS = torch.arange(160).view(20, 8) * 7 % 60 + 3


def matrices_of(model):
    return [matrix for block in find_blocks(model) for matrix in block.matrices]


def norms_by_hooks(model, modules):
    """Return the mean over sequences of squared input norms, sequence by sequence."""
    sums = dict.fromkeys(modules, 0)
    hooks = [
        module.register_forward_hook(
            lambda _, inputs, __, name=name: sums.update(
                {name: sums[name] + inputs[0].flatten(0, -2).double().norm(dim=0) ** 2}
            )
        )
        for name, module in modules.items()
    ]
    with torch.no_grad():
        for row in IDS:
            model(input_ids=row[None])
    for hook in hooks:
        hook.remove()
    return {name: total / len(IDS) for name, total in sums.items()}


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2", "phi3"])
def test_inputs_are_those_that_hooks_see(tiny_model, kind):
    model = tiny_model(kind)
    found = collect_statistics(model, terminals=["X"], data=IDS)
    modules = {
        m.key: model.get_submodule(m.key.removesuffix(".weight")) for m in matrices_of(model)
    }
    expected = norms_by_hooks(model, modules)
    assert found.activations.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found.activations[name], value.float(), rtol=1e-4, atol=1e-6)
    assert found.terminals == {"X"}


def test_inputs_of_experts_are_those_of_the_tokens_that_reach_them(tiny_model):
    model = tiny_model("qwen2_moe")
    found = collect_statistics(model, terminals=["X"], data=IDS).activations
    experts = [name for name in found if "experts.gate_up_proj." in name]
    assert len(experts) == 8
    routed = torch.stack([found[name] for name in experts[:4]]).sum(dim=0)
    # Each token goes to two experts, and all read what the shared expert reads.
    shared = found["model.layers.0.mlp.shared_expert.gate_proj.weight"]
    torch.testing.assert_close(routed, 2 * shared, rtol=1e-4, atol=1e-5)


def test_statistics_are_saved_with_how_they_were_made(tiny_llama, tmp_path):
    model = tiny_llama()
    made = collect_statistics(model, sequences=3, length=8, seed=5)
    made.save(tmp_path)
    read = Statistics.load(tmp_path)
    assert read.made == made.made
    assert {key: made.made[key] for key in ("data", "sequences", "length", "seed", "dtype")} == {
        "data": "self",
        "sequences": 3,
        "length": 8,
        "seed": 5,
        "dtype": "float32",
    }
    for held in ("gradients", "activations"):
        for name, value in getattr(made, held).items():
            assert torch.equal(getattr(read, held)[name], value)
    read.check(model)
    again = collect_statistics(model, sequences=3, length=8, seed=5)
    assert all(torch.equal(again.gradients[n], made.gradients[n]) for n in made.gradients)


def test_statistics_of_another_model_are_told(tiny_llama, tiny_opt):
    model = tiny_llama()
    found = collect_statistics(model, terminals=["X"], data=IDS)
    with pytest.raises(InvalidArgumentError, match="of a LlamaForCausalLM, and the model is a OPT"):
        found.check(tiny_opt())
    by_hand = Statistics(found.gradients, found.activations)
    with pytest.raises(InvalidArgumentError, match="do not say of which model they are"):
        by_hand.check(model)
    changed = copy.deepcopy(model)
    changed.model.layers[0].mlp.up_proj.weight.data[3, 4] += 1e-3
    with pytest.raises(InvalidArgumentError, match="a model with other weights"):
        found.check(changed)


def test_damaged_statistics_are_told(tiny_llama, tmp_path):
    collect_statistics(tiny_llama(), terminals=["X"], data=IDS).save(tmp_path)
    file = tmp_path / "statistics_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"made": None}))
    with pytest.raises(YopoError, match="does not say how"):
        Statistics.load(tmp_path)
    (tmp_path / "statistics.safetensors").unlink()
    with pytest.raises(YopoError, match="is missing"):
        Statistics.load(tmp_path)


def words(text, verbose=True):
    return {"input_ids": [ord(letter) % 60 + 3 for letter in text]}


class Letters:
    """A tokenizer whose tokens are letters."""

    def __call__(self, text, verbose=True):
        return words(text)

    def __len__(self):
        return 64


def test_windows_are_drawn_from_a_text(tiny_llama, tmp_path):
    text = "the quick brown fox jumps over the lazy dog " * 4
    (tmp_path / "text.txt").write_text(text)
    model = tiny_llama()
    settings = {"terminals": ["X"], "tokenizer": Letters(), "sequences": 4, "length": 16}
    given = collect_statistics(model, data=text, **settings)
    read = collect_statistics(model, data=tmp_path / "text.txt", **settings)
    other = collect_statistics(model, data=text, seed=1, **settings)
    name = next(iter(given.activations))
    assert torch.equal(given.activations[name], read.activations[name])
    assert not torch.equal(given.activations[name], other.activations[name])
    assert (given.made["data"], given.made["sequences"], given.made["length"]) == ("given", 4, 16)
    assert read.made["data"] == str(tmp_path / "text.txt")
    assert given.made["tokens"] == read.made["tokens"] != other.made["tokens"]


def test_texts_with_a_name_are_told_by_it(tiny_llama, monkeypatch):
    monkeypatch.setitem(NAMED, "wikitext2", lambda _: "the quick brown fox " * 9)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=None))
    settings = {"terminals": ["X"], "tokenizer": Letters(), "sequences": 4, "length": 16}
    found = collect_statistics(tiny_llama(), data="wikitext2", **settings)
    assert found.made["data"] == "wikitext2"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"terminals": ["Y"]}, '`terminals` must be of "G" and "X"'),
        ({"terminals": []}, '`terminals` must be of "G" and "X"'),
        ({"sequences": 0}, "`sequences` must be a whole number of at least 1, got 0"),
        ({"sequences": "a"}, "`sequences` must be a whole number of at least 1, got 'a'"),
        ({"length": 2}, "`length` must be a whole number of at least 3"),
        ({"length": 8.5}, "`length` must be a whole number of at least 3, got 8.5"),
        ({"data": [[1, 2, 3]]}, '`data` must be "self", .*, got a list'),
        ({"data": None}, '`data` must be "self", .*, got a NoneType'),
        ({"data": IDS.float()}, "`data` tokens must be int64 ids"),
        ({"data": IDS[0]}, "`data` tokens must be int64 ids"),
        ({"data": IDS + 60}, r"`data` ids must lie in \[0, 64\)"),
        ({"data": "some text"}, "`tokenizer` is needed"),
        ({"data": "short", "tokenizer": Letters(), "length": 9}, "5 tokens, fewer than one seq"),
    ],
)
def test_bad_arguments_are_told(tiny_llama, settings, told):
    with pytest.raises(InvalidArgumentError, match=told):
        collect_statistics(tiny_llama(), **settings)


def test_a_model_without_a_head_has_inputs_but_no_gradients(tiny_llama):
    body = tiny_llama().model
    assert collect_statistics(body, terminals=["X"], data=IDS).terminals == {"X"}
    with pytest.raises(UnsupportedModelError, match="predicts no next tokens"):
        collect_statistics(body, data=IDS)
    with pytest.raises(UnsupportedModelError, match="cannot write text"):
        collect_statistics(body, terminals=["X"])


def test_a_model_that_sees_what_comes_next_has_no_gradients():
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    with pytest.raises(UnsupportedModelError, match="BertForMaskedLM predicts no next tokens"):
        collect_statistics(BertForMaskedLM(config), data=IDS)


def test_inputs_that_are_not_finite_are_refused(tiny_llama):
    model = tiny_llama()
    model.get_input_embeddings().weight.data[:] = torch.inf
    with pytest.raises(UnsupportedModelError, match=r"inputs of .* are NaN or infinite"):
        collect_statistics(model, terminals=["X"], data=IDS)
