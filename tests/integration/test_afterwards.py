"""What comes after pruning: to publish, compile, quantise and convert a model."""

import copy
import json
import logging
import os
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stand_in_hub import TOKEN, serve
from transformers import AutoModelForCausalLM, AutoTokenizer

import yopo
from conftest import environment_of_tests, run_python
from forking import Forking
from yopo.card import MARK
from yopo.embedded import model_path
from yopo.plan import kept_width

ROOT = Path(__file__).parents[2]
CRITERION = yopo.criteria.row_norm


@pytest.fixture
def small(tiny_llama, tmp_path):
    """Return a folder with a model of another width than any other, and a tokenizer."""
    folder = tmp_path / "small"
    tiny_llama(vocab_size=1280, intermediate_size=112).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_path()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hub_and_python(tmp_path_factory):
    with serve() as server:
        settings = {
            "HF_ENDPOINT": server.address,
            "HF_HOME": str(tmp_path_factory.mktemp("home")),
            "HF_HUB_DISABLE_XET": "1",  # the stand-in takes large files by git-lfs alone
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": TOKEN,
        }
        with Forking(environment_of_tests() | settings) as forking:
            yield server, forking.run


@pytest.fixture
def hub(hub_and_python):
    """Return a stand-in for the hub, empty, and what runs Python that takes it for the hub."""
    server, _ = hub_and_python
    server.repos.clear()
    server.large.clear()
    return hub_and_python


def cut(model, width_of, ratio=0.3):
    """Prune by a plan, which costs no time."""
    yopo.apply_plan(
        model, yopo.plan_by_criterion(model, ratio, criterion=CRITERION, multiple_of=width_of)
    )
    return model


# Publish


def test_a_pruned_model_is_pushed_and_loaded_again(small, hub):
    server, run = hub
    done = run(ROOT / "examples/push_to_hub.py", "someone/small", small)
    assert done.returncode == 0, done.stderr
    assert "someone/small: 78 rows, equal logits: True" in done.stdout
    assert "as many tokens: True" in done.stdout
    files = server.repos["someone/small"]
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= files.keys()
    assert json.loads(files["config.json"])["intermediate_size"] == 78
    assert list(server.large.values()) == [files["model.safetensors"]]
    assert MARK in files["README.md"].decode()
    assert re.search(r"tags:\n- yopo\n- pruned", files["README.md"].decode())
    assert json.loads(files["pruning_report.json"])["ratio"]["asked"] == 0.3


def test_without_a_token_nothing_is_pushed(small, hub):
    server, run = hub
    done = run(ROOT / "examples/push_to_hub.py", "someone/small", small, HF_TOKEN="wrong")
    assert done.returncode == 1
    assert "401" in done.stderr
    assert server.repos == {}


