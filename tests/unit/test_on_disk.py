"""Checkpoints that are pruned on disk, against the same models pruned in memory and saved."""

import json
import logging
import os
import shutil
from collections import namedtuple
from dataclasses import replace

import pytest
import torch
import transformers
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import yopo
from conftest import CONFIGS, assert_same, build, files_in, save, tensors_in
from tiny_models import tiny_model
from yopo import InvalidArgumentError, PolicyPruner, UnsupportedModelError
from yopo.checkpoint_files import INDEX
from yopo.criteria import plan_by_criterion, row_norm
from yopo.shards import read_header

RATIO = 0.4

OWN = {"README.md", "pruning_report.json"}
"""What yopo itself puts beside a pruned checkpoint."""

METHODS = {
    "lean": PolicyPruner.lean,
    "prunenet": lambda: PolicyPruner.prunenet(episodes=2, seed=3),
    "weights": lambda: PolicyPruner(evidence="weights", seed=1),
    "spectral": lambda: PolicyPruner(reward="spectral", episodes=2, restore=False),
    "adaptive": lambda: PolicyPruner(evidence="weights", allocation="adaptive"),
}

CASES = [
    *(("lean", kind, "bfloat16", True) for kind in CONFIGS),
    *(("plan", kind, "float16", False) for kind in CONFIGS if kind not in ("t5", "gpt_oss")),
    ("plan", "t5", "bfloat16", True),
    ("plan", "gpt_oss", "float32", True),
    ("plan", "qwen2_moe", "float32", False),
    ("prunenet", "llama", "bfloat16", True),
    ("prunenet", "gpt2", "float32", True),
    ("prunenet", "phi3", "float16", False),
    ("weights", "opt", "bfloat16", False),
    ("weights", "qwen2_moe", "float32", True),
    ("spectral", "llama", "bfloat16", True),
    ("spectral", "gpt2", "float32", False),
    ("adaptive", "phi", "float32", True),
    ("adaptive", "qwen2_moe", "bfloat16", True),
]


@pytest.fixture(autouse=True)
def no_noise():
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def in_memory(source, folder, prune):
    """Load what lies in `source`, prune it by `prune`, save it, and return both."""
    model = yopo.load(source, dtype="auto")
    prune(model)
    return save(model, folder), model


def assert_equal_folders(target, expected):
    assert_same(tensors_in(target), tensors_in(expected))
    assert config_of(target) == config_of(expected)


def plan_for(model, ratio=RATIO):
    return plan_by_criterion(model, ratio, criterion=row_norm)


@pytest.mark.parametrize(("method", "kind", "dtype", "in_shards"), CASES)
def test_the_result_equals_pruning_in_memory_and_saving(tmp_path, method, kind, dtype, in_shards):
    source, target = tmp_path / "source", tmp_path / "target"
    save(build(kind, dtype=getattr(torch, dtype)), source, in_shards=in_shards)
    before = files_in(source)
    if method == "plan":
        plan = plan_for(yopo.load(source, dtype="auto"))
        found = yopo.prune_checkpoint(source, target, plan=plan)
        assert found == plan

        def prune(model):
            yopo.apply_plan(model, plan)
    else:
        found = yopo.prune_checkpoint(source, target, RATIO, pruner=METHODS[method]())

        def prune(model):
            METHODS[method]().fit(model).prune(model, RATIO)

    expected, model = in_memory(source, tmp_path / "m", prune)
    assert_equal_folders(target, expected)
    assert found.widths == {ffn.name: ffn.rows for ffn in yopo.find_ffns(model)}
    assert files_in(source) == before
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []
    names = [{file.name for file in folder.iterdir()} for folder in (target, source)]
    assert names[0] == names[1] | OWN


