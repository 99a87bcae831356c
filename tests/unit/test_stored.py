"""Where on disk the rows of parameters lie, found by labels, checked by the numbers themselves."""

import re

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from conftest import save
from yopo import UnsupportedModelError, find_ffns
from yopo.shards import read_header
from yopo.stored import Axis, axes_of, find_runs

_MIXTRAL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_MIXTRAL |= {"num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2}


def mixtral(tiny_model, **sizes):
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**_MIXTRAL | sizes))


def axes_in(model):
    return axes_of(find_ffns(model), {id(p): name for name, p in model.named_parameters()})


def stored_in(folder, rename=lambda name: name):
    """Return what lies in a folder, as if its tensors were called otherwise."""
    found = [t for file in sorted(folder.glob("*.safetensors")) for t in read_header(file)[0]]
    return {rename(tensor.name): tensor for tensor in found}


def numbered(model):
    """Give every number of a model that fits into float64 a value of its own."""
    start = 0
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.arange(start, start + parameter.numel()).view(parameter.shape))
            start += parameter.numel()
    return model


def assert_runs_hold(model, runs, stored):
    """Check every run against the numbers on disk, and that together they hold every entry once."""
    axes, parameters = axes_in(model), dict(model.named_parameters())
    seen = {}
    for place, found in runs.items():
        tensor = stored[place].map()
        for number, run in enumerate(found):
            axis = axes[run.parameter]
            matrix = tensor[number] if tensor.dim() > run.rank else tensor
            whole = parameters[run.parameter].detach()
            whole = whole[run.expert] if axis.has_experts else whole
            assert whole.dim() == run.rank
            if axis.rows is None:
                assert run.axis is None
                assert torch.equal(matrix, whole)
                entries = [0]
            else:
                rows = whole.movedim(axis.rows, 0)
                assert torch.equal(matrix.movedim(run.axis, 0), rows[run.entries_N])
                entries = run.entries_N.tolist()
            seen.setdefault((run.parameter, run.expert), []).extend(entries)
    for name, axis in axes.items():
        shape = parameters[name].shape
        for expert in range(shape[0] if axis.has_experts else 1):
            size = 1 if axis.rows is None else shape[axis.rows + axis.has_experts]
            assert sorted(seen[name, expert]) == list(range(size)), name
    return runs


