import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import relu, silu
from transformers import LlamaForCausalLM, PreTrainedConfig, PreTrainedModel

import yopo
from tiny_models import tiny_model, tiny_of
from yopo import InvalidArgumentError, UnsupportedModelError
from yopo.adapters.layouts import LAYOUTS


class OddConfig(PreTrainedConfig):
    model_type = "odd"

    def __init__(
        self, vocab_size=40, width=16, inner=24, squash=0, tower_inner=0, kind="plain", **kwargs
    ):
        self.vocab_size, self.width, self.kind = vocab_size, width, kind
        self.inner, self.squash, self.tower_inner = inner, squash, tower_inner
        super().__init__(**kwargs)


class OddFfn(nn.Module):
    """An FFN under names that no table holds, of several kinds."""

    def __init__(self, config, rows, kind):
        super().__init__()
        self.kind = kind
        expand = 2 * rows if kind == "interleaved" else rows
        self.widen = nn.Linear(config.width, expand)
        self.narrow = nn.Linear(rows, config.width)
        if kind == "gated":
            self.open = nn.Linear(config.width, rows)
        self.register_buffer("ramp", torch.linspace(0.1, 2.0, rows), persistent=False)

    def forward(self, states):
        hidden = self.widen(states)
        if self.kind == "interleaved":
            hidden = silu(hidden[..., 0::2]) * hidden[..., 1::2]
        elif self.kind == "gated":
            hidden = torch.sigmoid(self.open(states)) * hidden
        elif self.kind == "weighted":
            hidden = relu(hidden) * self.ramp
        elif self.kind == "neighbours":
            hidden = relu(hidden) + relu(hidden).roll(1, dims=-1)
        elif self.kind == "noisy":
            hidden = relu(hidden) + torch.rand(())
        else:
            hidden = relu(hidden)
        return self.narrow(hidden)


class OddModel(PreTrainedModel):
    config_class = OddConfig
    main_input_name = "input_ids"

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.stack = nn.ModuleList(
            OddFfn(config, config.squash or config.inner, config.kind) for _ in range(2)
        )
        self.runs = 0
        self.post_init()

    def forward(self, input_ids, **kwargs):
        self.runs += 1
        if self.config.kind == "fails later" and self.runs > 1:
            raise RuntimeError("out of memory")
        states = self.embed(input_ids)
        for ffn in self.stack:
            states = states + ffn(states)
        return states


def odd_model(kind="plain", **sizes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = OddModel(OddConfig(kind=kind, **sizes)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape))
    return model


class TowerModel(OddModel):
    """A model with an FFN that its forward pass does not reach."""

    tower_kind = "plain"

    def __init__(self, config):
        super().__init__(config)
        self.tower = OddFfn(config, config.tower_inner or config.inner, self.tower_kind)


class WeightedTowerModel(TowerModel):
    tower_kind = "weighted"


class ProjectedModel(OddModel):
    """A model whose width is the input of a projector as well."""

    def __init__(self, config):
        super().__init__(config)
        self.projector = nn.Linear(config.inner, config.width)


@pytest.fixture
def adapters():
    """Take back what a test registers."""
    before = list(LAYOUTS)
    yield
    LAYOUTS[:] = before


@pytest.mark.parametrize("kind", ["plain", "gated", "noisy"])
@pytest.mark.parametrize("sizes", [{"inner": 24}, {"inner": 16}, {"inner": 40}])
def test_an_unknown_architecture_is_found_by_the_config_field_of_its_width(kind, sizes):
    model = odd_model(kind, **sizes)
    ffns = yopo.find_ffns(model)
    assert [ffn.name for ffn in ffns] == ["stack.0", "stack.1"]
    assert {ffn.rows for ffn in ffns} == {sizes["inner"]}
    assert {str(ffn.width) for ffn in ffns} == {"inner"}
    assert not any(ffn.known for ffn in ffns)


def test_a_field_with_no_telling_name_is_found_where_none_has_one():
    model = odd_model(squash=20, inner=7)
    assert {str(ffn.width) for ffn in yopo.find_ffns(model)} == {"squash"}


def test_an_unknown_architecture_is_pruned_and_loads_again(tmp_path):
    model = odd_model("gated")
    ids = torch.arange(10).view(1, 10)
    plan = yopo.plan_by_criterion(model, 0.5, criterion=yopo.criteria.norm_product)
    yopo.apply_plan(model, plan)
    model.save_pretrained(tmp_path)
    loaded = OddModel.from_pretrained(tmp_path)
    assert loaded.config.inner == 12
    torch.testing.assert_close(loaded(ids), model(ids))


def test_an_ffn_that_the_trial_run_does_not_reach_is_run_by_itself():
    ffns = yopo.find_ffns(TowerModel(OddConfig(tower_inner=20)))
    assert [ffn.name for ffn in ffns] == ["stack.0", "stack.1", "tower"]
    assert str(ffns[-1].width) == "tower_inner"


