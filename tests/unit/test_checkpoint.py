"""A folder of safetensors files as a model without weights, against the same model in memory."""

import gc
import json
import threading
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils import parametrizations, prune

import yopo
from conftest import CONFIGS, build, files_in, save
from yopo import InvalidArgumentError, PruningPlan, UnsupportedModelError, find_ffns
from yopo.adapters import SOURCES
from yopo.checkpoint import open_checkpoint


def changed(file, **entries):
    """Change entries of a JSON file; None removes one."""
    document = json.loads(file.read_text()) | entries
    file.write_text(
        json.dumps({key: value for key, value in document.items() if value is not None})
    )


def renamed(folder, rename):
    """Store the tensors of a single-file checkpoint under other names."""
    file = folder / "model.safetensors"
    save_file({rename(name): tensor for name, tensor in load_file(file).items()}, file)


def weights_of(ffn):
    """Return copies of everything that is there while an FFN is loaded."""
    with ffn.loaded():
        found = [*ffn.expand_weights(), ffn.contract_weight()]
        found += [slot.read(ffn.rows) for slot in ffn.vectors]
        bias = ffn.bias_parameter
        found += [] if bias is None else [bias.detach()]
        found += [] if ffn.norm is None else [p.detach() for p in ffn.norm.parameters()]
        return [tensor.clone() for tensor in found]


def assert_holds(opened, model):
    """Check that each FFN of a checkpoint loads exactly what the model in memory holds."""
    ffns = find_ffns(model)
    assert [ffn.name for ffn in opened.ffns] == [ffn.name for ffn in ffns]
    for on_disk, in_memory in zip(opened.ffns, ffns, strict=True):
        pairs = list(zip(weights_of(on_disk), weights_of(in_memory), strict=True))
        assert pairs
        for found, expected in pairs:
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected), on_disk.name


KINDS = pytest.mark.parametrize("kind", CONFIGS)