KINDS = {
    "llama": {},
    "opt": {},
    "phi": {},
    "phi3": {},
    "gpt2": {},
    "t5": {},
    "qwen2_moe": {},
    "gpt_oss": {},
    "square llama": {"intermediate_size": 32},
    "square phi3": {"intermediate_size": 32},
    "square gpt2": {"n_inner": 32},
    "square qwen2_moe": {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    "half-square qwen2_moe": {"moe_intermediate_size": 16},
    "square gpt_oss": {"intermediate_size": 32},
    "half-square gpt_oss": {"intermediate_size": 16},
    "one-row llama": {"intermediate_size": 1},
    "one-row gpt2": {"n_inner": 1},
    "one-row phi3": {"intermediate_size": 1},
    "one-row qwen2_moe": {"moe_intermediate_size": 1, "shared_expert_intermediate_size": 1},
    "one-row gpt_oss": {"intermediate_size": 1},
    "two-row llama": {"intermediate_size": 2},
    "two-row gpt2": {"n_inner": 2},
    "two-row qwen2_moe": {"moe_intermediate_size": 2, "shared_expert_intermediate_size": 2},
    "two-row gpt_oss": {"intermediate_size": 2},
    "two-expert qwen2_moe": {"num_experts": 2},
    "as-many-experts-as-rows qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 4},
    "square mixtral": {"intermediate_size": 32},
    "mixtral": {"intermediate_size": 24},
    "one-row mixtral": {"intermediate_size": 1},
    "two-row mixtral": {"intermediate_size": 2, "num_local_experts": 2},
}


@pytest.mark.parametrize("case", KINDS)
def test_every_run_names_the_entries_that_lie_there(tiny_model, tmp_path, case):
    kind, sizes = case.rpartition(" ")[2], KINDS[case]
    build = mixtral if kind == "mixtral" else None
    model = numbered(build(tiny_model, **sizes) if build else tiny_model(kind, **sizes))
    stored = stored_in(save(model, tmp_path))
    assert_runs_hold(model, find_runs(model, axes_in(model), stored), stored)


def test_a_model_on_the_meta_device_has_the_same_runs(tiny_model, skeleton_of, tmp_path):
    model = numbered(tiny_model("qwen2_moe"))
    stored, axes = stored_in(save(model, tmp_path)), axes_in(model)
    assert_runs_hold(model, find_runs(skeleton_of(model), axes, stored), stored)


def test_experts_that_are_stored_one_by_one_are_named_each(tiny_model, tmp_path):
    model = tiny_model("qwen2_moe", num_hidden_layers=1)
    runs = find_runs(model, axes_in(model), stored_in(save(model, tmp_path)))
    experts = "model.layers.0.mlp.experts"
    (up,) = runs[f"{experts}.2.up_proj.weight"]
    assert (up.parameter, up.expert, up.axis) == (f"{experts}.gate_up_proj", 2, 0)
    assert up.entries_N.tolist() == list(range(24, 48))
    (down,) = runs[f"{experts}.3.down_proj.weight"]
    assert (down.parameter, down.expert, down.axis) == (f"{experts}.down_proj", 3, 1)


def test_mixtral_keeps_the_names_that_its_checkpoints_always_had(tiny_model, tmp_path):
    model = mixtral(tiny_model, intermediate_size=24)
    runs = find_runs(model, axes_in(model), stored_in(save(model, tmp_path)))
    (run,) = runs["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    assert run.parameter == "model.layers.1.mlp.experts.gate_up_proj"
    assert run.expert == 2
    assert run.entries_N.tolist() == list(range(24, 48))


@pytest.mark.parametrize("kind", ["qwen2_moe", "gpt_oss"])
def test_experts_that_are_stored_in_one_tensor_have_a_run_each(tiny_model, tmp_path, kind):
    model = numbered(tiny_model(kind, num_hidden_layers=1))
    save_file({n: p.detach() for n, p in model.named_parameters()}, tmp_path / "a.safetensors")
    stored = stored_in(tmp_path)
    runs = assert_runs_hold(model, find_runs(model, axes_in(model), stored), stored)
    found = runs["model.layers.0.mlp.experts.gate_up_proj"]
    assert [run.expert for run in found] == [0, 1, 2, 3]
    assert {run.axis for run in found} == {0 if kind == "qwen2_moe" else 1}


def test_conv1d_is_stored_with_its_rows_in_columns(tiny_model, tmp_path):
    model = tiny_model("gpt2", n_layer=1)
    runs = find_runs(model, axes_in(model), stored_in(save(model, tmp_path)))
    axes = {place.removeprefix("transformer.h.0.mlp."): run.axis for place, (run,) in runs.items()}
    assert axes == {"c_fc.weight": 1, "c_fc.bias": 0, "c_proj.weight": 0, "c_proj.bias": None}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_base_models_and_those_with_a_head_find_one_anothers_names(tiny_model, tmp_path, kind):
    model = numbered(tiny_model(kind))
    prefix = f"{model.base_model_prefix}."
    save(model, tmp_path / "headed")
    save(model.base_model, tmp_path / "bare")
    bare = stored_in(tmp_path / "bare")
    assert not any(name.startswith(prefix) for name in bare)
    assert_runs_hold(model, find_runs(model, axes_in(model), bare), bare)
    headed, base = stored_in(tmp_path / "headed"), model.base_model
    assert_runs_hold(base, find_runs(base, axes_in(base), headed), headed)


def test_a_tied_matrix_is_found_under_whichever_name_it_was_saved(tiny_model, tmp_path):
    model = tiny_model("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    numbered(model)
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    for layer in "01":
        folder = tmp_path / layer
        folder.mkdir()
        moved = {
            name.replace("layers.0.mlp", f"layers.{layer}.mlp"): t for name, t in tensors.items()
        }
        save_file(moved, folder / "a.safetensors")
        stored = stored_in(folder)
        runs = find_runs(model, axes_in(model), stored)
        assert all(f"layers.{layer}.mlp" in place for place in runs)
        assert_runs_hold(model, runs, stored)


class _Alone(nn.Module):
    """Parameters of every number of axes."""

    def __init__(self):
        super().__init__()
        self.number = nn.Parameter(torch.tensor(0.5))
        self.one = nn.Parameter(torch.ones(1))
        self.vector = nn.Parameter(torch.arange(5.0))
        self.matrix = nn.Parameter(torch.arange(6.0).view(2, 3))


def test_what_holds_no_rows_is_found_whatever_its_shape(tmp_path):
    model = _Alone()
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    stored = stored_in(tmp_path)
    runs = find_runs(model, {name: Axis(None) for name in model.state_dict()}, stored)
    assert runs.keys() == model.state_dict().keys()
    assert all(run.axis is None and len(run.entries_N) == 0 for (run,) in runs.values())


@pytest.mark.parametrize(
    ("kind", "missing"),
    [
        ("llama", "model.layers.1.mlp.up_proj.weight"),
        ("gpt2", "transformer.h.0.mlp.c_fc.bias"),
        ("gpt2", "transformer.h.0.mlp.c_proj.bias"),
        ("qwen2_moe", "model.layers.0.mlp.experts.2.up_proj.weight"),
        ("gpt_oss", "model.layers.1.mlp.experts.down_proj"),
    ],
)
def test_a_missing_tensor_is_told_with_the_way_out(tiny_model, tmp_path, kind, missing):
    model = tiny_model(kind)
    stored = stored_in(save(model, tmp_path))
    del stored[missing]
    expected = rf"`{re.escape(missing)}` is missing from the checkpoint.*`save_pretrained`"
    with pytest.raises(UnsupportedModelError, match=expected):
        find_runs(model, axes_in(model), stored)


@pytest.mark.parametrize(
    ("kind", "other", "place", "found", "needed"),
    [
        ("llama", {"intermediate_size": 81}, "gate_proj.weight", (81, 32), (80, 32)),
        ("llama", {"hidden_size": 64}, "gate_proj.weight", (80, 64), (80, 32)),
        ("gpt2", {"n_embd": 64, "n_inner": 128}, "c_fc.weight", (64, 128), (32, 128)),
        ("qwen2_moe", {"moe_intermediate_size": 25}, "down_proj.weight", (32, 25), (32, 24)),
        ("qwen2_moe", {"hidden_size": 64}, "down_proj.weight", (64, 24), (32, 24)),
        ("gpt_oss", {"num_local_experts": 5}, "gate_up_proj", (5, 32, 96), (4, 32, 96)),
        ("phi3", {"intermediate_size": 40}, "gate_up_proj.weight", (80, 32), (160, 32)),
    ],
)
def test_a_tensor_of_another_shape_is_told(tiny_model, tmp_path, kind, other, place, found, needed):
    stored = stored_in(save(tiny_model(kind, **other), tmp_path))
    model = tiny_model(kind)
    told = f".{place}` has shape {found} in the checkpoint, where the config asks for {needed}."
    with pytest.raises(UnsupportedModelError, match=re.escape(told)):
        find_runs(model, axes_in(model), stored)


def test_a_vector_of_another_length_is_told(tiny_model, tmp_path):
    model = tiny_model("gpt2")
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    place = "transformer.h.0.mlp.c_proj.bias"
    save_file(tensors | {place: torch.ones(31)}, tmp_path / "a.safetensors")
    with pytest.raises(
        UnsupportedModelError, match=r"c_proj\.bias` has shape \(31,\) in.* \(32,\)"
    ):
        find_runs(model, axes_in(model), stored_in(tmp_path))