@pytest.mark.parametrize("kind", ["t5", "gpt_oss"])
def test_what_transformers_lifts_to_float32_in_memory_keeps_its_dtype_on_disk(tmp_path, kind):
    """Of some models in float16 it loads some parameters in float32, and saves them so."""
    source = save(build(kind, dtype=torch.float16), tmp_path / "source")
    plan = plan_for(yopo.load(source, dtype="auto"))
    yopo.prune_checkpoint(source, tmp_path / "target", plan=plan)
    expected, _ = in_memory(source, tmp_path / "m", lambda m: yopo.apply_plan(m, plan))
    lifted = tensors_in(expected)
    assert {tensor.dtype for tensor in lifted.values()} == {torch.float16, torch.float32}
    assert_same(tensors_in(tmp_path / "target"), {name: t.half() for name, t in lifted.items()})


@pytest.mark.parametrize("model_type", ["ctrl", "roberta-prelayernorm"])
def test_rare_layouts_are_known_so_that_none_has_to_be_proved(tmp_path, model_type):
    source = save(tiny_model(model_type), tmp_path / "source")
    yopo.prune_checkpoint(source, tmp_path / "target", RATIO)
    expected, _ = in_memory(
        source, tmp_path / "m", lambda m: PolicyPruner.lean().fit(m).prune(m, RATIO)
    )
    assert_equal_folders(tmp_path / "target", expected)


def test_matrices_that_lie_in_one_tensor_on_disk_and_in_two_in_memory_are_refused(tmp_path):
    source = save(tiny_model("hrm_text"), tmp_path / "source")
    with pytest.raises(UnsupportedModelError, match=r"holds both `.*gate_proj.*` and `.*up_proj"):
        yopo.prune_checkpoint(source, tmp_path / "target", RATIO)
    assert not (tmp_path / "target").exists()
    model = yopo.load(source)
    PolicyPruner.lean().fit(model).prune(model, RATIO)
    model.save_pretrained(tmp_path / "target")
    assert yopo.load(tmp_path / "target").config.intermediate_size == model.config.intermediate_size


@pytest.mark.parametrize("kind", ["gpt2", "qwen2_moe"])
def test_stock_transformers_loads_and_runs_it(tmp_path, logits, kind):
    source = save(build(kind), tmp_path / "source")
    yopo.prune_checkpoint(source, tmp_path / "target", RATIO)
    _, model = in_memory(
        source, tmp_path / "m", lambda m: PolicyPruner.lean().fit(m).prune(m, RATIO)
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "target").eval()
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()


def test_tied_embeddings_stay_tied(tmp_path, logits):
    source = save(build("llama", tie_word_embeddings=True), tmp_path / "source")
    yopo.prune_checkpoint(source, tmp_path / "target", RATIO)
    assert "lm_head.weight" not in tensors_in(tmp_path / "target")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    expected, _ = in_memory(
        source, tmp_path / "m", lambda m: PolicyPruner.lean().fit(m).prune(m, RATIO)
    )
    assert_equal_folders(tmp_path / "target", expected)


@pytest.mark.parametrize(("kind", "name"), [("opt", "fc2.bias"), ("gpt_oss", "down_proj_bias")])
def test_biases_are_re_solved_along_with_their_matrices(tmp_path, kind, name):
    source = save(build(kind), tmp_path / "source")
    yopo.prune_checkpoint(source, tmp_path / "target", RATIO)
    before, after = tensors_in(source), tensors_in(tmp_path / "target")
    biases = [key for key in before if key.endswith(name)]
    assert len(biases) == 2
    assert all(before[key].shape == after[key].shape for key in biases)
    assert not any(torch.equal(before[key], after[key]) for key in biases)


def test_a_given_plan_cuts_and_restores_nothing(tmp_path):
    source = save(build("phi"), tmp_path / "source")
    plan = plan_for(yopo.load(source))
    yopo.prune_checkpoint(source, tmp_path / "target", plan=plan)
    before, after = tensors_in(source), tensors_in(tmp_path / "target")
    for layer in (0, 1):
        kept, mlp = plan.kept[f"model.layers.{layer}.mlp"], f"model.layers.{layer}.mlp"
        assert torch.equal(after[f"{mlp}.fc1.weight"], before[f"{mlp}.fc1.weight"][kept])
        assert torch.equal(after[f"{mlp}.fc2.weight"], before[f"{mlp}.fc2.weight"][:, kept])
        assert torch.equal(after[f"{mlp}.fc2.bias"], before[f"{mlp}.fc2.bias"])


