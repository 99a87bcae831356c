import copy
import math
from dataclasses import replace

import pytest
import torch
from torch.func import functional_call
from transformers import AutoModelForCausalLM

import yopo
from conftest import assert_same, build
from yopo import InvalidArgumentError, RecoverySettings
from yopo.embedded import model_path
from yopo.embedded.stories import write_text
from yopo.recovery.adapter import Trained, put_on
from yopo.recovery.keeping import activations_checkpointed
from yopo.recovery.masks import is_sparse, keep_zeros
from yopo.recovery.targets import find_places
from yopo.recovery.texts import find_tokenizer, read_windows
from yopo.recovery.trainer import Best

SMALL = RecoverySettings(window=32, batch=4, epochs=1, learning_rate=5e-3, evaluate_every=2)
TOKENS = torch.arange(640).view(20, 32) * 7 % 60 + 3
NO_DROPOUT = {"gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}}
KINDS = ["llama", "gpt2", "qwen2_moe", "gpt_oss"]
"""Linear maps, transposed ones, and experts in tensors of three dimensions, stored either way."""


def targets_of(model):
    """Return the names of the matrices of a model that get an adapter."""
    places = find_places(model, yopo.find_ffns(model), "both")
    return [f"{name}.weight" for name in places.modules] + list(places.parameters)


def without_two_of_four(model):
    """Make zero the two smallest of four weights side by side, and return the model."""
    for name in targets_of(model):
        weight = model.get_parameter(name).detach()
        fours = weight.view(-1, 4)
        fours.scatter_(1, fours.abs().topk(2, 1, largest=False).indices, 0.0)
    return model


def sparse(kind):
    return without_two_of_four(build(kind, **NO_DROPOUT.get(kind, {})))


def weights_of(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def zeros_of(model):
    return {name: (model.get_parameter(name) == 0).clone() for name in targets_of(model)}


def loss_of(model, windows):
    return math.log(yopo.perplexity(model, windows.flatten(), window=windows.shape[1]))


def with_adapters(model, settings=SMALL):
    """Put on adapters with random weights, which change something."""
    adapted = put_on(model, find_places(model, yopo.find_ffns(model), "both"), settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return adapted


def layers_of(adapted):
    """Yield the layers of peft with the names of the matrices that they adapt."""
    for path, layer in adapted.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            name = path.replace(".base_layer", "")
            yield f"{name}.{getattr(layer, 'parameter_name', 'weight')}", layer


def delta_of(layer, shape):
    """Return s · BA in the shape of the matrix, one expert after another."""
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    if len(shape) == 2:
        delta = up @ down
        return 2.0 * (delta if delta.shape == shape and not layer.fan_in_fan_out else delta.T)
    rank, experts = 8, shape[0]
    deltas = [
        up[:, torch.arange(rank) * experts + expert] @ down[expert * rank : (expert + 1) * rank]
        for expert in range(experts)
    ]
    return 2.0 * torch.stack([d if d.shape == shape[1:] else d.T for d in deltas])


def changed_by_hand(adapted, weights, *, masked):
    """Return the matrices that adapters change: where they are not zero, or everywhere."""
    found = {}
    for name, layer in layers_of(adapted):
        delta = delta_of(layer, weights[name].shape)
        found[name] = weights[name] + (delta * (weights[name] != 0) if masked else delta)
    return found


# What an adapter computes


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_changes_only_what_is_not_zero_and_has_the_gradients_of_that(kind, checkpointed):
    model = sparse(kind)
    weights, twin = weights_of(model), copy.deepcopy(model)
    adapted = with_adapters(model)
    keep_zeros(adapted)
    factors = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    expected = changed_by_hand(adapted, weights, masked=True)
    by_hand = functional_call(twin, expected, kwargs={"input_ids": TOKENS[:2]}).logits
    gradients = torch.autograd.grad(by_hand.square().mean(), list(factors.values()))

    adapted.train()
    with activations_checkpointed(model, checkpointed):
        found = adapted(input_ids=TOKENS[:2], use_cache=False).logits
        found.square().mean().backward()
    torch.testing.assert_close(found, by_hand, rtol=1e-4, atol=1e-5)
    for (name, factor), gradient in zip(factors.items(), gradients, strict=True):
        torch.testing.assert_close(factor.grad, gradient, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_dropout_falls_on_the_inputs_of_the_adapter_alone(kind):
    model = sparse(kind)
    weights = weights_of(model)
    adapted = with_adapters(model, replace(SMALL, dropout=0.3))
    keep_zeros(adapted)
    name, layer = next(
        (n, layer) for n, layer in layers_of(adapted) if "layers.0" in n or "h.0" in n
    )
    weight, bias = weights[name], weights.get(name.replace("weight", "bias"), 0.0)
    delta = delta_of(layer, weight.shape) * (weight != 0)
    inputs = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = layer.train()(inputs)
        torch.manual_seed(0)
        dropped = torch.nn.functional.dropout(inputs, 0.3)
    if kind == "llama":
        weight, delta = weight.T, delta.T
    torch.testing.assert_close(found, inputs @ weight + bias + dropped @ delta)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_model_gets_ordinary_adapters(kind):
    model = build(kind)
    name = targets_of(model)[0]
    model.get_parameter(name).detach().flatten()[:4] = 0.0  # fewer than one in a hundred
    assert not is_sparse(model, find_places(model, yopo.find_ffns(model), "both"))
    adapted = with_adapters(model)
    before = [{**vars(layer)} for _, layer in layers_of(adapted)]
    keep_zeros(adapted)
    assert [{**vars(layer)} for _, layer in layers_of(adapted)] == before
    assert not any(layer.lora_variant for _, layer in layers_of(adapted))


def test_of_a_model_that_is_sparse_in_part_only_that_part_is_masked():
    model = build("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    model.get_parameter(name).detach()[::2] = 0.0
    assert is_sparse(model, find_places(model, yopo.find_ffns(model), "both"))
    adapted = with_adapters(model)
    keep_zeros(adapted)
    assert [n for n, layer in layers_of(adapted) if layer.lora_variant] == [name]


# The call


def test_a_model_with_two_of_four_weights_wins_back_what_it_lost_and_keeps_its_zeros(caplog):
    dense = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.bfloat16)
    tokenizer, text = find_tokenizer(dense, None), [write_text(1, 20_000)]
    windows = read_windows(text, "data", tokenizer=tokenizer, model=dense, most=72, length=32)
    learned, held_out = windows[8:], windows[:8]
    model = without_two_of_four(copy.deepcopy(dense))
    zeros, lost = zeros_of(model), loss_of(model, held_out) - loss_of(dense, held_out)
    settings = replace(SMALL, batch=8, evaluate_every=4)
    recovered = yopo.recover(model, learned, teacher=dense, validation=held_out, settings=settings)
    assert recovered is model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert loss_of(model, held_out) - loss_of(dense, held_out) < 0.85 * lost
    assert_same(zeros_of(model), zeros)
    assert all((z.view(-1, 4).sum(1) == 2).all() for z in zeros.values())
    assert not caplog.records


@pytest.mark.parametrize("kind", KINDS)
def test_merging_changes_no_zero_of_any_layout(kind, tmp_path):
    model = sparse(kind)
    weights, zeros = weights_of(model), zeros_of(model)
    learned, held_out = TOKENS[:16], TOKENS[16:]
    yopo.recover(model, learned, validation=held_out, settings=SMALL, output=tmp_path)
    assert_same(zeros_of(model), zeros)
    trained = Trained.load(tmp_path / "adapter" / "best.safetensors")
    assert loss_of(model, held_out) == pytest.approx(trained.loss, abs=1e-5)
    assert trained.loss < trained.first
    adapted = with_adapters(sparse(kind))
    with torch.no_grad():
        for name, weight in trained.weights.items():
            adapted.get_parameter(name).copy_(weight)
    expected = changed_by_hand(adapted, weights, masked=True)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected.get(name, weights[name]), msg=name)
        assert (name in expected) != torch.equal(tensor, weights[name])


def test_merging_changes_no_zero_of_a_matrix_that_has_but_few():
    model = build("llama")
    weight = model.model.layers[0].self_attn.q_proj.weight.detach()
    weight.view(-1)[:4] = 0.0  # of 1024
    before = weight.clone()
    yopo.recover(model, TOKENS, settings=SMALL)
    assert torch.equal(weight == 0, before == 0)
    assert (weight != before).float().mean() > 0.9


def test_with_bfloat16_and_recomputed_activations_the_zeros_stay_as_well():
    model = sparse("llama")
    zeros, lost = zeros_of(model), loss_of(model, TOKENS)
    settings = replace(SMALL, bf16=True, gradient_checkpointing=True, dropout=0.1)
    yopo.recover(model, TOKENS, settings=settings)
    assert_same(zeros_of(model), zeros)
    assert loss_of(model, TOKENS) < lost - 0.1


def test_an_adapter_that_is_not_merged_is_an_ordinary_one_beside_a_sparse_model(
    tmp_path, logits, caplog
):
    model = sparse("llama")
    weights, twin = weights_of(model), copy.deepcopy(model)
    adapted = yopo.recover(model, TOKENS, settings=SMALL, merge=False, output=tmp_path)
    assert "merging them later fills" in caplog.text
    for name, layer in layers_of(adapted):
        assert torch.equal(layer.get_base_layer().weight, weights[name])
    twin.load_state_dict(changed_by_hand(adapted, weights, masked=False), strict=False)
    assert torch.allclose(logits(adapted), logits(twin), atol=1e-5)
    assert not torch.allclose(logits(adapted), logits(sparse("llama")), atol=1e-2)
    with pytest.raises(InvalidArgumentError, match="another `merge`: False instead of True"):
        yopo.recover(sparse("llama"), TOKENS, settings=SMALL, output=tmp_path)


def test_an_interrupted_recovery_of_a_sparse_model_goes_on_to_what_an_uninterrupted_one_gives(
    tmp_path, monkeypatch
):
    def end(self, args, state, control, **_):
        if state.global_step == 3:
            raise KeyboardInterrupt

    settings = replace(SMALL, dropout=0.1)
    expected = yopo.recover(sparse("llama"), TOKENS, settings=settings).state_dict()
    model = sparse("llama")
    before = weights_of(model)
    monkeypatch.setattr(Best, "on_step_begin", end, raising=False)
    with pytest.raises(KeyboardInterrupt):
        yopo.recover(model, TOKENS, settings=settings, output=tmp_path)
    assert_same(weights_of(model), before)
    monkeypatch.undo()
    yopo.recover(model, TOKENS, settings=settings, output=tmp_path)
    assert_same(model.state_dict(), expected)
    again = yopo.recover(sparse("llama"), TOKENS, settings=settings, output=tmp_path)
    assert_same(again.state_dict(), expected)
    with pytest.raises(InvalidArgumentError, match="another `merge`: True instead of False"):
        yopo.recover(sparse("llama"), TOKENS, settings=settings, output=tmp_path, merge=False)
