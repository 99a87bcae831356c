"""How much memory a checkpoint takes that is pruned on disk, however many layers it has."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORK = """
import json, sys
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import yopo
from conftest import build, save
from cost import cost_of
from yopo.checkpoint import open_checkpoint

torch.set_num_threads(1)
ROOT, (ROWS, WIDTH, THREADS, *LAYERS) = Path(sys.argv[1]), map(int, sys.argv[2:])

def big(layers):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=WIDTH, intermediate_size=ROWS, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=1, dtype="bfloat16",
    )
    model = LlamaForCausalLM._from_config(config)
    model.save_pretrained(ROOT / str(layers), max_shard_size="20MB")

def plan_of(layers):
    rows = {f"model.layers.{layer}.mlp": ROWS for layer in range(layers)}
    kept = {name: torch.randperm(ROWS)[: ROWS // 2].sort().values for name in rows}
    return yopo.PruningPlan(kept, rows, 0.5)

def cut(layers, plan):
    yopo.prune_checkpoint(ROOT / str(layers), ROOT / f"cut-{layers}", plan=plan)

def learn(layers):
    torch.set_num_threads(THREADS)
    pruner = yopo.PolicyPruner.prunenet(ratio=0.5, episodes=2).fit(ROOT / str(layers))
    yopo.prune_checkpoint(ROOT / str(layers), ROOT / f"learned-{layers}", pruner=pruner)

open_checkpoint(save(build("llama"), ROOT / "small"))  # what is imported when it is needed
found = {}
for layers in LAYERS:
    big(layers)
    plan = plan_of(layers)
    found[f"cut {layers}"] = cost_of(lambda: cut(layers, plan))["mebibytes"]
    found[f"learned {layers}"] = cost_of(lambda: learn(layers))["mebibytes"]
print(json.dumps(found))
"""

ROWS, WIDTH = 2048, 512
FFN = 3 * ROWS * WIDTH * 2 / 2**20
"""MiB of an FFN in bfloat16."""

CONSTANT = 16
"""MiB that a run takes however large the model: buffers, the policy, what lies idle in heaps."""


def measured(folder, *numbers, **settings):
    if not Path("/proc/self/status").exists():
        pytest.skip("the system does not tell")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", WORK, str(folder), *map(str, numbers)],
        env=environment | {"HF_HUB_OFFLINE": "1"} | settings,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def peaks(tmp_path_factory):
    # What is freed goes back at once, as that of matrices beyond 32 MiB always does.
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536"}
    return measured(tmp_path_factory.mktemp("memory"), ROWS, WIDTH, 1, 4, 16, **settings)


@pytest.mark.parametrize("job", ["cut", "learned"])
@pytest.mark.parametrize("layers", [4, 16])
def test_a_run_takes_at_most_three_times_an_ffn_and_a_constant(peaks, job, layers):
    assert 0 < peaks[f"{job} {layers}"] < 3 * FFN + CONSTANT


@pytest.mark.parametrize("layers", [4, 16])
def test_cutting_by_a_plan_takes_less_than_twice_an_ffn(peaks, layers):
    assert peaks[f"cut {layers}"] < 2 * FFN


@pytest.mark.parametrize("job", ["cut", "learned"])
def test_four_times_as_many_layers_take_no_more_memory(peaks, job):
    """But for what says that they are there: less than a twelfth of an FFN for each."""
    assert peaks[f"{job} 16"] - peaks[f"{job} 4"] < (16 - 4) * FFN / 12


def test_several_threads_and_what_their_heaps_keep_fit_into_three_times_an_ffn(tmp_path):
    """LLaMA-2-7B's shape at a quarter of its size, with the allocator as it is."""
    rows, width = 2752, 1024
    peaks = measured(tmp_path, rows, width, 4, 2)
    assert 0 < peaks["learned 2"] < 3 * (3 * rows * width * 2 / 2**20) + CONSTANT