def test_experts_that_lie_in_one_tensor_on_disk_stay_so(tmp_path):
    model = build("qwen2_moe", dtype=torch.bfloat16)
    source = save(model, tmp_path / "source", in_shards=False)
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    yopo.prune_checkpoint(source, tmp_path / "target", RATIO)
    cut = PolicyPruner.lean().fit(model).prune(model, RATIO)
    assert_same(tensors_in(tmp_path / "target"), dict(cut.named_parameters()))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_names_of_the_base_model_are_kept(tmp_path, kind):
    model = build(kind, tie_word_embeddings=True)
    source = save(model.base_model, tmp_path / "source")
    config = config_of(source) | {"architectures": [type(model).__name__]}
    (source / "config.json").write_text(json.dumps(config))
    yopo.prune_checkpoint(source, tmp_path / "target", RATIO)
    prefix = f"{model.base_model_prefix}."
    expected, _ = in_memory(
        source, tmp_path / "m", lambda m: PolicyPruner.lean().fit(m).prune(m, RATIO)
    )
    expected = {name.removeprefix(prefix): t for name, t in tensors_in(expected).items()}
    assert_same(tensors_in(tmp_path / "target"), expected)


def test_tensors_of_other_dtypes_are_copied_untouched(tmp_path):
    source = save(build("llama", dtype=torch.bfloat16), tmp_path / "source", in_shards=False)
    more = {
        "model.layers.0.self_attn.extra": torch.arange(7),
        "scale": torch.arange(5.0).to(torch.float8_e4m3fn),
        "nothing": torch.empty(0, 3),
    }
    file = source / "model.safetensors"
    save_file(load_file(file) | more, file, {"format": "pt"})
    yopo.prune_checkpoint(source, tmp_path / "target", plan=plan_for(yopo.load(source)))
    found = tensors_in(tmp_path / "target")
    assert_same({name: found[name] for name in more}, more)


def test_matrices_of_another_dtype_than_the_rest_keep_it(tmp_path):
    source = save(build("llama", dtype=torch.bfloat16), tmp_path / "source", in_shards=False)
    file, place = source / "model.safetensors", "model.layers.0.mlp.down_proj.weight"
    tensors = load_file(file)
    save_file(tensors | {place: tensors[place].float()}, file, {"format": "pt"})
    yopo.prune_checkpoint(source, tmp_path / "target", RATIO)
    found = tensors_in(tmp_path / "target")
    dtypes = {name: tensor.dtype for name, tensor in found.items()}
    assert dtypes.pop(place) == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}


# How much goes.


@pytest.mark.parametrize(
    "asked",
    [
        {"parameters": 19_000},
        {"bytes": 60_000},
        {"ratio": 0.2, "ratio_of": "model"},
        {"ratio": 0.3, "layers": [1]},
        {"ratio": 0.3, "layers": ["model.layers.0.*"]},
        {"ratio": 0.0},
        {},
    ],
    ids=str,
)
def test_sizes_and_layers_mean_what_they_mean_in_memory(tmp_path, asked):
    source = save(build("llama"), tmp_path / "source")
    found = yopo.prune_checkpoint(source, tmp_path / "target", **asked)
    expected, model = in_memory(
        source, tmp_path / "m", lambda m: PolicyPruner.lean().fit(m).prune(m, **asked)
    )
    assert_equal_folders(tmp_path / "target", expected)
    dense = yopo.load(source)
    assert found == PolicyPruner.lean().fit(dense).plan(dense, **asked)
    loaded = yopo.load(tmp_path / "target")
    for one, other in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_unequal_widths_can_be_cut_again(tmp_path):
    source = save(build("llama"), tmp_path / "source")
    yopo.prune_checkpoint(source, tmp_path / "one", 0.5, layers=[0])
    assert "yopo_widths" in config_of(tmp_path / "one")
    yopo.prune_checkpoint(tmp_path / "one", tmp_path / "two", RATIO)
    expected, _ = in_memory(
        tmp_path / "one", tmp_path / "m", lambda m: PolicyPruner.lean().fit(m).prune(m, RATIO)
    )
    assert_equal_folders(tmp_path / "two", expected)


