"""Layers that are run one after another, each behind what was done to those before it."""

import threading

import pytest
import torch
import transformers

from tiny_models import SIZES, tiny_of
from yopo.symbolic.matrices import find_blocks
from yopo.symbolic.passes import batches_of, walk_blocks

KINDS = ["llama", "opt", "gpt2", "t5", "gpt_oss"]


def inputs_for(model, sequences=20):
    ids = torch.arange(sequences * 8).view(sequences, 8) * 7 % 60 + 3
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    return inputs


def inputs_seen(model, blocks, run):
    """Return what each layer is given while `run` runs, all sequences together."""
    seen = {block.name: [] for block in blocks}
    hooks = [
        block.module.register_forward_pre_hook(
            lambda _, args, kwargs, name=block.name: seen[name].append(
                args[0] if args else kwargs["hidden_states"]
            ),
            with_kwargs=True,
        )
        for block in blocks
    ]
    run()
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items() if parts}


def dense_pass(model, inputs):
    with torch.no_grad():
        for batch in batches_of(inputs):
            model(**batch, use_cache=False)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_come_in_order_and_see_what_a_whole_pass_shows_them(tiny_model, kind):
    model = tiny_model(kind)
    blocks, inputs = find_blocks(model), inputs_for(model)
    expected = inputs_seen(model, blocks, lambda: dense_pass(model, inputs))
    names = []
    for block, run in walk_blocks(model, blocks, inputs):
        names.append(block.name)
        (found,) = inputs_seen(model, [block], run).values()
        torch.testing.assert_close(found, expected[block.name])
    assert names == [block.name for block in blocks]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_done_to_a_layer_is_seen_by_those_behind_it(tiny_model, kind):
    model, reference = tiny_model(kind), tiny_model(kind)
    inputs = inputs_for(model)
    known = find_blocks(reference)
    for number, (block, run) in enumerate(walk_blocks(model, find_blocks(model), inputs)):
        expected = inputs_seen(reference, known, lambda: dense_pass(reference, inputs))
        (found,) = inputs_seen(model, [block], run).values()
        torch.testing.assert_close(found, expected[known[number].name])
        for each in (block, known[number]):
            for matrix in each.matrices:
                matrix.weight.mul_(0.5)


def test_a_cache_that_a_model_insists_on_does_not_grow_when_a_layer_runs_again():
    """XLM hands one to its attentions, whatever it is told."""
    model = tiny_of(transformers.XLMWithLMHeadModel, sizes=SIZES["few"])
    blocks, inputs = find_blocks(model), inputs_for(model, sequences=2)
    expected = inputs_seen(model, blocks, lambda: dense_pass(model, inputs))
    visited = []
    for block, run in walk_blocks(model, blocks, inputs):
        run()
        (found,) = inputs_seen(model, [block], run).values()
        torch.testing.assert_close(found, expected[block.name])
        visited.append(block.name.removeprefix("transformer."))
    assert visited == ["attentions.0", "ffns.0", "attentions.1", "ffns.1"]


def passes_alive():
    return [thread for thread in threading.enumerate() if thread.name == "yopo-pass"]


def test_a_walk_that_is_left_leaves_nothing_behind(tiny_llama):
    model = tiny_llama().train()
    walk = walk_blocks(model, find_blocks(model), inputs_for(model))
    next(walk)
    assert len(passes_alive()) == 2
    assert not model.training
    walk.close()
    assert not passes_alive()
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_error_inside_a_pass_is_raised_where_the_walk_is(tiny_llama):
    model = tiny_llama()

    def fail(*_):
        raise ArithmeticError("no")

    model.model.layers[0].mlp.register_forward_pre_hook(fail)
    with pytest.raises(ArithmeticError, match="no"):
        list(walk_blocks(model, find_blocks(model), inputs_for(model)))
    assert not passes_alive()


def test_layers_that_inputs_do_not_reach_are_not_visited(tiny_model):
    model = tiny_model("t5")
    blocks = find_blocks(model)
    encoder = model.get_encoder()
    ids = inputs_for(model)["input_ids"]
    visited = [block.name for block, _ in walk_blocks(encoder, blocks, {"input_ids": ids})]
    assert visited == ["encoder.block.0", "encoder.block.1"]