def test_what_cannot_be_proved_is_left_alone_where_there_are_other_ffns():
    model = WeightedTowerModel(OddConfig(tower_inner=20))
    assert [ffn.name for ffn in yopo.find_ffns(model)] == ["stack.0", "stack.1"]


def test_what_cannot_be_proved_is_refused_where_it_shares_the_field_of_the_others():
    with pytest.raises(UnsupportedModelError, match="`tower` looks like an FFN"):
        yopo.find_ffns(WeightedTowerModel(OddConfig()))


def test_a_field_that_sizes_something_else_too_is_not_the_field_of_the_width():
    assert [ffn.width for ffn in yopo.find_ffns(ProjectedModel(OddConfig()))] == [None, None]


@pytest.mark.parametrize("kind", ["weighted", "neighbours"])
def test_what_is_no_ffn_although_it_looks_like_one_is_refused(kind):
    with pytest.raises(UnsupportedModelError, match="permuting its rows changes its output"):
        yopo.find_ffns(odd_model(kind))


def test_an_adapter_teaches_names_and_is_proved(adapters):
    yopo.register_adapter(expand=["widen", "open"], contract="narrow")
    model = odd_model("gated")
    ffns = yopo.find_ffns(model)
    assert [ffn.name for ffn in ffns] == ["stack.0", "stack.1"]
    assert [slot.module for slot in ffns[0].expand] == [model.stack[0].widen, model.stack[0].open]
    assert model.runs == 2
    for ffn in model.stack:  # now the gate meets the rows in another order
        ffn.open.register_forward_hook(lambda module, inputs, output: output.flip(-1))
    with pytest.raises(UnsupportedModelError, match="permuting its rows changes its output"):
        yopo.find_ffns(model)


def test_an_adapter_for_a_fused_pair_says_how_its_halves_lie(adapters):
    model = odd_model("interleaved")
    yopo.register_adapter(expand=["widen"], contract="narrow", order="halves")
    with pytest.raises(UnsupportedModelError, match="permuting its rows changes its output"):
        yopo.find_ffns(model)
    yopo.register_adapter(expand=["widen"], contract="narrow", order="interleaved")
    ffn = yopo.find_ffns(model)[0]
    assert [(slot.start, slot.step) for slot in ffn.expand] == [(0, 2), (1, 2)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"expand": [], "contract": "x"}, "one or two matrices"),
        ({"expand": ["a", "b", "c"], "contract": "x"}, "one or two matrices"),
        ({"expand": "abc", "contract": "x"}, "one or two matrices"),
        ({"expand": ["a"], "contract": "x", "order": "mixed"}, "`order` must be"),
    ],
)
def test_an_adapter_that_makes_no_sense_is_refused(adapters, arguments, message):
    before = list(LAYOUTS)
    with pytest.raises(InvalidArgumentError, match=message):
        yopo.register_adapter(**arguments)
    assert before == LAYOUTS


def test_registering_twice_changes_nothing(adapters):
    yopo.register_adapter(expand=["widen"], contract="narrow")
    before = list(LAYOUTS)
    yopo.register_adapter(expand=["widen"], contract="narrow")
    assert before == LAYOUTS


@pytest.mark.parametrize("kind", ["plain", "noisy", "weighted", "fails later"])
@pytest.mark.parametrize("training", [True, False])
def test_a_proof_leaves_no_trace(kind, training):
    model = odd_model(kind).train(training)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    message = {"weighted": "changes its output", "fails later": "out of memory"}.get(kind)
    with pytest.raises(UnsupportedModelError, match=message) if message else nullcontext():
        yopo.find_ffns(model)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert all(module.training == training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_without_an_ffn_is_refused():
    for model_type in ("mamba", "mamba2", "falcon_mamba"):
        with pytest.raises(UnsupportedModelError, match="no FFN was found"):
            yopo.find_ffns(tiny_model(model_type))


def test_matrices_that_are_partly_shared_are_refused():
    model = tiny_of(LlamaForCausalLM)
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(UnsupportedModelError, match="shares some of its matrices"):
        yopo.find_ffns(model)


def test_layers_that_share_all_their_matrices_count_once():
    model = tiny_of(LlamaForCausalLM)
    model.model.layers[1].mlp = model.model.layers[0].mlp
    names = [ffn.name for ffn in yopo.find_ffns(model)]
    assert names == [f"model.layers.{index}.mlp" for index in (0, 2, 3)]


def test_unknown_weights_on_the_meta_device_cannot_be_proved():
    with torch.device("meta"):
        model = OddModel(OddConfig())
    with pytest.raises(UnsupportedModelError, match="meta device"):
        yopo.find_ffns(model)