@pytest.mark.parametrize(
    "asked",
    [
        {"ratio": 0.3},
        {"pruner": PolicyPruner.lean()},
        {"ratio_of": "model"},
        {"parameters": 10},
        {"bytes": 10},
        {"layers": [0]},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_a_plan_goes_with_nothing_that_says_how_much(tmp_path, asked):
    source = save(build("llama"), tmp_path / "source")
    plan = plan_for(yopo.load(source))
    with pytest.raises(InvalidArgumentError, match=r"`plan` says already which rows stay"):
        yopo.prune_checkpoint(source, tmp_path / "target", plan=plan, **asked)
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"ratio": 1.2}, r"`ratio` must be in \[0, 1\)"),
        ({"ratio": 0.3, "bytes": 3e4}, r"at most one|only one|one of"),
        ({"bytes": 10}, r"bytes"),
        ({"layers": ["nothing.*"]}, r"layers"),
        ({"plan": "a plan"}, r"`plan` must be a PruningPlan"),
        (
            {"pruner": "lean"},
            r"`pruner` must be a PolicyPruner, .*`PolicyPruner\.lean\(\)`, got 'le",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_met_is_refused_and_leaves_nothing(tmp_path, asked, told):
    source = save(build("llama"), tmp_path / "source")
    with pytest.raises(InvalidArgumentError, match=told):
        yopo.prune_checkpoint(source, tmp_path / "deep" / "target", **asked)
    assert list(tmp_path.iterdir()) == [source]


def test_the_plan_of_another_model_is_refused_and_leaves_nothing(tmp_path):
    source = save(build("llama"), tmp_path / "source")
    others = ({"num_hidden_layers": 1}, {"num_hidden_layers": 3}, {"intermediate_size": 60})
    for other in (build("llama", **sizes) for sizes in others):
        with pytest.raises(InvalidArgumentError, match="the plan does not fit this model"):
            yopo.prune_checkpoint(source, tmp_path / "target", plan=plan_for(other))
    assert list(tmp_path.iterdir()) == [source]


# The other files.


@pytest.fixture
def furnished(tmp_path):
    """A checkpoint with all that a folder from the hub may hold."""
    source = save(build("llama", dtype=torch.bfloat16), tmp_path / "source")
    others = {
        "tokenizer.json": "{}",
        "tokenizer_config.json": '{"a": 1}',
        "special_tokens_map.json": "{}",
        "vocab.txt": "a\nb\n",
        "chat_template.jinja": "{{ messages }}",
        "README.md": "# Card\n",
        "LICENSE": "free",
        "modeling_own.py": "x = 1\n",
        ".gitattributes": "* text\n",
        "onnx/config.json": "{}",
        "1_Pooling/deep/config.json": '{"pooling": true}',
    }
    stale = ["pytorch_model.bin", "old.safetensors", "onnx/model.onnx", "tf_model.h5", "q4.gguf"]
    stale += ["pytorch_model.bin.index.json", "original/consolidated.00.pth"]
    for name, text in others.items() | {(name, "stale") for name in stale}:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)
    (source / ".git").mkdir()
    (source / ".git" / "HEAD").write_text("ref")
    (source / ".cache" / "huggingface").mkdir(parents=True)
    (source / ".cache" / "huggingface" / "lock").write_text("")
    return namedtuple("Furnished", "folder others stale")(source, others, stale)


