"""What several processes save: PruneNet's training by one rank on one core, and by more.

    python benchmarks/ranks.py              one and two ranks, OPT-125m's shape, 20 episodes
    python benchmarks/ranks.py --ranks 1 2 4 --shape tiny    to see that it runs: shown, not kept

Each rank has one thread. Starts them with torchrun, in turn, several times, and writes
results/ranks.json and .md: seconds of `fit` alone, by the slowest rank, and whether all ranks and
runs end with the same policy, bit for bit. Beside them, what the machine's cores can do at all: as
many processes at once that know nothing of one another, and each do the work of all ranks.
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

import common
import yopo
from common import keep_result, machine, quiet
from yopo.report import format_table

TINY = "tiny"
SHAPES = {"opt-125m": (12, 3072, 768), TINY: (6, 256, 64)}
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


def run(shape: str, episodes: int, ranks: int, *, runs: int = 1) -> list[dict[str, Any]]:
    """Train with so many ranks, in so many runs at once, and return what each rank says."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", __file__, "--child", shape, str(episodes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(runs)
    ]
    lines = [line for process in started for line in process.communicate()[0].splitlines()]
    if any(process.returncode for process in started):
        raise SystemExit("a rank has failed")
    return [json.loads(line) for line in lines if line.startswith("{")]


def page(row: dict[str, Any]) -> str:
    """Return the page of the results."""
    one = statistics.median(row["seconds"]["1"])
    table = [["ranks", "s", "runs", "times faster than one rank", "what the cores can do"]]
    for ranks, seconds in row["seconds"].items():
        apart = row["seconds_apart"].get(ranks)
        table.append(
            [
                ranks,
                f"{statistics.median(seconds):.2f}",
                " / ".join(f"{value:.2f}" for value in seconds),
                f"{one / statistics.median(seconds):.2f}",
                f"{int(ranks) * one / statistics.median(apart):.2f}" if apart else "–",
            ]
        )
    told = "All ranks of all runs end" if row["policies"] == 1 else "NOT all ranks end"
    return (
        f"# Several processes\n\nSeconds of `PolicyPruner.prunenet().fit(model)` at the shape of "
        f"{row['shape']}, {row['episodes']} episodes, by the slowest of the ranks, each with one "
        f"thread, on {row['machine']} (`python benchmarks/ranks.py`). {told} with the same policy, "
        "bit for bit.\n\nThe last column is the same for as many processes at once that know "
        "nothing of one another: cores share memory, and caches with whatever else the host "
        f"runs.\n\n{format_table(table)}\n"
    )


def main(given: list[str] | None = None) -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shape", choices=SHAPES, default="opt-125m")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args(given)
    if arguments.child:
        fit(arguments.child[0], int(arguments.child[1]))
        return
    seconds: dict[str, list[float]] = {str(ranks): [] for ranks in arguments.ranks}
    apart: dict[str, list[float]] = {str(ranks): [] for ranks in arguments.ranks if ranks > 1}
    policies = set()
    for _ in range(arguments.repeats):
        for ranks, runs in [(n, 1) for n in arguments.ranks] + [(1, int(n)) for n in apart]:
            told = run(arguments.shape, arguments.episodes, ranks, runs=runs)
            slowest = max(answer["seconds"] for answer in told)
            (apart[str(runs)] if runs > 1 else seconds[str(ranks)]).append(slowest)
            policies |= {answer["policy"] for answer in told}
            print(f"{runs} runs of {ranks} ranks: {slowest:.2f} s", flush=True)
    torch.set_num_threads(1)
    row = {
        "shape": arguments.shape,
        "episodes": arguments.episodes,
        "machine": machine(torch.device("cpu")),
        "seconds": seconds,
        "seconds_apart": apart,
        "policies": len(policies),
    }
    print(page(row))
    if arguments.shape != TINY:
        keep_result("ranks", [row])
        (common.RESULTS / "ranks.md").write_text(page(row), encoding="utf-8")


if __name__ == "__main__":
    main()
