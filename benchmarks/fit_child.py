"""Measure one side of `fit.py`, or one point of `scaling.py`, in a process that did nothing before.

    python fit_child.py MODULE …

Imports the modules, then reads jobs from its input, one line of JSON each, and answers each with a
line: seconds and peak memory, or the error. A job runs in a fork of this process, which has
imported what is needed and done no arithmetic, so every job starts alike, loads its own model, and
leaves nothing behind.

Memory is the peak of the process's anonymous pages, looked at every 10 ms, above what they
are once the model is loaded; on a GPU it is the peak of what torch has allocated there, likewise.
"""

import contextlib
import ctypes
import gc
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MEBIBYTE = 2**20
Job = dict[str, Any]
Answer = dict[str, Any]


def build(shape: dict[str, Any], *, device: str = "cpu") -> Any:
    """Return a model of a shape with random weights: OPT in float32, LLaMA in bfloat16."""
    from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

    common = {
        "hidden_size": shape["width"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": max(1, shape["width"] // 64),
        "vocab_size": shape["vocabulary"],
    }
    if shape["family"] == "llama":
        config: Any = LlamaConfig(intermediate_size=shape["rows"], **common)
    else:
        config = OPTConfig(ffn_dim=shape["rows"], word_embed_proj_dim=shape["width"], **common)
    dtype = torch.bfloat16 if shape["family"] == "llama" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def save_model(job: Job) -> Answer:
    """Save a model of a shape where the other jobs load it from."""
    build(job["shape"]).save_pretrained(job["path"])
    return {}


def fit_yopo(job: Job) -> Answer:
    """Measure yopo, PruneNet's method or with several samples an episode, or tell its phases."""
    import yopo

    def pruner(episodes: int) -> yopo.PolicyPruner:
        if job.get("samples") is None:
            return yopo.PolicyPruner.prunenet(ratio=job["ratio"], episodes=episodes)
        return yopo.PolicyPruner(
            reward="spectral",
            ratio=job["ratio"],
            episodes=episodes,
            samples=job["samples"],
            multiple_of=1,
        )

    model = _load(job)
    if job.get("warm"):  # what the first call of all loads is no matter of size
        tiny = {"family": "opt", "layers": 2, "rows": 96, "width": 32, "vocabulary": 64}
        pruner(1).fit(build(tiny))
    device = torch.device(job["device"])
    if job.get("profile"):
        pruner(1).fit(model)
        return {"phases": _phases(lambda: pruner(job["episodes"]).fit(model), device)}
    return _measured(lambda: pruner(job["episodes"]).fit(model), device)


def fit_loop(job: Job) -> Answer:
    """Measure the published loop."""
    import published_loop

    model, runs = _load(job), []

    def work() -> None:
        runs.append(published_loop.fit(model, ratio=job["ratio"], episodes=job["episodes"]))

    answer = _measured(work, torch.device(job["device"]))
    return answer | {"dense": runs[0].dense_seconds}


def fit_peer(job: Job) -> Answer:
    """Measure efficient-pruners as it ships; it writes its policy into a folder as it goes."""
    from efficient_pruners import (  # type: ignore[import-not-found, unused-ignore]
        PruneNet,
        PruningConfig,
    )

    dense = []
    with tempfile.TemporaryDirectory() as folder:
        config = PruningConfig(
            num_episodes=job["episodes"], learning_rate=5e-4, device="cpu", save_dir=folder
        )
        pruner = PruneNet(config)
        pruner.model = _load(job)  # else `fit` would load it, which is not to be measured
        inner = pruner._compute_reference_svds

        def timed() -> Any:
            started = time.perf_counter()
            found = inner()
            dense.append(time.perf_counter() - started)
            return found

        pruner._compute_reference_svds = timed
        answer = _measured(lambda: pruner.fit(job["path"], job["ratio"]), torch.device("cpu"))
    names = ("efficient-pruners", "torch", "transformers")
    versions = {name: importlib.metadata.version(name) for name in names}
    return answer | {"dense": dense[0], "versions": versions}


def check_numbers(job: Job) -> Answer:
    """Compare distances and rewards of the same rows: the published decomposition and yopo's."""
    import published_loop
    import yopo
    from yopo.reward import spectral_rewards

    ffns = yopo.find_ffns(_load(job))[: job["layers"]]
    generator = torch.Generator().manual_seed(0)
    kept, theirs = {}, []
    for ffn in ffns:
        weight_FD = ffn.expand_weights()[0]
        drawn_F = torch.randperm(ffn.rows, generator=generator)
        kept_K = drawn_F[: int((1 - job["ratio"]) * ffn.rows)].sort().values.to(weight_FD.device)
        kept[ffn.name] = kept_K[None]
        spectra = (published_loop.singular_values(part) for part in (weight_FD, weight_FD[kept_K]))
        theirs.append(published_loop.reward_of(*spectra))
    theirs_L = torch.tensor(theirs, dtype=torch.float64)
    ours_L = spectral_rewards(ffns)(kept).flatten().double().cpu()
    return {
        "layers": len(ffns),
        "ks": float((1 / ours_L - 1 / theirs_L).abs().max()),
        "reward": float((ours_L / theirs_L - 1).abs().max()),
    }


def machine_rates(job: Job) -> Answer:
    """Return what the machine is, and how much it multiplies and moves a second, at its best."""
    from common import machine  # not above: the peer's environment has no yopo

    device = torch.device(job["device"])
    size = 2048 if device.type == "cpu" else 8192
    factor = torch.rand(size, size, device=device)
    product = torch.empty_like(factor)
    moved, other = (torch.rand(job["numbers"], device=device) for _ in range(2))
    multiplied = _best_seconds(lambda: torch.mm(factor, factor, out=product), device)
    added = _best_seconds(lambda: moved.add_(other), device)
    return {
        "machine": machine(device),
        "operations": 2 * size**3 / multiplied,
        "bytes": 12 * job["numbers"] / added,
    }


SIDES: dict[str, Callable[[Job], Answer]] = {
    "save": save_model,
    "yopo": fit_yopo,
    "loop": fit_loop,
    "peer": fit_peer,
    "check": check_numbers,
    "rates": machine_rates,
}


def main() -> None:
    """Answer jobs until there are no more."""
    for name in sys.argv[1:]:
        importlib.import_module(name)
    for line in sys.stdin:
        print(json.dumps(_in_fork(json.loads(line))), flush=True)


def _in_fork(job: Job) -> Answer:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(job, there))
    child.start()
    there.close()
    try:
        answer: Answer = here.recv()
    except EOFError:
        answer = {"error": "the process ended before it could answer"}
    finally:
        child.join()
    return answer


