"""Where each layout keeps a hidden unit, compared with what was written down by hand."""

import copy

import pytest
import torch
import transformers
from torch.nn.functional import gelu, relu, silu

import yopo
from tiny_models import logits_of, tiny_model, tiny_of


def gated(act):
    return lambda gate, up: act(gate) * up


def gelu_tanh(x):
    return gelu(x, approximate="tanh")


def squared_relu(x):
    return relu(x) ** 2


def oss_gate(gate, up):
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def two(first, second, weight="weight"):
    """Return how a plain FFN of two linear maps is read: matrices `(F, D)`, biases, bias out."""

    def read(module, expert):
        first_map, second_map = module.get_submodule(first), module.get_submodule(second)
        return [first_map.weight], [first_map.bias], second_map.weight.T, second_map.bias

    return read


def three(gate, up, down):
    def read(module, expert):
        maps = [module.get_submodule(name) for name in (gate, up, down)]
        return (
            [maps[0].weight, maps[1].weight],
            [maps[0].bias, maps[1].bias],
            maps[2].weight.T,
            maps[2].bias,
        )

    return read


def fused(first, second):
    def read(module, expert):
        first_map, second_map = module.get_submodule(first), module.get_submodule(second)
        rows = second_map.in_features
        return (
            [first_map.weight[:rows], first_map.weight[rows:]],
            [None, None],
            second_map.weight.T,
            second_map.bias,
        )

    return read


def conv1d(module, expert):
    return [module.c_fc.weight.T], [module.c_fc.bias], module.c_proj.weight, module.c_proj.bias


def experts(module, expert):
    gate, up = module.gate_up_proj[expert].chunk(2, dim=0)
    return [gate, up], [None, None], module.down_proj[expert].T, None


def plain_experts(module, expert):
    return [module.up_proj[expert]], [None], module.down_proj[expert].T, None


def turned_experts(module, expert):
    gate, up = module.gate_up_proj[expert].chunk(2, dim=1)
    return [gate.T, up.T], [None, None], module.down_proj[expert], None


def interleaved_experts(module, expert):
    weight, bias = module.gate_up_proj[expert], module.gate_up_proj_bias[expert]
    return (
        [weight[:, 0::2].T, weight[:, 1::2].T],
        [bias[0::2], bias[1::2]],
        module.down_proj[expert],
        module.down_proj_bias[expert],
    )


def stacked_experts(module, expert):
    rows = module.w1.shape[0] // 4
    part = slice(expert * rows, (expert + 1) * rows)
    return [module.w1[part], module.v1[part]], [None, None], module.w2[part], None


CASES = {
    "LlamaModel": (three("gate_proj", "up_proj", "down_proj"), gated(silu), {}),
    "LlamaModel with biases": (
        three("gate_proj", "up_proj", "down_proj"),
        gated(silu),
        {"mlp_bias": True},
    ),
    "Phi3Model": (fused("gate_up_proj", "down_proj"), gated(silu), {}),
    "GlmModel": (fused("gate_up_proj", "down_proj"), gated(silu), {}),
    "NemotronModel": (two("up_proj", "down_proj"), squared_relu, {}),
    "PhiModel": (two("fc1", "fc2"), gelu_tanh, {}),
    "GPTJModel": (two("fc_in", "fc_out"), gelu_tanh, {}),
    "GPT2Model": (conv1d, gelu_tanh, {}),
    "Starcoder2Model": (two("c_fc", "c_proj"), gelu_tanh, {}),
    "FalconModel": (two("dense_h_to_4h", "dense_4h_to_h"), gelu, {}),
    "GPTNeoXModel": (two("dense_h_to_4h", "dense_4h_to_h"), gelu, {}),
    "MptModel": (two("up_proj", "down_proj"), gelu, {}),
    "T5EncoderModel": (two("wi", "wo"), relu, {}),
    "T5EncoderModel gated": (
        three("wi_0", "wi_1", "wo"),
        gated(gelu_tanh),
        {"feed_forward_proj": "gated-gelu"},
    ),
    "BertModel": (two("intermediate.dense", "output.dense"), gelu, {}),
    "ModernBertModel": (fused("Wi", "Wo"), gated(gelu), {}),
    "Lfm2Model": (three("w1", "w3", "w2"), gated(silu), {}),
    "XLMModel": (two("lin1", "lin2"), gelu, {}),
    "Wav2Vec2Model": (two("intermediate_dense", "output_dense"), gelu, {}),
    "Qwen3VLVisionModel": (two("linear_fc1", "linear_fc2"), gelu_tanh, {}),
    "MixtralModel": (experts, gated(silu), {}),
    "NemotronHModel": (plain_experts, squared_relu, {}),
    "Llama4TextModel": (turned_experts, gated(silu), {}),
    "GptOssModel": (interleaved_experts, oss_gate, {}),
    "DbrxModel": (stacked_experts, gated(silu), {}),
}
"""How each layout is stored and what it computes, written down by hand."""


