"""Inputs that are imagined from weights: what they are made of, and that nothing is run."""

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, MixtralConfig, MixtralForCausalLM

from yopo.adapters import find_ffns
from yopo.errors import UnsupportedModelError
from yopo.imagining import imagine_moments, walk
from yopo.moments import read_moments

TOKENS = 20_000
LENGTH = 50
"""Tokens of a sequence that is read; without attention, none of them knows of the others."""


def without_attention(model):
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    return model


def gaussian_moments(layer, gate, up):
    """Second moments of the units silu(gate · x) * (up · x) for normed Gaussian x."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        states = layer.post_attention_layernorm(torch.randn(TOKENS, 32, generator=generator))
        units = torch.nn.functional.silu(states @ gate.T) * (states @ up.T)
    return (units.T @ units / TOKENS).double()


def test_half_of_the_inputs_are_the_stream_without_attention_and_half_are_noise(tiny_model):
    model = without_attention(tiny_model("llama", vocab_size=5000))
    with torch.no_grad():
        model.model.embed_tokens.weight[:500] = model.model.embed_tokens.weight[0]
    ffns = find_ffns(model)
    shares = 1 / (torch.arange(5000) + 100.0)
    generator = torch.Generator().manual_seed(5)
    ids = torch.multinomial(shares, TOKENS, replacement=True, generator=generator)
    stream = read_moments(model, ffns, {"input_ids": ids.view(-1, LENGTH)})
    imagined = imagine_moments(model, ffns, tokens=TOKENS, seed=0)
    for ffn, layer in zip(ffns, model.model.layers, strict=True):
        noise = gaussian_moments(layer, layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight)
        expected = (stream[ffn.name].second_FF + noise) / 2
        assert (imagined[ffn.name].second_FF - expected).norm() < 0.15 * expected.norm()
        assert imagined[ffn.name].tokens == TOKENS


def test_biases_are_part_of_the_stream(tiny_model):
    model = tiny_model("opt")
    decoder = model.model.decoder
    with torch.no_grad():
        decoder.embed_positions.weight.zero_()
        for layer in decoder.layers:
            layer.self_attn.out_proj.weight.zero_()
            layer.self_attn.out_proj.bias.zero_()
            layer.fc2.bias.normal_(generator=torch.Generator().manual_seed(0))
    ffn, layer = find_ffns(model)[1], decoder.layers[1]
    shares = 1 / (torch.arange(model.config.vocab_size) + 100.0)
    generator = torch.Generator().manual_seed(5)
    ids = torch.multinomial(shares, TOKENS, replacement=True, generator=generator)
    stream = read_moments(model, [ffn], {"input_ids": ids.view(-1, LENGTH)})[ffn.name]
    with torch.no_grad():
        noise = layer.final_layer_norm(torch.randn(TOKENS, 32, generator=generator))
        units = torch.relu(layer.fc1(noise))
    expected = (stream.mean_F + units.mean(dim=0).double()) / 2
    imagined = imagine_moments(model, [ffn], tokens=TOKENS, seed=0)[ffn.name]
    assert (imagined.mean_F - expected).norm() < 0.05 * expected.norm()


def test_an_ffn_is_imagined_alike_alone_and_among_the_others(tiny_model):
    model = tiny_model("opt")
    ffns = find_ffns(model)
    together = imagine_moments(model, ffns, tokens=600, seed=0)
    for ffn in ffns:
        alone = imagine_moments(model, [ffn], tokens=600, seed=0)
        assert alone.keys() == {ffn.name}
        assert torch.equal(alone[ffn.name].second_FF, together[ffn.name].second_FF)


def test_the_seed_decides(tiny_model):
    model = tiny_model("llama")
    ffns = find_ffns(model)
    first, again, other = (imagine_moments(model, ffns, tokens=50, seed=s) for s in (0, 0, 1))
    name = ffns[-1].name
    assert torch.equal(first[name].second_FF, again[name].second_FF)
    assert not torch.equal(first[name].second_FF, other[name].second_FF)


@pytest.mark.parametrize("kind", ["llama", "opt", "phi"])
def test_no_module_but_tables_norms_and_activations_runs(tiny_model, kind):
    model = tiny_model(kind)
    ran = set()
    for module in model.modules():
        module.register_forward_hook(lambda module, *_: ran.add(type(module).__name__))
    imagine_moments(model, find_ffns(model), tokens=20, seed=0)
    assert all(
        any(part in name for part in ("Embedding", "Norm", "Activation", "SiLU", "ReLU", "GELU"))
        for name in ran
    ), ran


def test_the_mean_of_the_experts_goes_on_in_the_stream():
    config = MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=64, num_local_experts=4,
    )  # fmt: skip
    model = without_attention(MixtralForCausalLM(config))
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    for layer in model.model.layers:  # experts that are all alike need no routing to be known
        for parameter in layer.mlp.experts.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
            parameter.data[:] = parameter.data[:1].clone()
    ffns = [ffn for ffn in find_ffns(model) if ".1." in ffn.name]
    shares = 1 / (torch.arange(64) + 100.0)
    generator = torch.Generator().manual_seed(5)
    ids = torch.multinomial(shares, TOKENS, replacement=True, generator=generator)
    read = read_moments(model, ffns, {"input_ids": ids.view(-1, LENGTH)})
    seen = sum(found.tokens for found in read.values())
    stream = sum(found.second_FF * found.tokens for found in read.values()) / seen
    layer = model.model.layers[1]
    noise = gaussian_moments(layer, *layer.mlp.experts.gate_up_proj[0].chunk(2))
    for found in imagine_moments(model, ffns, tokens=TOKENS, seed=0).values():
        expected = (stream + noise) / 2
        assert (found.second_FF - expected).norm() < 0.15 * expected.norm()


def test_where_there_is_no_table_of_tokens_all_inputs_are_noise():
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        image_size=8, patch_size=4,
    )  # fmt: skip
    model = CLIPVisionModel(config)
    ffns = find_ffns(model)
    imagined = imagine_moments(model, ffns, tokens=TOKENS, seed=0)
    layer = model.get_submodule(ffns[0].path.rpartition(".")[0])
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        states = layer.layer_norm2(torch.randn(TOKENS, 16, generator=generator))
        units = layer.mlp.activation_fn(layer.mlp.fc1(states))
    expected = (units.T @ units / TOKENS).double()
    assert (imagined[ffns[0].name].second_FF - expected).norm() < 0.15 * expected.norm()


def test_an_unknown_activation_is_named(tiny_model):
    model = tiny_model("llama")
    ffns = find_ffns(model)
    del model.model.layers[1].mlp.act_fn
    with pytest.raises(UnsupportedModelError, match=r"activation of `model.layers.1.mlp`"):
        imagine_moments(model, ffns, tokens=10, seed=0)


KINDS = ["llama", "opt", "phi", "phi3", "gpt2", "t5", "qwen2_moe", "gpt_oss"]


@pytest.mark.parametrize("kind", KINDS)
def test_from_a_source_everything_is_imagined_as_in_memory(tiny_model, skeleton_of, kind):
    model = tiny_model(kind)
    skeleton = skeleton_of(model)
    expected = imagine_moments(model, find_ffns(model), tokens=600, seed=0)
    found = imagine_moments(skeleton, find_ffns(skeleton), tokens=600, seed=0)
    assert found.keys() == expected.keys()
    for name, moments in expected.items():
        assert torch.equal(found[name].second_FF, moments.second_FF)
        assert torch.equal(found[name].mean_F, moments.mean_F)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert skeleton_of.held <= max(len(ffn.modules) for ffn in find_ffns(skeleton))


def test_without_embeddings_to_be_had_the_stream_is_noise(tiny_model):
    model = tiny_model("llama")
    model.model.embed_tokens.to("meta")
    streams = []

    def visit(ffn, stream):
        streams.append(stream.clone())
        return torch.zeros_like(stream), None

    assert list(walk(model, ["model.layers.0.mlp"], visit, tokens=4000, seed=0)) == []
    (stream,) = streams
    assert stream.mean().abs() < 0.02
    assert abs(stream.std() - 1) < 0.02


def seen_by(model, names, *, output=1.0, **settings):
    """Return what `walk` shows of each FFN that it visits, and what comes out of it."""
    streams = {}

    def visit(ffn, stream):
        streams[ffn.name] = stream.clone()
        return torch.full_like(stream, output), ffn.name if ffn.name in names else None

    return streams, list(walk(model, names, visit, seed=0, **settings))


def test_the_walk_ends_with_the_last_that_is_wanted(tiny_model):
    model = tiny_model("llama", num_hidden_layers=4)
    streams, found = seen_by(model, ["model.layers.0.mlp", "model.layers.2.mlp"], tokens=30)
    assert list(streams) == [f"model.layers.{layer}.mlp" for layer in range(3)]
    assert found == ["model.layers.0.mlp", "model.layers.2.mlp"]
    first, second, third = streams.values()
    torch.testing.assert_close(second, first + 1)
    torch.testing.assert_close(third, first + 2)
    assert seen_by(model, [], tokens=30) == ({}, [])


def test_ffns_of_a_layer_read_the_same_and_add_the_mean_of_the_experts(tiny_model):
    model = tiny_model("gpt_oss")
    last = find_ffns(model)[-1].name
    streams, _ = seen_by(model, [last], tokens=30, output=2.0)
    per_layer = [[s for n, s in streams.items() if f"layers.{layer}." in n] for layer in (0, 1)]
    assert [len(layer) for layer in per_layer] == [4, 4]
    for layer in per_layer:
        assert all(torch.equal(stream, layer[0]) for stream in layer)
    torch.testing.assert_close(per_layer[1][0], per_layer[0][0] + 2)


def test_stratified_tokens_come_as_often_as_their_share_give_or_take_two(tiny_model):
    model = tiny_model("llama", vocab_size=300)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = torch.arange(300.0)
    shares = 1 / (torch.arange(300.0) + 100)
    expected = 5000 * shares / shares.sum()
    found = {}
    for stratified in (True, False):
        streams, _ = seen_by(model, ["model.layers.0.mlp"], tokens=5000, stratified=stratified)
        ids = streams["model.layers.0.mlp"][:, 0].long()
        assert not torch.equal(ids, ids.sort().values)
        found[stratified] = (ids.bincount(minlength=300) - expected).abs().max()
    assert found[True] < 2 + 1e-3 < found[False]


def test_nothing_that_was_found_is_held_on_to(tiny_model):
    class Thing:
        alive = 0

        def __init__(self):
            Thing.alive += 1

        def __del__(self):
            Thing.alive -= 1

    def visit(ffn, stream):
        assert Thing.alive == 0
        return torch.zeros_like(stream), Thing()

    model = tiny_model("llama", num_hidden_layers=4)
    steps = walk(model, ["model.layers.3.mlp"], visit, tokens=10, seed=0)
    assert sum(isinstance(next(steps), Thing) for _ in range(4)) == 4
