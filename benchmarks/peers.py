"""Are our versions of others' methods fair? Each package's own pruning beside them.

    python benchmarks/peers.py                  in a throw-away virtual environment
    python benchmarks/peers.py --venv FOLDER    in one that is kept, and made if it is not there

Installs OptiPFair and efficient-pruners from the package index, with the torch and transformers of
`constraints.txt`, has them prune the embedded model and llama-s, and measures what they save.
Writes docs/results/peers.json and .md.

Both sides start from the same weights in float32 and keep int((1 - ratio) n) rows (OptiPFair rounds
a percentage and would keep one more at some ratios). "Same rows" is the share of the package's kept
rows that ours keeps too; where MAW's differ, the scores at the border are equal, as weights that
were stored in half precision make them. PruneNet draws its rows at random, on both sides with the
package's step size of 0.001, so there the same rows are a matter of chance, and means ± standard
deviations over eight seeds are to be compared; in brackets behind their difference stands how many
of its standard errors it is. efficient-pruners does not write the new width into the config; it is
written for it before saving. Seconds are those of a processor, for one cut by the package.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import baselines
import yopo
from common import RESULTS, Subject, keep_result, quiet, subjects
from yopo.report import format_table

MODELS = ("embedded", "llama-s")
RATIOS = (0.2, 0.3, 0.5)
PACKAGES = ("optipfair", "efficient-pruners")
SEEDS = tuple(range(8))
ROOT = Path(__file__).resolve().parents[1]

Rows = dict[str, Tensor]
Plan = Callable[[Any, float, int], yopo.PruningPlan]
"""Our version: plans for a model, a ratio and a seed."""


def environment(folder: Path) -> Path:
    """Return the interpreter of an environment with the packages, made in `folder` if need be."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        install = [str(python), "-m", "pip", "install", "--quiet", *PACKAGES]
        subprocess.run([*install, "--constraint", str(ROOT / "constraints.txt")], check=True)
    return python


def versions(python: Path) -> dict[str, str]:
    """Return the versions of what is compared, as the environment has them."""
    names = [*PACKAGES, "torch", "transformers"]
    code = f"import importlib.metadata as m, json; n = {names}; "
    code += "print(json.dumps(dict(zip(n, map(m.version, n)))))"
    told = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    found: dict[str, str] = json.loads(told.stdout)
    return found


def jobs_for(subject: Subject, model: str, text: str) -> list[dict[str, Any]]:
    """Return what the packages are asked for: each method, at each ratio, with each seed."""
    (rows,) = {ffn.rows for ffn in yopo.find_ffns(subject.load())}
    jobs = []
    for ratio in RATIOS:
        job = {"model": model, "ratio": ratio, "keep": int((1 - ratio) * rows), "seed": 0}
        job |= {"package": "optipfair", "text": None, "batch": baselines.BATCH}
        jobs += [job | {"method": method} for method in ("MAW", "VOW", "PON", "L2")]
        jobs.append(job | {"method": "MAW", "text": text})
        job |= {"package": "efficient-pruners", "method": "PruneNet"}
        jobs += [job | {"seed": seed} for seed in SEEDS]
    return [job | {"out": f"{model}-{number}"} for number, job in enumerate(jobs)]


def our_version(job: dict[str, Any], seen: dict[str, baselines.Seen]) -> Plan:
    """Return our version of what a job asks for."""
    if job["package"] == "efficient-pruners":
        return lambda model, ratio, seed: (
            yopo.PolicyPruner.prunenet(ratio=ratio, seed=seed, learning_rate=1e-3)
            .fit(model)
            .plan(model, ratio)
        )
    score = baselines.WEIGHTS_ONLY[f"OptiPFair {job['method']}"]
    if job["text"] is not None:
        score = baselines.maw_with_text(seen)
    return lambda model, ratio, seed: yopo.plan_by_criterion(
        model, ratio, criterion=score, multiple_of=1
    )


def kept_by(pruned: Any, dense: Any) -> Rows:
    """Return the rows of `dense` that are left in `pruned`, told by their first expand matrix."""
    kept = {}
    for small, large in zip(yopo.find_ffns(pruned), yopo.find_ffns(dense), strict=True):
        numbers = {
            row_D.numpy().tobytes(): number
            for number, row_D in enumerate(large.expand_weights()[0].float())
        }
        found = [numbers[row_D.numpy().tobytes()] for row_D in small.expand_weights()[0].float()]
        kept[large.name] = torch.tensor(sorted(found))
    return kept