@KINDS
@pytest.mark.parametrize("in_shards", [False, True])
def test_ffns_load_exactly_what_memory_holds(tmp_path, kind, in_shards):
    model = build(kind, dtype=torch.bfloat16)
    assert_holds(open_checkpoint(save(model, tmp_path, in_shards=in_shards)), model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_every_dtype_is_loaded_as_it_is(tmp_path, dtype):
    model = build("qwen2_moe", dtype=dtype)
    assert_holds(open_checkpoint(save(model, tmp_path)), model)


def test_embeddings_can_be_loaded_too(tmp_path):
    model = build("llama", tie_word_embeddings=True)
    opened = open_checkpoint(save(model, tmp_path)).model
    table = opened.get_input_embeddings()
    with SOURCES[opened]([table]):
        assert torch.equal(table.weight, model.model.embed_tokens.weight)
    assert table.weight.is_meta


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_names_of_the_base_model_serve_a_model_with_a_head_and_the_other_way(tmp_path, kind):
    headed = build(kind)
    prefix = f"{headed.base_model_prefix}."
    save(headed, tmp_path / "headed", in_shards=False)
    save(headed.base_model, tmp_path / "bare", in_shards=False)
    names = [type(headed).__name__, type(headed.base_model).__name__]
    changed(tmp_path / "headed" / "config.json", architectures=names[1:])
    changed(tmp_path / "bare" / "config.json", architectures=names[:1])
    opened = open_checkpoint(tmp_path / "bare")
    assert type(opened.model) is type(headed)
    assert_holds(opened, headed)
    opened = open_checkpoint(tmp_path / "headed")
    assert type(opened.model) is type(headed.base_model)
    assert any(name.startswith(prefix) for name in opened.runs)
    assert_holds(opened, headed.base_model)


def test_experts_that_are_stacked_on_disk_are_loaded_too(tmp_path):
    model = build("qwen2_moe")
    save(model, tmp_path, in_shards=False)
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    save_file(tensors, tmp_path / "model.safetensors")
    assert_holds(open_checkpoint(tmp_path), model)


@pytest.mark.parametrize("kind", ["llama", "qwen2_moe"])
def test_a_checkpoint_of_unequal_widths_that_yopo_cut_before_is_opened(tmp_path, kind):
    model = build(kind)
    ffns = find_ffns(model)
    kept = {ffn.name: torch.arange(ffn.rows) for ffn in ffns}
    chosen = [ffn.name for ffn in ffns if ffn.name.startswith(ffns[0].path)]
    kept |= {name: kept[name][::3] for name in chosen}
    yopo.apply_plan(model, PruningPlan(kept, {ffn.name: ffn.rows for ffn in ffns}, 0.2))
    opened = open_checkpoint(save(model, tmp_path))
    assert "yopo_widths" in json.loads((tmp_path / "config.json").read_text())
    assert {ffn.rows for ffn in opened.ffns} == {ffn.rows for ffn in find_ffns(model)}
    assert_holds(opened, model)


def test_a_single_file_wins_over_an_index_as_in_transformers(tmp_path):
    other, model = build("llama", seed=1), build("llama")
    save(other, tmp_path / "other")
    save(model, tmp_path / "model", in_shards=False)
    for file in (tmp_path / "other").glob("model*"):
        file.rename(tmp_path / "model" / file.name)
    loaded = type(model).from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert_holds(open_checkpoint(tmp_path / "model"), model)


def everything_is_empty(model):
    return all(tensor.is_meta for tensor in model.parameters())


def test_parameters_are_on_the_meta_device_again_afterwards(tmp_path):
    opened = open_checkpoint(save(build("qwen2_moe"), tmp_path))
    before = dict(opened.model.named_parameters())
    assert everything_is_empty(opened.model)
    first, other = opened.ffns[0], opened.ffns[-1]
    with first.loaded():
        assert not first.contract.parameter.is_meta
        assert not first.contract.parameter.requires_grad
        assert other.contract.parameter.is_meta
        with first.loaded(), other.loaded():
            assert not other.contract.parameter.is_meta
        assert not first.contract.parameter.is_meta
        assert other.contract.parameter.is_meta
    assert everything_is_empty(opened.model)
    after = dict(opened.model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())


def test_an_error_inside_leaves_the_model_empty_too(tmp_path):
    opened = open_checkpoint(save(build("llama"), tmp_path))
    with pytest.raises(ZeroDivisionError), opened.ffns[0].loaded():
        raise ZeroDivisionError
    assert everything_is_empty(opened.model)


def test_a_file_that_vanishes_for_a_while_is_an_error_and_can_be_read_again(tmp_path):
    model = build("llama")
    opened = open_checkpoint(save(model, tmp_path / "here", in_shards=False))
    (tmp_path / "here").rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError), opened.ffns[0].loaded():
        pass
    assert everything_is_empty(opened.model)
    (tmp_path / "away").rename(tmp_path / "here")
    assert_holds(opened, model)