def test_a_folder_that_was_pruned_on_disk_is_uploaded_as_it_is(small, hub, tmp_path):
    server, run = hub
    yopo.prune_checkpoint(small, tmp_path / "pruned", 0.3)
    done = run("-m", "huggingface_hub.cli.hf", "upload", "someone/disk", tmp_path / "pruned")
    assert done.returncode == 0, done.stderr
    uploaded = server.repos["someone/disk"]
    for file in (tmp_path / "pruned").iterdir():
        assert uploaded[file.name] == file.read_bytes()
    done = run(
        "-c",
        "import sys, yopo; yopo.prune_checkpoint('someone/disk', sys.argv[1], 0.3)",
        tmp_path / "again",
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again" / "model.safetensors").is_file()


# Compile


def test_a_model_that_runs_compiled_may_be_pruned_and_runs_on(tiny_llama, logits):
    model = tiny_llama()
    for layer in model.model.layers:
        layer.compile(backend="eager")
    logits(model)
    cut(model, 1)
    torch.testing.assert_close(logits(model), logits(cut(tiny_llama(), 1)))
    torch.compiler.reset()


def test_a_machine_that_cannot_compile_is_told_so(small, tmp_path):
    broken = {"CXX": str(tmp_path / "missing"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = run_python(ROOT / "examples/compile.py", small, environment=broken)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Skipped: torch.compile needs a C++ compiler that works.")


# Quantise


@given(
    group=st.sampled_from([32, 64, 128, 256]),
    more=st.integers(0, 30_000),
    ratio=st.floats(0.01, 0.9),
)
def test_from_fifty_times_a_group_on_the_rounded_width_fits_it(group, more, ratio):
    assert kept_width(50 * group + 1 + more, ratio, multiple_of="auto") % group == 0


def test_a_small_width_need_not_fit_a_group_unless_it_is_told_to():
    assert kept_width(384, 0.3, multiple_of="auto") == 272
    assert kept_width(384, 0.3, multiple_of=32) == 256


@pytest.fixture
def formats():
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import (
        Int4WeightOnlyConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerGroup,
    )

    return {
        "int8": Int8WeightOnlyConfig(set_inductor_config=False),
        "int8 in groups": Int8WeightOnlyConfig(granularity=PerGroup(32), set_inductor_config=False),
        "int4 in bytes": IntxWeightOnlyConfig(torch.int4, PerGroup(32)),
        "int4 packed": PrototypeInt4WeightOnlyConfig(group_size=32, set_inductor_config=False),
        "int4 of accelerators": Int4WeightOnlyConfig(
            group_size=32, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
        ),
    }


def quantised(folder, config):
    from transformers import TorchAoConfig

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=TorchAoConfig(config)
    )


@pytest.mark.parametrize("name", ["int8", "int8 in groups", "int4 in bytes"])
def test_a_quantised_model_is_saved_and_loaded(tiny_llama, logits, formats, tmp_path, name):
    cut(tiny_llama(intermediate_size=96), 32).save_pretrained(tmp_path / "pruned")
    model = quantised(tmp_path / "pruned", formats[name])
    assert type(model.model.layers[1].mlp.down_proj.weight.data) is not torch.Tensor
    model.save_pretrained(tmp_path / "quantised")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "quantised")
    assert loaded.config.intermediate_size == 64
    assert torch.equal(logits(loaded), logits(model))


def test_packed_int4_runs_on_a_cpu_but_is_not_saved(tiny_llama, logits, formats, tmp_path):
    pruned = cut(tiny_llama(intermediate_size=96), 32)
    pruned.save_pretrained(tmp_path / "pruned")
    model = quantised(tmp_path / "pruned", formats["int4 packed"])
    assert (
        torch.nn.functional.cosine_similarity(
            logits(model).float().flatten(), logits(pruned).flatten(), dim=0
        )
        > 0.9
    )
    with pytest.raises(ValueError, match="Unsupported tensor type"):
        model.save_pretrained(tmp_path / "quantised")


def test_int4_of_accelerators_does_not_run_on_a_cpu(tiny_llama, formats):
    from torchao.quantization import quantize_

    if torch.cuda.is_available():
        pytest.skip("there is an accelerator")
    with pytest.raises(AssertionError, match="CUDA"):
        quantize_(
            cut(tiny_llama(intermediate_size=96), 32).to(torch.bfloat16),
            formats["int4 of accelerators"],
        )


@pytest.mark.parametrize("name", ["int8 in groups", "int4 in bytes"])
def test_a_width_that_groups_do_not_divide_is_an_error(tiny_llama, formats, name):
    from torchao.quantization import quantize_

    with pytest.raises(AssertionError, match=r"67.*divisible"):
        quantize_(cut(tiny_llama(intermediate_size=96), 1).model, formats[name])


def test_packed_int4_leaves_such_a_matrix_as_it_was_without_a_word(tiny_llama, formats):
    from torchao.quantization import quantize_

    model = cut(tiny_llama(intermediate_size=96), 16, 0.5)
    quantize_(model.model.to(torch.bfloat16), formats["int4 packed"])
    mlp = model.model.layers[0].mlp
    assert model.config.intermediate_size == 48
    assert type(mlp.down_proj.weight.data) is torch.Tensor
    assert type(mlp.up_proj.weight.data) is not torch.Tensor


# Masks that are only zeros


def sparse(model, share):
    for layer in model.model.layers:
        weight = layer.mlp.down_proj.weight.data
        weight[weight.abs() < weight.abs().flatten().quantile(share)] = 0.0
    return model


@pytest.mark.parametrize("recipe", [yopo.PolicyPruner.lean, yopo.PolicyPruner])
def test_zeros_that_restoring_fills_are_told(tiny_llama, caplog, recipe):
    model = sparse(tiny_llama(), 0.5)
    recipe().fit(model).prune(model, 0.3)
    told = [r.getMessage() for r in caplog.records if "zeros" in r.getMessage()]
    assert len(told) == 2
    assert re.match(r"\d\d% of the contract matrix of `model\.layers\.0\.mlp` are zeros", told[0])
    assert "`restore=False` keeps them" in told[0]


def test_zeros_are_told_on_disk_too(tiny_llama, tmp_path, caplog):
    sparse(tiny_llama(), 0.5).save_pretrained(tmp_path / "dense")
    yopo.prune_checkpoint(tmp_path / "dense", tmp_path / "pruned", 0.3)
    assert "of the contract matrix of `model.layers.1.mlp` are zeros" in caplog.text


@pytest.mark.parametrize(("share", "restore"), [(0.5, False), (0.1, True)])
def test_nothing_is_said_where_no_mask_is_lost(tiny_llama, caplog, share, restore):
    model = sparse(tiny_llama(), share)
    before = copy.deepcopy(model.model.layers[0].mlp.down_proj.weight)
    with caplog.at_level(logging.WARNING):
        yopo.PolicyPruner.lean(restore=restore).fit(model).prune(model, 0.3)
    assert "zeros" not in caplog.text
    if not restore:
        after = model.model.layers[0].mlp.down_proj.weight
        assert (after == 0).float().mean() > 0.4
        assert set(after.flatten().tolist()) <= set(before.flatten().tolist())


# Convert


def test_the_width_survives_in_gguf(run_forked):
    pytest.importorskip("gguf")
    converter = Path(__file__).parent / "stand_in_llama_cpp"
    done = run_forked(ROOT / "examples/convert_to_gguf.py", converter)
    assert done.returncode == 0, done.stderr
    assert ": 256 rows,\nlogits differ by at most 0.0e+00" in done.stdout


NAMED = """
import os, runpy, sys
root = os.environ["LLAMA_CPP"]
sys.path[:0] = [root, root + "/gguf-py"]
from conversion.base import TextModel
# The embedded model has a tokenizer of its own, which cuts words as that of GPT-2 does.
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
sys.argv[0] = root + "/convert_hf_to_gguf.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.skipif("LLAMA_CPP" not in os.environ, reason="LLAMA_CPP names no llama.cpp")
def test_the_converter_of_llama_cpp_takes_a_pruned_model(tmp_path):
    (tmp_path / "convert_hf_to_gguf.py").write_text(NAMED)
    done = run_python(ROOT / "examples/convert_to_gguf.py", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "feed forward length = 256" in done.stderr
    assert ": 256 rows,\nlogits differ by at most 0.0e+00" in done.stdout
