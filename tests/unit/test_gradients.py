"""G: sums of squared gradients, beside the same by hand."""

import copy

import pytest
import torch

from yopo import UnsupportedModelError
from yopo.symbolic.gradients import read_gradients
from yopo.symbolic.matrices import find_blocks

IDS = torch.arange(40).view(5, 8) * 7 % 60 + 3


def parameters_of(model):
    return {m.key: m.parameter for block in find_blocks(model) for m in block.matrices}


def by_hand(model, inputs, names):
    """Return 100 · √Σg², from whole backward passes in float32 of a copy, one by one."""
    model = copy.deepcopy(model).float().eval().requires_grad_(True)
    sums = {name: torch.zeros_like(model.get_parameter(name)) for name in names}
    for number in range(5):
        own = {key: ids[number : number + 1] for key, ids in inputs.items()}
        logits = model(**own).logits[0]
        targets = own.get("decoder_input_ids", own["input_ids"])[0]
        log_p = logits.log_softmax(-1)[:-1].gather(1, targets[1:, None])
        model.zero_grad()
        (-log_p.mean()).backward()
        for name in names:
            sums[name] += model.get_parameter(name).grad.square()
    return {name: 100 * total.sqrt() for name, total in sums.items()}


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2", "t5", "gpt_oss"])
def test_gradients_are_those_of_whole_passes(tiny_model, kind):
    model = tiny_model(kind)
    inputs = {"input_ids": IDS}
    if kind == "t5":
        inputs["decoder_input_ids"] = IDS.flip(0)
    parameters = parameters_of(model)
    found = read_gradients(model, parameters, inputs)
    expected = by_hand(model, inputs, parameters)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_halves_do_not_underflow(tiny_llama, dtype):
    model = tiny_llama(dtype=dtype)
    model.lm_head.weight.data *= 5e-7  # float16 would lose gradients that are so small
    before = copy.deepcopy(model.state_dict())
    parameters = parameters_of(model)
    found = read_gradients(model, parameters, {"input_ids": IDS})
    expected = by_hand(model, {"input_ids": IDS}, parameters)
    for name, value in expected.items():
        assert (value / 100).quantile(0.1) < 6e-8
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-9)
    for name, value in model.state_dict().items():
        assert value.dtype == dtype
        assert torch.equal(value, before[name])


def test_the_model_is_as_it_was(tiny_opt):
    model = tiny_opt(dropout=0.5).train()
    frozen = model.get_input_embeddings().weight.requires_grad_(False)
    kept = (
        model.lm_head.bias
        if model.lm_head.bias is not None
        else model.model.decoder.layers[0].fc1.bias
    )
    kept.grad = torch.ones_like(kept)
    first = read_gradients(model, parameters_of(model), {"input_ids": IDS})
    assert model.training
    assert not frozen.requires_grad
    assert kept.requires_grad
    assert kept.grad.eq(1).all()
    assert model.model.decoder.layers[0].fc1.weight.grad is None
    again = read_gradients(model, parameters_of(model), {"input_ids": IDS})
    assert all(torch.equal(first[name], again[name]) for name in first)  # no dropout


def test_few_sums_are_held_at_a_time_where_memory_asks_for_it(tiny_llama, monkeypatch):
    model = tiny_llama()
    parameters = parameters_of(model)
    whole = read_gradients(model, parameters, {"input_ids": IDS})
    monkeypatch.setattr("yopo.symbolic.gradients.memory_left", lambda _: 20_000)
    parts = read_gradients(model, parameters, {"input_ids": IDS})
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value)


def test_a_model_without_next_tokens_is_refused(tiny_llama):
    model = tiny_llama()
    with pytest.raises(UnsupportedModelError, match="LlamaModel predicts no next tokens"):
        read_gradients(model.model, parameters_of(model), {"input_ids": IDS})


def test_a_model_whose_loss_has_no_gradients_is_refused(tiny_llama):
    """Reformer's is computed by a function that hides from torch which weights it uses."""
    model = tiny_llama()
    model.lm_head.register_forward_hook(lambda *call: call[-1].detach())
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM computes .* without G"):
        read_gradients(model, parameters_of(model), {"input_ids": IDS})


def test_gradients_that_are_not_finite_are_refused(tiny_llama):
    model = tiny_llama()
    model.lm_head.weight.data[5] = torch.inf
    with pytest.raises(UnsupportedModelError, match="are NaN or infinite on this text"):
        read_gradients(model, parameters_of(model), {"input_ids": IDS})
