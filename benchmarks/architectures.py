"""Prune a tiny model of every causal-LM architecture of transformers, save, reload, compare logits.

    python benchmarks/architectures.py            writes docs/reference/architectures.md
    python benchmarks/architectures.py llama opt  prints these only

Random weights are enough here: the question is whether the cut is exact and the checkpoint loads.
"""

import argparse
import json
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import yopo
from tiny_models import SIZES, Sizes, logits_of, tiny_model
from yopo.adapters import Ffn

RATIO = 0.3


@dataclass(frozen=True)
class Result:
    """Say how one architecture fared."""

    model_type: str
    status: str
    detail: str
    fields: tuple[str, ...] = ()
    found: str = ""


def try_architecture(model_type: str, sizes: Sizes = SIZES["usual"]) -> Result:
    """Prune, save, reload and compare one architecture."""
    try:
        model = tiny_model(model_type, sizes=sizes)
    except Exception as error:
        return Result(model_type, "not built", _first_line(error))
    try:
        return _prune(model_type, model)
    except Exception as error:
        if "no FFN was found" in str(error):
            return Result(model_type, "no FFN", "its layers hold nothing but a state-space mixer")
        return Result(model_type, "failed", _first_line(error))


def _prune(model_type: str, model: PreTrainedModel) -> Result:
    ffns = yopo.find_ffns(model)
    plan = yopo.plan_by_criterion(model, RATIO, criterion=yopo.criteria.norm_product)
    with columns_removed(ffns, plan):
        expected = logits_of(model)
    yopo.apply_plan(model, plan)
    pruned = logits_of(model)
    fields = tuple(sorted({str(ffn.width) for ffn in ffns}))
    found = "layout" if all(ffn.known for ffn in ffns) else "structure, proved"
    status = "yopo.load" if any(ffn.width is None for ffn in ffns) else "pruned"
    detail = "the architecture fixes the width of its FFN" if status == "yopo.load" else ""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        load = yopo.load if status == "yopo.load" else type(model).from_pretrained
        loaded = load(folder).eval()
    if not torch.allclose(logits_of(loaded), pruned, atol=1e-5):
        status, detail = "failed", "logits differ after reloading"
    inner_norm = any(slot.module not in holders(ffn) for ffn in ffns for slot in ffn.vectors)
    if not inner_norm and not torch.allclose(pruned, expected, atol=1e-4):
        status, detail = "failed", "logits are not those of the rows that stay"
    return Result(model_type, status, detail, fields, found)


@contextmanager
def columns_removed(ffns: list[Ffn], plan: yopo.PruningPlan) -> Iterator[None]:
    """Set the contract columns of the rows that `plan` removes to zero, for a while."""
    before = [ffn.contract_weight().clone() for ffn in ffns]
    for ffn, weight_FD in zip(ffns, before, strict=True):
        kept_K = plan.kept[ffn.name]
        ffn.contract_weight().zero_()[kept_K] = weight_FD[kept_K]
    try:
        yield
    finally:
        for ffn, weight_FD in zip(ffns, before, strict=True):
            ffn.contract_weight().copy_(weight_FD)


def holders(ffn: Ffn) -> set[torch.nn.Module]:
    """Return the modules that hold the matrices of `ffn`."""
    return {slot.module for slot in (*ffn.expand, ffn.contract)}


def report(results: list[Result]) -> str:
    """Return the page of the documentation that lists every architecture."""
    groups: dict[str, list[Result]] = {
        status: [result for result in results if result.status == status]
        for status in ("pruned", "yopo.load", "no FFN", "failed", "not built")
    }
    built = len(results) - len(groups["not built"])
    pruned = len(groups["pruned"])
    lines = [
        "# Architectures",
        "",
        f"Every causal-LM `model_type` of transformers {transformers.__version__} is made tiny "
        "from its config class, with random weights and layers of every kind, pruned at "
        f"{RATIO}, saved and loaded again. Its logits must equal those of the dense model without "
        "the removed columns, before and after. `python benchmarks/architectures.py` writes this "
        "page.",
        "",
        f"Of {len(results)} types {built} could be built; **{pruned} of them "
        f"({pruned / built:.0%}) load with stock `from_pretrained`**, "
        f"{len(groups['yopo.load'])} need `yopo.load`, {len(groups['no FFN'])} have no FFN, "
        f"{len(groups['failed'])} fail.",
        "",
        "An architecture that is not listed is searched by structure: yopo changes one config "
        "field at a time, looks which matrices grow, and proves what it finds by permuting rows in "
        "a trial run.",
    ]
    for status, title in _TITLES.items():
        if groups[status]:
            lines += ["", f"## {title}", "", *_table(groups[status])]
    return "\n".join(lines) + "\n"


_TITLES = {
    "pruned": "Load with stock transformers",
    "yopo.load": "Need `yopo.load`",
    "no FFN": "Have no FFN",
    "failed": "Fail",
    "not built": "Could not be built",
}


def _table(results: list[Result]) -> list[str]:
    """Return a table of what the results of one status have to say."""
    if results[0].status == "pruned":
        head, rows = (
            "width set by | found by",
            [
                f"{', '.join(f'`{field}`' for field in result.fields)} | {result.found}"
                for result in results
            ],
        )
    else:
        head, rows = "why", [result.detail.replace("|", "/") for result in results]
    lines = [
        f"| `{result.model_type}` | {row} |" for result, row in zip(results, rows, strict=True)
    ]
    return [f"| model type | {head} |", "|---" * (head.count("|") + 2) + "|", *lines]


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    line = lines[1] if len(lines) > 1 and "validation error" in lines[0].lower() else lines[0]
    return f"{type(error).__name__}: {line}"[:160]


def main() -> None:
    """Run the sweep."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model_types", nargs="*")
    parser.add_argument("--sizes", choices=SIZES, default="usual")
    parser.add_argument("--output", default="docs/reference/architectures.md", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # tiny models only lose time to threads
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    results = []
    for model_type in arguments.model_types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        result = try_architecture(model_type, SIZES[arguments.sizes])
        results.append(result)
        print(json.dumps(asdict(result)), flush=True)
    if not arguments.model_types:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(report(results), encoding="utf-8")
        print(Counter(result.status for result in results), file=sys.stderr)


if __name__ == "__main__":
    main()