def same_rows(theirs: Rows, ours: Rows) -> float:
    """Return the share of rows of `theirs` that are among `ours`."""
    common = sum(int(torch.isin(theirs[name], ours[name]).sum()) for name in theirs)
    return common / sum(len(kept_K) for kept_K in theirs.values())


def compare(subject: Subject, python: Path, folder: Path) -> list[dict[str, Any]]:
    """Let the packages prune one model, and return a row for each job."""
    model, text = f"llama-{subject.name}", "text.pt"
    dense = subject.load()
    dense.save_pretrained(folder / model)
    torch.save(subject.real_NW, folder / text)
    jobs = jobs_for(subject, model, text)
    (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    child = [str(python), str(Path(__file__).resolve().with_name("peers_child.py")), "jobs.json"]
    # efficient-pruners knows models by their path: it has to hold "llama", but not "opt" or "phi".
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    told = subprocess.run(
        child, cwd=folder, check=True, stdout=subprocess.PIPE, text=True, env=clean
    )
    answers = [json.loads(line) for line in told.stdout.splitlines()]
    seen = baselines.see(dense, subject.real_NW)
    rows = []
    for job, answer in zip(jobs, answers, strict=True):
        plan = our_version(job, seen)(dense, job["ratio"], job["seed"])
        cut = subject.load()
        yopo.apply_plan(cut, plan)
        row = {key: job[key] for key in ("package", "method", "ratio", "seed")}
        row |= {"model": subject.name, "text": job["text"] is not None}
        row |= {"ours": subject.perplexity(cut), "error": answer.get("error")}
        if "error" not in answer:
            pruned = AutoModelForCausalLM.from_pretrained(folder / job["out"], dtype=torch.float32)
            theirs = kept_by(pruned, dense)
            row |= {
                "theirs": subject.perplexity(pruned.eval()),
                "seconds": answer["seconds"],
                "same rows": same_rows(theirs, dict(plan.kept)),
                "widths": [len(kept_K) for kept_K in theirs.values()],
            }
        rows.append(row)
        print(row, flush=True)
    return rows


def page(rows: list[dict[str, Any]], found: dict[str, str]) -> str:
    """Return the page: a line for each method and ratio, over its seeds."""
    header = "model|package|method|ratio|theirs|ours|difference|same rows|seconds".split("|")
    table = [header]
    keys = ("model", "package", "method", "text", "ratio")
    for key in dict.fromkeys(tuple(row[name] for name in keys) for row in rows):
        mine = [row for row in rows if tuple(row[name] for name in keys) == key]
        model, package, method, text, ratio = key
        line = [model, package, f"{method} with text" if text else method, f"{ratio:g}"]
        ours = [row["ours"] for row in mine]
        failed = [row["error"] for row in mine if row["error"] is not None]
        if failed:
            table.append([*line, failed[0], _shown(ours), "", "", ""])
            continue
        theirs = [row["theirs"] for row in mine]
        same = statistics.fmean(row["same rows"] for row in mine)
        seconds = statistics.fmean(row["seconds"] for row in mine)
        line += [_shown(theirs), _shown(ours), _difference(theirs, ours), f"{same:.1%}"]
        table.append([*line, f"{seconds:.2f}"])
    told = ", ".join(f"{name} {version}" for name, version in found.items())
    intro = __doc__.split("\n\n")[3].strip()
    return f"# Packages of others\n\n{intro}\n\nMeasured with {told}.\n\n{format_table(table)}\n"


def _shown(values: list[float]) -> str:
    shown = f"{statistics.fmean(values):.3f}"
    return f"{shown} ± {statistics.stdev(values):.3f}" if len(values) > 1 else shown


def _difference(theirs: list[float], ours: list[float]) -> str:
    """Return the difference of the mean logarithms, about as a share of the perplexity."""
    pair = [[math.log(value) for value in values] for values in (theirs, ours)]
    difference = statistics.fmean(pair[1]) - statistics.fmean(pair[0])
    shown = f"{difference:+.2%}"
    if len(ours) == 1:
        return shown
    error = math.sqrt(sum(statistics.variance(logs) / len(logs) for logs in pair))
    return f"{shown} ({difference / error:+.1f})"


def main() -> None:
    """Install, prune, measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--venv", type=Path)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    quiet()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="peers-")))
        python = environment((arguments.venv or folder / "venv").absolute())
        found = versions(python)
        rows = []
        for subject in subjects():
            if subject.name in arguments.models:
                rows += compare(subject, python, folder)
        rows = [row | {"version": found[row["package"]]} for row in rows]
        keep_result("peers", rows)
        (RESULTS / "peers.md").write_text(page(rows, found), encoding="utf-8")
        print(page(rows, found), file=sys.stdout)


if __name__ == "__main__":
    main()
