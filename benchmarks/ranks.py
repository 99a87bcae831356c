"""What several processes save: PruneNet's training by one rank on one core, and by more.

    python benchmarks/ranks.py              one and two ranks, OPT-125m's shape, 20 episodes
    python benchmarks/ranks.py --ranks 1 2 4 --shape tiny

Each rank has one thread. Starts them with torchrun, in turn, several times, and writes
results/ranks.json and .md: seconds of `fit` alone, by the slowest rank, and whether all ranks and
runs end with the same policy, bit for bit.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import OPTConfig, OPTForCausalLM

import yopo
from common import RESULTS, keep_result, machine, quiet
from yopo.report import format_table

SHAPES = {"opt-125m": (12, 3072, 768), "tiny": (6, 256, 64)}
RATIO = 0.3


def fit(shape: str, episodes: int) -> None:
    """Train as one of the ranks, and print what it took as a line of JSON."""
    quiet()
    layers, rows, width = SHAPES[shape]
    torch.manual_seed(0)
    model = OPTForCausalLM(
        OPTConfig(
            hidden_size=width,
            ffn_dim=rows,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            vocab_size=1000,
            word_embed_proj_dim=width,
        )
    )
    distributed.init_process_group("gloo")
    yopo.PolicyPruner.prunenet(ratio=RATIO, episodes=1).fit(model)  # everything is loaded then
    distributed.barrier()
    began = time.perf_counter()
    pruner = yopo.PolicyPruner.prunenet(ratio=RATIO, episodes=episodes).fit(model)
    seconds = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as folder:
        pruner.save_policy(folder)
        digest = hashlib.sha256((Path(folder) / "policy.safetensors").read_bytes()).hexdigest()
    print(json.dumps({"seconds": seconds, "policy": digest}), flush=True)
    distributed.destroy_process_group()


def run(shape: str, episodes: int, ranks: int) -> list[dict[str, Any]]:
    """Train with so many ranks, and return what each says."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", __file__, "--child", shape, str(episodes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return [json.loads(line) for line in told.stdout.splitlines() if line.startswith("{")]


def page(rows: list[dict[str, Any]]) -> str:
    """Return the page of all results."""
    table = [["shape", "machine", "ranks", "s", "runs", "times faster than one rank"]]
    for row in rows:
        medians = {n: statistics.median(seconds) for n, seconds in row["seconds"].items()}
        for ranks, seconds in row["seconds"].items():
            runs = " / ".join(f"{value:.2f}" for value in seconds)
            faster = f"{medians[min(medians)] / medians[ranks]:.2f}"
            table.append(
                [row["shape"], row["machine"], ranks, f"{medians[ranks]:.2f}", runs, faster]
            )
    same = all(row["policies"] == 1 for row in rows)
    told = "All ranks of all runs end" if same else "NOT all ranks of all runs end"
    return (
        "# Several processes\n\nSeconds of `PolicyPruner.prunenet().fit(model)`, 20 episodes, by "
        "the slowest of the ranks, each with one thread (`python benchmarks/ranks.py`). "
        f"{told} with the same policy, bit for bit.\n\n{format_table(table)}\n"
    )


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shape", choices=SHAPES, default="opt-125m")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        fit(arguments.child[0], int(arguments.child[1]))
        return
    seconds: dict[str, list[float]] = {str(ranks): [] for ranks in arguments.ranks}
    policies = set()
    for _ in range(arguments.repeats):
        for ranks in arguments.ranks:
            told = run(arguments.shape, arguments.episodes, ranks)
            seconds[str(ranks)].append(max(answer["seconds"] for answer in told))
            policies |= {answer["policy"] for answer in told}
            print(ranks, told, flush=True)
    torch.set_num_threads(1)
    row = {
        "shape": arguments.shape,
        "machine": machine(torch.device("cpu")),
        "seconds": seconds,
        "policies": len(policies),
    }
    keep_result("ranks", [row])
    (RESULTS / "ranks.md").write_text(page([row]), encoding="utf-8")
    print(page([row]))


if __name__ == "__main__":
    main()
