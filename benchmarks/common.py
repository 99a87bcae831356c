"""What the benchmarks share: models to measure on, their texts, and how a result is kept."""

import argparse
import json
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import yopo
from yopo.embedded import model_path
from yopo.embedded.stories import HELD_OUT_SEED, write_text

RESULTS = Path(__file__).parents[1] / "docs" / "results"
SHARED = Path(__file__).resolve().parents[2] / "shared"
"""Trained models and texts that do not travel with the project; benchmarks skip them if absent."""

SHARED_MODELS = ("llama-s", "opt-s", "phi-s")
WINDOW = 256


@dataclass(frozen=True)
class Subject:
    """A trained model, the tokens to measure on, and real text to calibrate on."""

    name: str
    path: Path
    test_T: torch.Tensor
    real_NW: torch.Tensor

    def load(self) -> Any:
        """Return a fresh copy of the model in float32."""
        return AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32).eval()

    def perplexity(self, model: Any) -> float:
        """Return the perplexity of a model on the tokens to measure on."""
        return yopo.perplexity(model, self.test_T, window=WINDOW)


def subjects(windows: int = 32) -> Iterator[Subject]:
    """Yield the embedded model, then those in `../shared` where it is there."""
    yield _subject(
        "embedded",
        model_path(),
        write_text(HELD_OUT_SEED, 200_000),
        write_text(1, 400_000),
        windows,
    )
    for name in SHARED_MODELS:
        path = SHARED / "models" / name
        if path.is_dir():
            test, real = (
                (SHARED / "corpora" / f"wikitext2-{part}.txt").read_text(encoding="utf-8")
                for part in ("test", "valid")
            )
            yield _subject(name, path, test[:400_000], real[:400_000], windows)


def measure_subjects(
    name: str,
    told: str,
    ratios: Sequence[float],
    *,
    measure: Callable[[Subject, list[float]], Iterable[dict[str, Any]]],
    page: Callable[[list[dict[str, Any]]], str],
) -> None:
    """Measure on each model that the command line names, and keep what comes out.

    It goes to `docs/results/{name}.json` and .md.

    Args:
        name: Name of the result.
        told: What the benchmark is; its first line is shown as help.
        ratios: Those to measure where the command line names none.
        measure: Gives the rows of one model.
        page: Makes a page of all rows.
    """
    parser = argparse.ArgumentParser(description=told.split("\n", 1)[0])
    parser.add_argument("--models", nargs="+")
    parser.add_argument("--ratios", nargs="+", type=float, default=list(ratios))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    quiet()
    rows = kept_rows(name)
    for subject in subjects():
        if arguments.models is None or subject.name in arguments.models:
            rows = [row for row in rows if row["model"] != subject.name]
            rows += measure(subject, arguments.ratios)
            keep_result(name, rows)
            (RESULTS / f"{name}.md").write_text(page(rows), encoding="utf-8")


def method_of(told: str) -> str:
    """Return how a benchmark measures, by the third paragraph of its docstring.

    That begins with a sentence that says where results are written, which is left out.
    """
    return told.split("\n\n")[2].strip().partition(". ")[2]


def keep_result(name: str, rows: list[dict[str, Any]]) -> None:
    """Write `docs/results/{name}.json` with the machine and the versions it was measured on."""
    RESULTS.mkdir(exist_ok=True)
    document = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {
            "yopo-prune": yopo.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "rows": rows,
    }
    text = json.dumps(document, indent=1) + "\n"
    (RESULTS / f"{name}.json").write_text(text, encoding="utf-8")


def kept_rows(name: str) -> list[dict[str, Any]]:
    """Return the rows of an earlier result, none if there is no such file."""
    path = RESULTS / f"{name}.json"
    rows: list[dict[str, Any]] = (
        json.loads(path.read_text("utf-8"))["rows"] if path.exists() else []
    )
    return rows


def machine(device: torch.device, *, shared: bool = False) -> str:
    """Return what a device is called, a CPU with the threads in use.

    Args:
        device: The device.
        shared: Whether to say of a CPU that it does other work too.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")
    lines = information.read_text("utf-8").splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or "CPU"
    told = f"{name}, {torch.get_num_threads()} of {os.cpu_count()} cores"
    return f"{told}, shared with other work" if shared else told


def quiet() -> None:
    """Switch off the progress bars and notes of transformers."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _subject(name: str, path: Path, test: str, real: str, windows: int) -> Subject:
    tokenizer = AutoTokenizer.from_pretrained(path)
    test_ids, real_ids = (
        torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        for text in (test, real)
    )
    sequences = min(len(real_ids) // WINDOW, 128)
    real_NW = real_ids[: sequences * WINDOW].view(-1, WINDOW)
    return Subject(name, path, test_ids[: windows * WINDOW], real_NW)
