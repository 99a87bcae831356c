"""Run another package's own pruning; `peers.py` starts this in an environment that has it.

    python peers_child.py jobs.json

Each job names a package, a model, what to ask for, and a folder to save into. Prints a line of JSON
a job: the seconds that its thread was on a processor, or the error.
"""

import contextlib
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch


def optipfair(job: dict[str, Any]) -> Any:
    """Return a model that OptiPFair has pruned."""
    import optipfair as package  # type: ignore[import-not-found, unused-ignore]
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    settings: dict[str, Any] = {}
    if job["text"] is not None:
        ids_NW = torch.load(job["text"], weights_only=True)
        rows = [{"input_ids": ids_W, "attention_mask": torch.ones_like(ids_W)} for ids_W in ids_NW]
        settings["dataloader"] = DataLoader(rows, batch_size=job["batch"])  # type: ignore[arg-type, unused-ignore]
    rows_before = model.config.intermediate_size
    # Half a row more than are to go, because the package rounds a percentage down to rows.
    percentage = 100 * (rows_before - job["keep"] + 0.5) / rows_before
    return package.prune_model(
        model,
        neuron_selection_method=job["method"],
        pruning_percentage=percentage,
        show_progress=False,
        **settings,
    )


def efficient_pruners(job: dict[str, Any]) -> Any:
    """Return a model that efficient-pruners has pruned."""
    from efficient_pruners import (  # type: ignore[import-not-found, unused-ignore]
        PruneNet,
        PruningConfig,
    )

    config = PruningConfig(seed=job["seed"], device="cpu", save_dir=f"{job['out']}-policy")
    pruner = PruneNet(config)
    pruner.fit(job["model"], job["ratio"])
    model = pruner.compress(job["ratio"])
    model.config.intermediate_size = job["keep"]  # the package leaves the old width in the config
    return model


def main() -> None:
    """Do the jobs."""
    torch.set_num_threads(1)
    jobs = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    for package in {job["package"] for job in jobs}:
        importlib.import_module(package.replace("-", "_"))  # not to be counted as its time
    for job in jobs:
        answer: dict[str, Any] = {"out": job["out"]}
        started = time.thread_time()
        try:
            with contextlib.redirect_stdout(sys.stderr):
                prune = {"optipfair": optipfair, "efficient-pruners": efficient_pruners}
                model = prune[job["package"]](job)
                answer["seconds"] = time.thread_time() - started
                model.save_pretrained(job["out"])
        except Exception as error:  # whatever a package raises is its result
            answer["error"] = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
