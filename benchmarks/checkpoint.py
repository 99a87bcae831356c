"""What it costs to prune a checkpoint on disk: seconds beside `cp -r`, and peak memory.

    python benchmarks/checkpoint.py                     LLaMA-2-7B's shape in bfloat16, 13.5 GB
    python benchmarks/checkpoint.py --shape small       a few megabytes, to see that it runs; the
                                                        figures are shown and not kept
    python benchmarks/checkpoint.py --layers 4          of that shape: memory stays the same
    python benchmarks/checkpoint.py --folder FOLDER     where to write; by default a temporary one

Makes a checkpoint of random weights, which is removed at the end, and looks first whether the disk
holds it and what is written from it. Then, in turn, each in a process of its own, with the page
cache emptied before where that is allowed and all writes on the disk at the end:

* `cp -r` of the folder;
* the cut itself: `prune_checkpoint(…, plan=…)` with rows drawn at random;
* the default recipe, `PolicyPruner.lean()`, on the first two layers: what it takes for one FFN it
  takes for all;
* two episodes of `PolicyPruner.prunenet().fit(folder)`, or of these what `--only` names.

Memory is the peak of anonymous pages (`RssAnon`), and of all pages (`VmRSS`), files that are mapped
included, above what the process has once yopo and transformers are imported.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

import common
from common import keep_result, kept_rows, machine
from yopo.loading import build_on_meta
from yopo.report import format_table
from yopo.shards import Piece, Stored, write_shard

SMALL = "small"
SHAPES = {
    "llama-2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    },
    SMALL: {
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vocab_size": 1000,
    },
}
RATIO = 0.3
SHARD = 5 * 10**9
ROOM = 3
"""How many times the checkpoint's bytes have to be free: itself, a copy, and a reserve."""

CACHES = Path("/proc/sys/vm/drop_caches")

CHILD = """
import json, os, sys, threading, time
import torch, transformers, yopo
from transformers.models.llama import LlamaForCausalLM
transformers.logging.disable_progress_bar()
torch.set_num_threads(int(sys.argv[1]))
def status(key):
    for line in open("/proc/self/status"):
        if line.startswith(key):
            return int(line.split()[1]) * 1024
source, target, work = sys.argv[2:]
start, peak, done = [status("RssAnon:"), status("VmRSS:")], [0, 0], threading.Event()
def look():
    while not done.wait(0.005):
        peak[0] = max(peak[0], status("RssAnon:"))
        peak[1] = max(peak[1], status("VmRSS:"))
watcher = threading.Thread(target=look)
watcher.start()
began = time.perf_counter()
if work == "cut":
    from yopo.checkpoint import open_checkpoint
    ffns = open_checkpoint(source).ffns
    keep = yopo.plan.kept_width(ffns[0].rows, RATIO, multiple_of="auto")
    draw = lambda n: torch.randperm(ffns[0].rows, generator=torch.Generator().manual_seed(n))
    kept = {f.name: draw(n)[:keep].sort().values for n, f in enumerate(ffns)}
    plan = yopo.PruningPlan(kept=kept, rows={f.name: f.rows for f in ffns}, ratio=RATIO)
    yopo.prune_checkpoint(source, target, plan=plan)
elif work == "lean":
    yopo.prune_checkpoint(source, target, RATIO, layers=[0, 1])
else:
    yopo.PolicyPruner.prunenet(ratio=RATIO, episodes=2).fit(source)
os.sync()
seconds = time.perf_counter() - began
done.set()
watcher.join()
print(json.dumps({"seconds": seconds, "anonymous": peak[0] - start[0], "all": peak[1] - start[1]}))
"""


def make(folder: Path, shape: dict[str, int], shard: int = SHARD) -> int:
    """Write a checkpoint of random weights, and return its bytes."""
    config = LlamaConfig(**shape, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    from transformers import LlamaForCausalLM

    model = build_on_meta(config, LlamaForCausalLM, {}, dtype=torch.bfloat16)
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    sizes = {name: 2 * parameter.numel() for name, parameter in model.named_parameters()}
    groups: list[list[str]] = [[]]
    for name, own in sizes.items():
        if sum(sizes[other] for other in groups[-1]) + own > shard:
            groups.append([])
        groups[-1].append(name)
    names = {}
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        pieces = []
        for name in group:
            size = tuple(model.get_parameter(name).shape)
            stored = Stored(folder, name, "BF16", size, 0, sizes[name])
            pieces.append(Piece(stored, size, _random(size)))
        write_shard(folder / file, pieces, {"format": "pt"})
        names |= dict.fromkeys(group, file)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return sum(sizes.values())


def _random(size: tuple[int, ...]) -> Iterator[torch.Tensor]:
    if len(size) == 1:
        yield torch.ones(size, dtype=torch.bfloat16)
        return
    for start in range(0, size[0], 1024):
        rows = min(1024, size[0] - start)
        yield torch.empty(rows, *size[1:], dtype=torch.bfloat16).normal_(std=0.02)


def run(work: str, source: Path, target: Path, threads: int) -> dict[str, float]:
    """Do one of the things to compare, on a cold cache, and return what it took."""
    os.sync()
    try:
        CACHES.write_text("3", encoding="ascii")
    except OSError:
        print("the page cache cannot be emptied here, so it is warm for all")
    try:
        if work == "cp -r":
            began = time.perf_counter()
            subprocess.run(["cp", "-r", source, target], check=True)
            os.sync()
            return {"seconds": time.perf_counter() - began}
        code = CHILD.replace("RATIO", str(RATIO))
        child = [sys.executable, "-c", code, str(threads), str(source), str(target), work]
        told = subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True)
        found: dict[str, float] = json.loads(told.stdout.splitlines()[-1])
        return found
    finally:
        shutil.rmtree(target, ignore_errors=True)