def test_every_other_file_comes_along(furnished, tmp_path):
    yopo.prune_checkpoint(furnished.folder, tmp_path / "target", RATIO)
    found = files_in(tmp_path / "target")
    assert {name for name in OWN if found.pop(name)} == OWN
    found["README.md"] = found.pop("README.dense.md")
    for name, text in furnished.others.items():
        assert found.pop(name) == text.encode()
    assert (
        found.pop("generation_config.json") == files_in(furnished.folder)["generation_config.json"]
    )
    assert {INDEX, "config.json"} < found.keys()
    assert all(name.endswith(".safetensors") for name in found.keys() - {INDEX, "config.json"})


def test_weights_of_the_uncut_model_stay_behind_and_a_warning_says_so(furnished, tmp_path, caplog):
    yopo.prune_checkpoint(furnished.folder, tmp_path / "target", RATIO)
    found = files_in(tmp_path / "target")
    (record,) = [r for r in caplog.records if "Left behind" in r.getMessage()]
    assert record.levelno == logging.WARNING
    for name in furnished.stale:
        assert name not in found
        assert name in record.getMessage()
    assert INDEX not in record.getMessage()
    assert not any(name.startswith((".git/", ".cache/")) for name in found)


def test_nothing_left_behind_is_nothing_to_warn_of(tmp_path, caplog):
    source = save(build("llama"), tmp_path / "source")
    caplog.clear()
    yopo.prune_checkpoint(source, tmp_path / "target", RATIO)
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


def test_an_index_beside_a_single_file_is_left_behind(tmp_path, caplog):
    source = save(build("llama"), tmp_path / "source", in_shards=False)
    (source / INDEX).write_text('{"weight_map": {"a": "gone.safetensors"}}')
    yopo.prune_checkpoint(source, tmp_path / "target", RATIO)
    assert (
        f"Left behind, because they hold other weights than the pruned ones: {INDEX}" in caplog.text
    )
    assert not (tmp_path / "target" / INDEX).exists()
    yopo.load(tmp_path / "target")


def test_a_folder_of_links_becomes_a_folder_of_files(tmp_path):
    """So the hub's cache keeps its models."""
    blobs = save(build("llama"), tmp_path / "blobs")
    source = tmp_path / "source"
    source.mkdir()
    for file in blobs.iterdir():
        (source / file.name).symlink_to(os.path.relpath(file, source))
    yopo.prune_checkpoint(source, tmp_path / "target", RATIO)
    assert not any(file.is_symlink() for file in (tmp_path / "target").iterdir())
    assert files_in(tmp_path / "target").keys() == files_in(blobs).keys() | OWN


def test_the_index_says_what_lies_where_and_how_much_it_is(tmp_path):
    source = save(build("gpt2", dtype=torch.bfloat16), tmp_path / "source")
    index = json.loads((source / INDEX).read_text())
    index["metadata"]["mine"] = "stays"
    (source / INDEX).write_text(json.dumps(index))
    yopo.prune_checkpoint(source, tmp_path / "target", RATIO)
    found = json.loads((tmp_path / "target" / INDEX).read_text())
    tensors = tensors_in(tmp_path / "target")
    assert found["metadata"] == {
        "mine": "stays",
        "total_size": sum(tensor.nbytes for tensor in tensors.values()),
        "total_parameters": sum(tensor.numel() for tensor in tensors.values()),
    }
    assert found["weight_map"].keys() == tensors.keys()
    for name, file in found["weight_map"].items():
        assert name in load_file(tmp_path / "target" / file)


def test_an_index_without_totals_gets_none(tmp_path):
    source = save(build("llama"), tmp_path / "source")
    index = json.loads((source / INDEX).read_text())
    (source / INDEX).write_text(json.dumps({"weight_map": index["weight_map"]}))
    yopo.prune_checkpoint(source, tmp_path / "target", RATIO)
    found = json.loads((tmp_path / "target" / INDEX).read_text())
    assert found["weight_map"] == index["weight_map"]
    assert not found.get("metadata")


