import logging

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import yopo
from yopo.adapters.attention import find_attention_units
from yopo.plan import plan_widths

IDS = torch.arange(3, 20)[None]


def plan_of(model, ratio, seed=0):
    units = find_attention_units(model)
    widths = plan_widths(units, ratio, multiple_of=1)
    generator = torch.Generator().manual_seed(seed)
    kept = {
        unit.name: torch.randperm(unit.rows, generator=generator)[: widths[unit.name]].sort().values
        for unit in units
    }
    return units, yopo.PruningPlan(kept=kept, rows={u.name: u.rows for u in units}, ratio=ratio)


@pytest.mark.parametrize("kind", ["opt"])
def test_cutting_heads_without_rotation_equals_silencing_their_dimensions(tiny_model, kind):
    model, silenced = tiny_model(kind), tiny_model(kind)
    units, plan = plan_of(model, 0.5)
    yopo.apply_plan(model, plan, ffns=units)
    with torch.no_grad():
        for unit in find_attention_units(silenced):
            dropped = torch.ones(unit.rows, dtype=torch.bool)
            dropped[plan.kept[unit.name]] = False
            for slot in unit.slots:
                slot.read(unit.rows)[dropped] = 0.0
        for layer in silenced.model.decoder.layers:  # logits are scaled by the size of a head
            layer.self_attn.scaling *= 2**0.5
        torch.testing.assert_close(model(IDS).logits, silenced(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [("llama", {}), ("llama", {"num_key_value_heads": 2}), ("opt", {}), ("phi", {})],
)
def test_a_model_with_smaller_heads_saves_and_loads_with_equal_logits(
    tiny_model, kind, overrides, tmp_path
):
    model = tiny_model(kind, **overrides)
    pruner = yopo.PolicyPruner.prunenet(episodes=1, attention=True).fit(model)
    before = sum(parameter.numel() for parameter in model.parameters())
    pruner.prune(model, 0.4)
    assert sum(parameter.numel() for parameter in model.parameters()) < before
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        loaded = yopo.load(tmp_path).eval()
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert type(loaded) is type(model)


def test_rotated_dimensions_leave_in_pairs(tiny_model):
    model = tiny_model("llama")
    _, plan = plan_of(model, 0.5)
    size = 32 // 4
    rotary = {name: kept for name, kept in plan.kept.items() if ".rotary." in name}
    assert {plan.rows[name] for name in rotary} == {size // 2}
    yopo.apply_plan(model, plan, ffns=find_attention_units(model))
    assert model.config.head_dim == size // 2


def test_the_authors_warning_is_given(caplog):
    with caplog.at_level(logging.WARNING):
        yopo.PolicyPruner.prunenet(attention=True)
    assert "advise against" in caplog.text


def test_heads_that_are_normalised_are_refused():
    config = Qwen3Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=64,
    )  # fmt: skip
    with pytest.raises(yopo.UnsupportedModelError, match="attention=False"):
        find_attention_units(Qwen3ForCausalLM(config))


def test_fused_projections_are_refused(tiny_model):
    with pytest.raises(yopo.UnsupportedModelError, match="attention=False"):
        find_attention_units(tiny_model("gpt2"))