@pytest.mark.parametrize("kind", ["llama", "qwen2_moe"])
def test_threads_may_load_at_once(tmp_path, kind):
    model = build(kind)
    opened = open_checkpoint(save(model, tmp_path))
    expected = {ffn.name: weights_of(ffn) for ffn in find_ffns(model)}
    wrong, gate = [], threading.Barrier(6)

    def read(number):
        gate.wait()
        for turn in range(5 * len(opened.ffns)):
            ffn = opened.ffns[(turn * (number // 2 + 1)) % len(opened.ffns)]
            found = weights_of(ffn)
            if not all(map(torch.equal, found, expected[ffn.name])):
                wrong.append(ffn.name)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert everything_is_empty(opened.model)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not tell")
@pytest.mark.parametrize("kind", ["llama", "qwen2_moe", "gpt2"])
def test_the_skeleton_is_garbage_afterwards_and_nothing_stays_mapped(tmp_path, kind):
    opened = open_checkpoint(save(build(kind), tmp_path))
    for ffn in opened.ffns:
        weights_of(ffn)
    del ffn
    gc.collect()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    model, known = weakref.ref(opened.model), len(SOURCES)
    del opened
    gc.collect()
    assert model() is None
    assert len(SOURCES) < known


def test_opening_reads_no_weights_and_changes_nothing(tmp_path, monkeypatch):
    save(build("qwen2_moe"), tmp_path)
    before, seed = files_in(tmp_path), torch.random.get_rng_state()
    monkeypatch.setattr("yopo.shards.Stored.map", lambda self: 1 / 0)
    open_checkpoint(str(tmp_path))
    assert files_in(tmp_path) == before
    assert torch.equal(torch.random.get_rng_state(), seed)


# What is refused.


def test_an_adapter_beside_a_model_is_refused_with_the_way_to_merge_it(tmp_path):
    save(build("llama"), tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedModelError, match=r"PEFT adapter beside.*merge_and_unload"):
        open_checkpoint(tmp_path)


def mask(linear):
    prune.l1_unstructured(linear, "weight", 0.3)


@pytest.mark.parametrize("name", ["mlp.up_proj", "self_attn.q_proj"])
@pytest.mark.parametrize(
    ("change", "found"),
    [(mask, "weight_orig"), (parametrizations.weight_norm, "parametrizations.weight.original0")],
)
def test_masks_and_parametrisations_are_refused_wherever_they_are(tmp_path, change, found, name):
    model = build("llama")
    change(model.model.layers[1].get_submodule(name))
    save(model, tmp_path)
    with pytest.raises(UnsupportedModelError, match=rf"{name}\.{found}`, of a mask or.*remove`"):
        open_checkpoint(tmp_path)


def test_a_quantised_model_is_refused(tmp_path):
    save(build("llama"), tmp_path)
    changed(tmp_path / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UnsupportedModelError, match=r"holds a quantised model.*unquantised model"):
        open_checkpoint(tmp_path)


def test_matrices_in_integers_or_eight_bits_are_refused(tmp_path):
    save(build("llama"), tmp_path, in_shards=False)
    tensors = load_file(tmp_path / "model.safetensors")
    place = "model.layers.1.mlp.up_proj.weight"
    for dtype, name in ((torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")):
        tensors[place] = tensors[place].to(dtype)
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(UnsupportedModelError, match=f"`{place}` is stored as {name}; yopo pr"):
            open_checkpoint(tmp_path)


def test_a_damaged_shard_is_named(tmp_path):
    save(build("llama"), tmp_path)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(InvalidArgumentError, match=f"{shard.name}` is cut short"):
        open_checkpoint(tmp_path)


def test_a_folder_without_weights_or_config_is_told(tmp_path):
    with pytest.raises(InvalidArgumentError, match=r"holds no weights: neither `model\.safet"):
        open_checkpoint(tmp_path)
    save(build("llama"), tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(InvalidArgumentError, match=r"holds no model: `config\.json` is missing"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("names", [["MyOwnModel"], [], None])
def test_an_unknown_class_is_told(tmp_path, names):
    save(build("llama"), tmp_path)
    changed(tmp_path / "config.json", architectures=names)
    with pytest.raises(InvalidArgumentError, match=r"names the architecture .* does not have"):
        open_checkpoint(tmp_path)


def test_tensors_under_names_that_transformers_does_not_use_are_refused(tmp_path):
    save(build("llama"), tmp_path, in_shards=False)
    renamed(tmp_path, lambda name: name.replace("mlp.up_proj", "feed_forward.w3"))
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.mlp\.up_proj\.weight` is missing"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("field", "told"),
    [
        ("intermediate_size", r"layers\.0.*` has shape \(80, 32\).* config asks for \(3, 32\)"),
        (
            "num_hidden_layers",
            r"`model\.layers\.2\.mlp\.gate_proj\.weight` is missing from the che",
        ),
    ],
)
def test_a_config_of_another_model_is_told_by_what_is_missing_or_by_both_shapes(
    tmp_path, field, told
):
    save(build("llama"), tmp_path)
    changed(tmp_path / "config.json", **{field: 3})
    with pytest.raises(UnsupportedModelError, match=told):
        open_checkpoint(tmp_path)
