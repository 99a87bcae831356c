"""Inputs that are imagined from weights: what they are made of, and that nothing is run."""

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, MixtralConfig, MixtralForCausalLM

from yopo.adapters import find_ffns
from yopo.errors import UnsupportedModelError
from yopo.imagining import imagine_moments
from yopo.moments import read_moments

TOKENS = 20_000


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
    stream = read_moments(model, ffns, {"input_ids": ids[:, None]})
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
    stream = read_moments(model, [ffn], {"input_ids": ids[:, None]})[ffn.name]
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
    read = read_moments(model, ffns, {"input_ids": ids[:, None]})
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