def test_headers_keep_their_metadata(tmp_path):
    source = save(build("llama"), tmp_path / "source", in_shards=False)
    file = source / "model.safetensors"
    save_file(load_file(file), file, {"format": "pt", "author": "somebody"})
    yopo.prune_checkpoint(source, tmp_path / "target", RATIO)
    _, metadata = read_header(tmp_path / "target" / "model.safetensors")
    assert metadata == {"format": "pt", "author": "somebody"}


@pytest.mark.parametrize("kind", ["llama", "qwen2_moe", "gpt2"])
def test_the_config_changes_in_its_widths_and_nothing_else(tmp_path, kind):
    source = save(build(kind), tmp_path / "source")
    more = {"my_own_key": {"deep": [1, 2]}, "torch_dtype": "float32", "transformers_version": "4.1"}
    before = config_of(source) | more
    (source / "config.json").write_text(json.dumps(before, indent=1))
    plan = yopo.prune_checkpoint(source, tmp_path / "target", 0.5)
    fields = {ffn.name: ffn.width.key for ffn in yopo.find_ffns(yopo.load(source))}
    widths = {fields[name]: width for name, width in plan.widths.items()}
    assert len(widths) == (2 if kind == "qwen2_moe" else 1)
    after = config_of(tmp_path / "target")
    assert after == before | widths
    assert list(after)[: len(before)] == list(before)


def test_widths_of_a_nested_config_are_written_where_they_are(tmp_path):
    _, sizes = CONFIGS["llama"]
    text = {key: value for key, value in sizes.items() if key != "pad_token_id"}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 4, "image_size": 16, "patch_size": 8, "projection_dim": 8}
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", **text},
        vision_config={"model_type": "clip_vision_model", **vision},
        image_token_index=1,
    )
    torch.manual_seed(0)
    source = save(transformers.LlavaForConditionalGeneration(config), tmp_path / "source")
    before = config_of(source)
    yopo.prune_checkpoint(source, tmp_path / "target", 0.5)
    after = config_of(tmp_path / "target")
    before["text_config"]["intermediate_size"] = 40
    before["vision_config"]["intermediate_size"] = 24
    assert after == before
    expected, _ = in_memory(
        source, tmp_path / "m", lambda m: PolicyPruner.lean().fit(m).prune(m, 0.5)
    )
    assert_same(tensors_in(tmp_path / "target"), tensors_in(expected))


# The card and the report.


def card_of(folder):
    text = (folder / "README.md").read_text("utf-8")
    return yaml.safe_load(text.split("---")[1]), text


def test_the_card_and_the_report_say_what_was_done(furnished, tmp_path):
    (furnished.folder / "README.md").write_text("---\nlicense: mit\n---\n# Card\n")
    pruner = PolicyPruner.lean(seed=7)
    plan = yopo.prune_checkpoint(furnished.folder, tmp_path / "target", RATIO, pruner=pruner)
    report = yopo.PruningReport.load(tmp_path / "target")
    assert report == replace(pruner.report, seconds={})
    assert pruner.report.seconds.keys() == {"decide", "cut"}
    assert report.plan == plan
    dense, pruned = yopo.load(furnished.folder), yopo.load(tmp_path / "target")
    for sizes, model in ((report.before, dense), (report.after, pruned)):
        assert sizes.parameters == model.num_parameters()
        assert sizes.bytes == 2 * model.num_parameters()
    front, text = card_of(tmp_path / "target")
    assert front["base_model"] == "source"
    assert front["license"] == "mit"
    assert f"yopo.prune_checkpoint({str(furnished.folder)!r}, target, 0.4, pruner=" in text
    assert "pruner=yopo.PolicyPruner.lean(seed=7))" in text
    assert "AutoModelForCausalLM" in text


