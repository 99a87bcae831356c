"""Read the questions of zero-shot tasks from local files, for the task definitions in `local/`.

Lines of `piqa.jsonl`, `hellaswag.jsonl`, `arc_easy.jsonl`, `arc_challenge.jsonl` and
`openbookqa.jsonl` hold a `context`, `choices` that go on where it ends, space included, and the
`label` of the right one from 0. Lines of `winogrande.jsonl` hold two `contexts`, the one
`continuation` of both, and the `label` of the right context. `mmlu/dev` and `mmlu/test` hold CSV
files a subject, `anatomy_test.csv`, with the header `question,choice0,choice1,choice2,choice3,
answer`. All text is as a model reads it, so definitions of lm-eval's own make the same requests.
"""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from yopo.errors import InvalidArgumentError

Document = dict[str, Any]


def read_choices(*, data_dir: Path, file: str, **_: Any) -> dict[str, Any]:
    """Return the split `validation` of a task whose choices go on from one context.

    Args:
        data_dir: The folder with the files of all tasks.
        file: The file of this one.

    Raises:
        InvalidArgumentError: If the file is missing or damaged.
    """

    def document(line: str) -> Document:
        found = json.loads(line)
        choices, label = [_after_space(choice) for choice in found["choices"]], found["label"]
        return {"context": str(found["context"]), "choices": choices, "label": _in(choices, label)}

    return {"validation": _read_lines(Path(data_dir) / file, document)}


def read_contexts(*, data_dir: Path, file: str, **_: Any) -> dict[str, Any]:
    """Return the split `validation` of a task that asks which context one continuation fits.

    Args:
        data_dir: The folder with the files of all tasks.
        file: The file of this one.

    Raises:
        InvalidArgumentError: If the file is missing or damaged.
    """

    def document(line: str) -> Document:
        found = json.loads(line)
        contexts, label = [str(context) for context in found["contexts"]], found["label"]
        continuation = found["continuation"].strip()  # as lm-eval does, of this task alone
        return {"contexts": contexts, "continuation": continuation, "label": _in(contexts, label)}

    return {"validation": _read_lines(Path(data_dir) / file, document)}


def read_mmlu(*, data_dir: Path, subject: str, **_: Any) -> dict[str, Any]:
    """Return the splits `dev` and `test` of a subject of MMLU.

    Args:
        data_dir: The folder with the files of all tasks.
        subject: As in the names of the files.

    Raises:
        InvalidArgumentError: If a file is missing or damaged.
    """

    def document(row: dict[str, str]) -> Document:
        choices = [row[f"choice{number}"] for number in range(4)]
        answer = _in(choices, int(row["answer"]))
        return {"question": row["question"], "choices": choices, "answer": answer}

    splits = {}
    for split in ("dev", "test"):
        file = Path(data_dir) / "mmlu" / split / f"{subject}_{split}.csv"
        with _opened(file).open(encoding="utf-8", newline="") as lines:
            splits[split] = _documents(file, csv.DictReader(lines), document)
    return splits


def _read_lines(file: Path, document: Callable[[str], Document]) -> Any:
    with _opened(file).open(encoding="utf-8") as lines:
        return _documents(file, [line for line in lines if line.strip()], document)


def _documents(file: Path, lines: Any, document: Callable[[Any], Document]) -> Any:
    """Return the documents that lines hold, as a data set."""
    from datasets import Dataset

    found = []
    for number, line in enumerate(lines):
        try:
            found.append(document(line))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidArgumentError(
                f"`{file}` is damaged: its entry {number} lacks or spoils {error}."
            ) from error
    if not found:
        raise InvalidArgumentError(f"`{file}` holds no questions.")
    return Dataset.from_list(found)


def _opened(file: Path) -> Path:
    if not file.is_file():
        raise InvalidArgumentError(
            f"`{file}` is missing. `data_dir` needs a file for each task asked for; what they hold "
            "is in the documentation of `yopo.evaluate`."
        )
    return file


def _after_space(text: str) -> str:
    """Return what follows the space with which a continuation begins; lm-eval adds one."""
    return text.removeprefix(" ")


def _in(choices: list[str], label: int) -> int:
    """Return `label` if there is such a choice."""
    if not 0 <= int(label) < len(choices):
        raise ValueError(f"the label {label} of {len(choices)} choices")
    return int(label)
