"""Small models from configs in memory, the same for every test that asks for the same."""

import gc
import hashlib
import inspect
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import settings
from safetensors.torch import load_file, save_file

import yopo
from forking import Forking
from yopo.adapters import SOURCES, skeleton
from yopo.evidence import checksum_of

torch.set_num_threads(1)
settings.register_profile("yopo", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("yopo")

GOLDEN = Path(__file__).parent / "golden"

_DECODER = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_GATED = _DECODER | {"intermediate_size": 80, "num_key_value_heads": 2, "pad_token_id": None}
_EXPERTS = _GATED | {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
_OPT = {"ffn_dim": 96, "max_position_embeddings": 64, "word_embed_proj_dim": 32}
_GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 80, "num_layers": 2, "num_heads": 4}
_GPT_OSS = {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}

CONFIGS = {
    "llama": ("LlamaForCausalLM", _GATED | {"num_key_value_heads": 4}),
    "opt": ("OPTForCausalLM", _DECODER | _OPT),
    "phi": ("PhiForCausalLM", _DECODER | {"intermediate_size": 96}),
    "phi3": ("Phi3ForCausalLM", _GATED | {"eos_token_id": 2, "bos_token_id": 1}),
    "gpt2": ("GPT2LMHeadModel", _GPT2 | {"bos_token_id": 1, "eos_token_id": 2}),
    "t5": ("T5ForConditionalGeneration", _T5 | {"feed_forward_proj": "gated-gelu"}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        _EXPERTS | {"shared_expert_intermediate_size": 48, "decoder_sparse_step": 1},
    ),
    "gpt_oss": ("GptOssForCausalLM", _GATED | _GPT_OSS | {"intermediate_size": 48}),
}


def build(kind, *, seed=0, dtype=torch.float32, **overrides):
    """Build a tiny model in which every weight is random, biases and gains of norms included."""
    name, sizes = CONFIGS[kind]
    model_class = getattr(transformers, name)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(model_class.config_class(**sizes | overrides)).eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                is_gain = parameter.dim() == 1 and key.endswith("weight")
                parameter.copy_(torch.randn(parameter.shape) * 0.2 + is_gain)
    return model.to(dtype)


def save(model, folder, *, in_shards=True):
    """Save a model as a checkpoint, in many files or one, and return the folder."""
    model.save_pretrained(folder, max_shard_size="20KB" if in_shards else "1GB")
    return folder


def tensors_in(folder):
    """Return every tensor of a folder of safetensors files, as the package of that name reads."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def files_in(folder):
    """Return the bytes of every file below a folder, by its path from there."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def assert_same(found, expected):
    """Check that two mappings hold the same tensors, bit for bit."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        pair = [t.contiguous().reshape(-1).view(torch.uint8) for t in (found[name], tensor)]
        assert torch.equal(*pair), name


def environment_of_tests(threads="1"):
    """Return the environment in which Python finds what the tests find and downloads nothing."""
    return os.environ | {
        "OMP_NUM_THREADS": threads,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def run_python(*arguments, threads="1", environment=None, **settings):
    """Run Python in a process of its own, which finds what the tests find and downloads nothing."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment_of_tests(threads) | (environment or {}),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        **settings,
    )


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Import what tests need without looking for garbage: libraries are none, and large."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.fixture(scope="module", autouse=True)
def _what_was_imported_is_no_garbage():
    """Spare each look for garbage, many of which a trainer asks for, what is there for good."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _no_text_is_written_twice(tmp_path_factory):
    """Keep what models write as evidence, for whichever test lets the same one write it again."""
    write, folder = yopo.evidence.write_tokens, tmp_path_factory.getbasetemp().parent / "written"
    folder.mkdir(exist_ok=True)

    def remembered(model, *, seed):
        sizes = inspect.signature(yopo.writing.write_tokens).parameters
        config = hashlib.md5(model.config.to_json_string(use_diff=False).encode()).hexdigest()
        length = f"{sizes['sequences'].default}x{sizes['length'].default}"
        file = folder / f"{config}-{checksum_of(model).hex()}-{length}-{seed}"
        if not file.exists():
            unfinished = file.with_suffix(f".{os.getpid()}")
            save_file(write(model, seed=seed), unfinished)
            unfinished.rename(file)
        return {name: ids.to(model.device) for name, ids in load_file(file).items()}

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("yopo.evidence.write_tokens", remembered)
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_skeleton_is_built_twice():
    """Keep what classes build on the meta device, which most tests ask for several times."""
    built, make = {}, skeleton._built

    def remembered(model_class, config_class, fields):
        made_of = json.dumps(fields, default=repr, sort_keys=True)
        key = (model_class, model_class.__init__, config_class, made_of)
        if key not in built:
            built[key] = make(model_class, config_class, fields)
        return built[key]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(skeleton, "_built", remembered)
        yield


@pytest.fixture(scope="session")
def run_forked():
    """Return what runs Python in a process of its own, in which all imports have been done."""
    if not hasattr(os, "fork"):
        pytest.skip("there is no fork")
    with Forking(environment_of_tests()) as forking:
        yield forking.run


@pytest.fixture(scope="session")
def tiny_model():
    """Return the function that builds any model of the table: `tiny_model("gpt2", n_inner=48)`."""
    return build


@pytest.fixture(scope="session")
def tiny_llama():
    return partial(build, "llama")


@pytest.fixture(scope="session")
def tiny_opt():
    return partial(build, "opt")


@pytest.fixture(scope="session")
def tiny_phi():
    return partial(build, "phi")


@pytest.fixture
def skeleton_of():
    """Return the function that turns a model into shapes, and a source of what they stand for.

    Its attribute `held` tells the most modules that were loaded at once.
    """

    def of(model):
        with torch.random.fork_rng(), torch.device("meta"):
            skeleton = type(model)(model.config).eval()
        twins = dict(zip(skeleton.modules(), model.modules(), strict=True))
        held = set()

        @contextmanager
        def load(modules):
            modules = list(modules)
            assert not held.intersection(modules)
            shapes = [dict(module._parameters) for module in modules]
            for module in modules:
                module._parameters.update(twins[module]._parameters)
            held.update(modules)
            of.held = max(of.held, len(held))
            try:
                yield
            finally:
                held.difference_update(modules)
                for module, parameters in zip(modules, shapes, strict=True):
                    module._parameters.update(parameters)

        SOURCES[skeleton] = load
        return skeleton

    of.held = 0
    return of


@pytest.fixture(scope="session")
def golden():
    """Return what the reference implementation printed: figures and tensors."""
    return json.loads((GOLDEN / "prunenet.json").read_text()), load_file(
        GOLDEN / "prunenet.safetensors"
    )


@pytest.fixture(scope="session")
def logits():
    """Return the function that gives a model's logits on a fixed text."""

    def run(model, tokens=12):
        ids = torch.arange(2 * tokens).view(2, tokens) * 7 % 60 + 3
        inputs = {"input_ids": ids}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = ids
        with torch.no_grad():
            return model(**inputs).logits

    return run