def _answer(job: Job, there: Any) -> None:
    torch.set_num_threads(job["threads"])
    with contextlib.redirect_stdout(sys.stderr):
        try:
            answer = SIDES[job["side"]](job)
        except Exception as error:  # whatever a side raises is its result
            answer = {"error": f"{type(error).__name__}: {error}".strip().splitlines()[0]}
    there.send(answer)


def _load(job: Job) -> Any:
    if job.get("path") is None:
        return build(job["shape"], device=job["device"])
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(job["path"], dtype=torch.float32).eval()


def _measured(work: Callable[[], Any], device: torch.device) -> Answer:
    """Return seconds on the clock and of processors, and the peak above the memory at the start."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    _wait(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    start, done = _held(device), threading.Event()
    peak = [start]

    def look() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], _held(device))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        started, busy = time.perf_counter(), time.process_time()
        work()
        _wait(device)
        seconds, busy = time.perf_counter() - started, time.process_time() - busy
    finally:
        done.set()
        watcher.join()
    if device.type == "cuda":
        peak[0] = torch.cuda.max_memory_allocated(device)
    return {"seconds": seconds, "busy": busy, "mebibytes": (peak[0] - start) / MEBIBYTE}


def _held(device: torch.device) -> int:
    """Return the bytes that are held: on a GPU by torch, else in memory that no file backs."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    resident, shared = Path("/proc/self/statm").read_text("ascii").split()[1:3]
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


def _phases(work: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Return seconds in operations of torch by their kind, summed over threads."""
    from torch._C._profiler import _ExperimentalConfig
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    every = _ExperimentalConfig(profile_all_threads=True)
    with profile(activities=activities, record_shapes=True, experimental_config=every) as recorded:
        work()
        _wait(device)
    clock = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    spent = dict.fromkeys(("eigenvalues", "matrix products", "gather and copy", "the rest"), 0.0)
    for event in recorded.key_averages(group_by_input_shape=True):
        if event.device_type == DeviceType.CPU:  # its kernels are counted with it
            spent[_kind(event.key, event.input_shapes)] += getattr(event, clock) / 1e6
    return spent


def _kind(name: str, shapes: list[list[int]]) -> str:
    name = name.removeprefix("aten::").strip("_")
    if name.startswith("linalg"):
        return "eigenvalues"
    if name in ("mm", "addmm", "bmm", "baddbmm"):  # of vectors they are the work of the scorer
        vector = any(1 in shape[-2:] for shape in shapes if len(shape) >= 2)
        return "the rest" if vector else "matrix products"
    if name in ("index", "index_select", "gather", "copy", "clone"):
        return "gather and copy"
    return "the rest"


def _best_seconds(work: Callable[[], Any], device: torch.device) -> float:
    best = float("inf")
    for _ in range(7):
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