def test_a_plan_and_a_command_are_told_too(tmp_path):
    source = save(build("llama"), tmp_path / "source")
    plan = plan_for(yopo.load(source))
    yopo.prune_checkpoint(source, tmp_path / "a", plan=plan)
    report = yopo.PruningReport.load(tmp_path / "a")
    assert report.call == f"yopo.prune_checkpoint({str(source)!r}, target, plan=plan)"
    assert report.recipe == {}
    yopo.prune_checkpoint(source, tmp_path / "b", layers=iter([1]), command="python mine.py")
    assert "python mine.py" in card_of(tmp_path / "b")[1]
    assert "yopo.load(" in card_of(tmp_path / "b")[1]
    assert yopo.PruningReport.load(tmp_path / "b").needs_yopo


def test_cards_and_reports_of_earlier_cuts_make_room(furnished, tmp_path):
    yopo.prune_checkpoint(furnished.folder, tmp_path / "one", 0.2)
    yopo.PruningReport.load(tmp_path / "one").save(tmp_path / "one" / "report")
    yopo.prune_checkpoint(tmp_path / "one", tmp_path / "two", RATIO)
    one, two = files_in(tmp_path / "one"), files_in(tmp_path / "two")
    assert two["README.dense.2.md"] == b"# Card\n"
    assert two["README.dense.md"] == one["README.md"]
    assert two["pruning_report.dense.json"] == one["pruning_report.json"]
    assert two["report.dense/report.html"] == one["report/report.html"]
    assert "report/report.html" not in two
    assert card_of(tmp_path / "two")[0]["base_model"] == "one"


def test_the_same_cut_writes_the_same_files(furnished, tmp_path):
    for name in ("a", "b"):
        yopo.prune_checkpoint(furnished.folder, tmp_path / name, RATIO)
    assert files_in(tmp_path / "a") == files_in(tmp_path / "b")


# Fitting on a folder.


@pytest.mark.parametrize("method", ["prunenet", "spectral"])
@pytest.mark.parametrize("in_shards", [False, True])
def test_fitting_on_a_folder_equals_fitting_in_memory_bit_for_bit(tmp_path, method, in_shards):
    source = save(build("llama", dtype=torch.bfloat16), tmp_path / "source", in_shards=in_shards)
    on_disk = METHODS[method]().fit(source)
    in_memory = METHODS[method]().fit(yopo.load(source, dtype="auto"))
    assert on_disk.history == in_memory.history
    assert len(on_disk.history) == 2
    on_disk.save_policy(tmp_path / "a")
    in_memory.save_policy(tmp_path / "b")
    assert files_in(tmp_path / "a") == files_in(tmp_path / "b")
    model = yopo.load(source, dtype="auto")
    assert on_disk.plan(source, 0.3) == in_memory.plan(model, 0.3) == on_disk.plan(str(source), 0.3)


def test_a_policy_that_was_fitted_elsewhere_prunes_a_folder(tmp_path):
    source = save(build("llama"), tmp_path / "source")
    pruner = METHODS["spectral"]().fit(build("opt"))
    yopo.prune_checkpoint(source, tmp_path / "target", RATIO, pruner=pruner)
    expected, _ = in_memory(source, tmp_path / "m", lambda m: pruner.prune(m, RATIO))
    assert_equal_folders(tmp_path / "target", expected)


def test_heads_are_refused_on_a_folder(tmp_path):
    source = save(build("llama"), tmp_path / "source")
    pruner = PolicyPruner.prunenet(episodes=1, attention=True).fit(source)
    with pytest.raises(UnsupportedModelError, match="cuts heads, which are not read"):
        yopo.prune_checkpoint(source, tmp_path / "target", RATIO, pruner=pruner)
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    "reward",
    ["output", "divergence", lambda model, draws: 1 / 0],
    ids=["output", "divergence", "function"],
)
def test_rewards_that_run_the_model_are_refused_on_a_folder(tmp_path, reward):
    source = save(build("llama"), tmp_path / "source")
    pruner = PolicyPruner(reward=reward, episodes=1)
    for call in (
        lambda: pruner.fit(source),
        lambda: yopo.prune_checkpoint(source, tmp_path / "target", pruner=pruner),
    ):
        with pytest.raises(UnsupportedModelError, match=r"a checkpoint on disk is not run\. Load"):
            call()
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("evidence", ["self", torch.ones(2, 8, dtype=torch.int64)], ids=["s", "t"])
def test_evidence_that_runs_the_model_is_refused_on_a_folder(tmp_path, evidence):
    source = save(build("llama"), tmp_path / "source")
    pruner = PolicyPruner(evidence=evidence)
    with pytest.raises(UnsupportedModelError, match=r"on disk is not run, so it cannot write or"):
        yopo.prune_checkpoint(source, tmp_path / "target", pruner=pruner)
    assert list(tmp_path.iterdir()) == [source]