def page(rows: list[dict[str, Any]]) -> str:
    """Return the page of all results."""
    lines = ["# Checkpoints on disk", "", __doc__.split("\n\n", 2)[2].strip(), ""]
    for row in rows:
        ffn = row["ffn"]
        table = [["what", "seconds", "times cp -r", "peak MB", "of an FFN", "with mapped files MB"]]
        copied = row["work"]["cp -r"][0]["seconds"]
        for work, runs in row["work"].items():
            seconds = sorted(found["seconds"] for found in runs)
            cells = [work, " / ".join(f"{value:.1f}" for value in seconds)]
            median = seconds[len(seconds) // 2]
            copied = median if work == "cp -r" else copied
            cells.append(f"{median / copied:.2f}")
            for key in ("anonymous", "all"):
                peaks = [found[key] for found in runs if key in found]
                cells.append(f"{max(peaks) / 1e6:,.0f}" if peaks else "")
                if key == "anonymous":
                    cells.append(f"{max(peaks) / ffn:.1f}" if peaks else "")
            table.append(cells)
        lines += [
            f"## {row['shape']}, {row['layers']} layers: {row['bytes'] / 1e9:.2f} GB, on "
            f"{row['machine']}",
            "",
            f"The largest FFN has {ffn / 1e6:,.1f} MB; three times that are {3 * ffn / 1e6:,.0f}.",
            "",
            format_table(table),
            "",
        ]
    return "\n".join(lines)


def beside(rows: list[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a new row behind the old ones, but for those whose work it has done again."""
    same = ("shape", "layers", "machine")
    return [
        old
        for old in rows
        if any(old[key] != row[key] for key in same) or not old["work"].keys() <= row["work"].keys()
    ] + [row]


def main(given: list[str] | None = None) -> None:
    """Measure one shape, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--layers", type=int, help="instead of the shape's own")
    parser.add_argument("--folder", type=Path, help="an existing folder to write below")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2, help="of cp -r and the cut")
    parser.add_argument("--only", nargs="+", choices=["cut", "lean", "prunenet"])
    arguments = parser.parse_args(given)
    torch.set_num_threads(arguments.threads)
    shape = dict(SHAPES[arguments.shape])
    if arguments.layers is not None:
        shape["num_hidden_layers"] = arguments.layers
    layer = 4 * shape["hidden_size"] ** 2 + 3 * shape["hidden_size"] * shape["intermediate_size"]
    size = 2 * (shape["num_hidden_layers"] * layer + 2 * shape["vocab_size"] * shape["hidden_size"])
    with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=arguments.folder) as place:
        folder = Path(place)
        free = shutil.disk_usage(folder).free
        if free < ROOM * size:
            print(f"{ROOM * size / 1e9:.0f} GB have to be free, {free / 1e9:.0f} are.")
            return
        total = make(folder / "source", shape)
        work: dict[str, list[dict[str, float]]] = {}
        for name in ["cp -r", "cut"] * arguments.repeats + ["lean", "prunenet"]:
            if arguments.only and name not in ("cp -r", *arguments.only):
                continue
            found = run(name, folder / "source", folder / "target", arguments.threads)
            work.setdefault(name, []).append(found)
            print(name, found, flush=True)
    row = {
        "shape": arguments.shape,
        "layers": shape["num_hidden_layers"],
        "machine": machine(torch.device("cpu")),
        "bytes": total,
        "ffn": 2 * 3 * shape["hidden_size"] * shape["intermediate_size"],
        "work": work,
    }
    print(page([row]))
    if arguments.shape != SMALL:
        rows = beside(kept_rows("checkpoint"), row)
        keep_result("checkpoint", rows)
        (common.RESULTS / "checkpoint.md").write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