def output_of(model, ffn, states_TD):
    """Return what the FFN gives for some hidden states, by the code of transformers."""
    name, module = type(model).__name__, model.get_submodule(ffn.path)
    if name == "BertModel":
        return module.output.dense(module.intermediate(states_TD))
    if name == "MptModel":
        return module(states_TD, torch.zeros_like(states_TD))
    if name == "Llama4TextModel":
        return module(states_TD.repeat(4, 1)).view(4, *states_TD.shape)[1]
    if name == "DbrxModel":
        module = model.get_submodule(ffn.path.rpartition(".")[0])
    if ffn.name != ffn.path:
        tokens = len(states_TD)
        chosen = torch.ones(tokens, 1, dtype=torch.int64)
        return module(states_TD, chosen, torch.ones(tokens, 1)).view(tokens, -1)
    return module(states_TD)


@pytest.mark.parametrize("name", CASES)
def test_the_slots_of_a_row_hold_just_that_hidden_unit(name):
    read, act, changes = CASES[name]
    model = tiny_of(getattr(transformers, name.partition(" ")[0]), **changes)
    ffns = yopo.find_ffns(model)
    ffn = next((ffn for ffn in ffns if ffn.name == f"{ffn.path}.1"), ffns[0])
    generator = torch.Generator().manual_seed(2)
    states_TD = torch.randn(6, ffn.contract_weight().shape[1], generator=generator)
    with torch.no_grad():
        matrices, biases, contract_FD, last = read(model.get_submodule(ffn.path), 1)
        kept_K = torch.tensor([row for row in range(ffn.rows) if row != 3])
        hidden = [
            states_TD @ matrix[kept_K].T + (0 if bias is None else bias[kept_K])
            for matrix, bias in zip(matrices, biases, strict=True)
        ]
        expected = act(*hidden) @ contract_FD[kept_K] + (0 if last is None else last)
        whole = output_of(model, ffn, states_TD)
        for slot in ffn.slots:
            slot.read(ffn.rows)[3] = 0
        torch.testing.assert_close(output_of(model, ffn, states_TD), expected)
    assert not torch.allclose(whole, expected, atol=1e-6)
    assert len(ffn.slots) == len(matrices) + 1 + sum(bias is not None for bias in biases)


def permute_all(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for ffn in yopo.find_ffns(model):
        order_F = torch.randperm(ffn.rows, generator=generator)
        for slot in ffn.slots:
            slot.read(ffn.rows).copy_(slot.read(ffn.rows)[order_F])


@pytest.mark.parametrize(
    "model_type",
    """llama phi3 gpt2 bloom gptj bert modernbert-decoder cpmant xlnet reformer prophetnet bitnet
    mixtral qwen2_moe deepseek_v3 gpt_oss llama4_text dbrx jetmoe granitemoe aria_text jamba
    nemotron_h longcat_flash zamba gemma4_text""".split(),
)
def test_rows_may_be_permuted_through_their_slots(model_type):
    model = tiny_model(model_type)
    before = logits_of(model)
    weights = copy.deepcopy(model.state_dict())
    permute_all(model)
    assert any(not torch.equal(weights[key], value) for key, value in model.state_dict().items())
    torch.testing.assert_close(logits_of(model), before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "model_type", "llama opt phi gptj gpt2 bert t5 phi3 gemma2 falcon cohere mixtral".split()
)
def test_the_norm_of_an_ffn_is_the_one_that_feeds_it(model_type):
    model = (
        tiny_of(transformers.T5ForConditionalGeneration)
        if model_type == "t5"
        else tiny_model(model_type)
    )
    ffn = yopo.find_ffns(model)[0]
    seen = {}
    ffn.norm.register_forward_hook(lambda module, inputs, output: seen.update(norm=output))
    ffn.expand[0].module.register_forward_pre_hook(
        lambda module, inputs: seen.update(ffn=inputs[0])
    )
    logits_of(model)
    torch.testing.assert_close(seen["norm"].flatten(), seen["ffn"].flatten())