def test_a_folder_cannot_be_pruned_in_place(tmp_path):
    source = save(build("llama"), tmp_path / "source")
    before = files_in(source)
    for folder in (source, str(source)):
        with pytest.raises(InvalidArgumentError, match=r"call `yopo\.prune_checkpoint\(source, ta"):
            PolicyPruner.lean().fit(source).prune(folder, RATIO)
    assert files_in(source) == before


# The disk.


def test_too_little_disk_is_told_before_a_shard_is_written(tmp_path, monkeypatch):
    source = save(build("llama"), tmp_path / "source")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(2**40, 2**40 - 1000, 1000))
    monkeypatch.setattr("yopo.on_disk.write_shard", lambda *args: pytest.fail("wrote a shard"))
    with pytest.raises(OSError, match=r"takes 1\.\d MB, and 0\.0 MB are free"):
        yopo.prune_checkpoint(source, tmp_path / "deep" / "target", RATIO)
    assert list(tmp_path.iterdir()) == [source]


def test_a_disk_that_fills_up_while_rows_are_decided_on_ends_that_at_once(tmp_path, monkeypatch):
    source, written = save(build("llama"), tmp_path / "source"), []

    def full(tensors, file):
        written.append(file)
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("yopo.on_disk.save_file", full)
    with pytest.raises(OSError, match=r"cannot write .*layers\.0\.mlp.*: No space left on device"):
        yopo.prune_checkpoint(source, tmp_path / "target", RATIO)
    assert len(written) == 1
    assert list(tmp_path.iterdir()) == [source]


def test_weights_that_are_not_finite_are_told_and_leave_nothing(tmp_path):
    model = build("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    source = save(model, tmp_path / "source")
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp` has weights that are NaN"):
        yopo.prune_checkpoint(source, tmp_path / "target", RATIO)
    assert list(tmp_path.iterdir()) == [source]


def test_the_target_is_checked_before_the_source_is_read(tmp_path, monkeypatch):
    source = save(build("llama"), tmp_path / "source")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    monkeypatch.setattr("yopo.on_disk.open_checkpoint", lambda source: 1 / 0)
    with pytest.raises(InvalidArgumentError, match="is not empty"):
        yopo.prune_checkpoint(source, tmp_path / "full", RATIO)
    with pytest.raises(InvalidArgumentError, match="lies inside the source"):
        yopo.prune_checkpoint(source, source / "pruned", RATIO)


def test_progress_is_shown_and_can_be_switched_off(tmp_path, capsys):
    source = save(build("llama"), tmp_path / "source")
    yopo.prune_checkpoint(source, tmp_path / "quiet", RATIO)
    assert capsys.readouterr() == ("", "")
    transformers.utils.logging.enable_progress_bar()
    yopo.prune_checkpoint(source, tmp_path / "shown", RATIO)
    told = capsys.readouterr()
    assert told.out == ""
    assert "decide: 100%" in told.err
    assert "2/2" in told.err


def test_the_global_generator_is_left_as_it_was(tmp_path):
    source = save(build("llama"), tmp_path / "source")
    before = torch.random.get_rng_state()
    yopo.prune_checkpoint(source, tmp_path / "target", pruner=METHODS["prunenet"]())
    assert torch.equal(torch.random.get_rng_state(), before)
