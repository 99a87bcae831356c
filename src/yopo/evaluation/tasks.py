"""Accuracy on zero-shot and few-shot tasks, by EleutherAI's lm-eval."""

import difflib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from yopo.errors import InvalidArgumentError, YopoError, missing_extra
from yopo.evaluation.scores import Score, TaskReport, TaskScore
from yopo.evaluation.texts import check_tokenizer
from yopo.generators import generators_put_back
from yopo.loading import load

PRESETS = {
    "paper": ("piqa", "winogrande", "hellaswag", "arc_easy", "arc_challenge"),
    "mmlu": ("mmlu",),
}
"""The tasks of arXiv 2501.15296 under the names of lm-eval."""

_PREFERRED = ("acc_norm", "acc", "exact_match", "word_perplexity")
"""Which metric of a task counts, likeliest first: length-normalised accuracy where there is one."""

_RESAMPLED = 1000
"""Draws of a bootstrap, for metrics whose standard error has no formula; accuracies have one."""

_DEFINITIONS = Path(__file__).parent / "local"

Source = nn.Module | str | Path


def evaluate(
    model: Source,
    tokenizer: Any = None,
    *,
    tasks: str | Sequence[str] = "paper",
    against: Source | TaskReport | None = None,
    data_dir: str | Path | None = None,
    few_shot: int | None = None,
    limit: int | None = None,
    batch: int = 8,
    window: int | None = None,
    seed: int = 0,
) -> TaskReport:
    """Return what a model scores on tasks, beside another one if given.

    lm-eval asks the questions and counts the answers. The metric is the length-normalised accuracy
    `acc_norm` where a task has it, else `acc`: for the five tasks of the paper, as in the paper.

    With `data_dir` nothing is downloaded. Its files hold the questions, one file a task; the
    definitions come with yopo and make the same requests as lm-eval's own:

    * `piqa.jsonl`, `hellaswag.jsonl`, `arc_easy.jsonl`, `arc_challenge.jsonl`, `openbookqa.jsonl`:
      a JSON object a line with `context`, `choices` that go on where it ends, and `label`;
    * `winogrande.jsonl`: with two `contexts`, the `continuation` of both, and `label`;
    * `mmlu/dev/SUBJECT_dev.csv`, `mmlu/test/SUBJECT_test.csv`: `question,choice0,…,choice3,answer`.

    YAML definitions of lm-eval that lie in the folder are read too.

    Args:
        model: A model in memory, a folder, or a name on the hub.
        tokenizer: Its tokenizer; by default that of the folder.
        tasks: "paper" for PIQA, WinoGrande, HellaSwag, ARC-easy and ARC-challenge; "mmlu"; or tasks
            and groups of lm-eval by name.
        against: The model to compare with, such as the dense one, or an earlier report of it.
        data_dir: Folder with the questions, for a machine without a network.
        few_shot: Solved examples before each question; by default as the task says, mostly none.
        limit: Questions of each task to ask, the first ones; by default all.
        batch: Requests a forward pass.
        window: Tokens that a request may have, what exceeds them is cut on the left; by default as
            many as the model has positions.
        seed: Seed of the choice of examples, and of whatever a task draws.

    Raises:
        InvalidArgumentError: If a task is unknown, a file is missing or damaged, the tokenizer is
            missing or has more tokens than the model, or a report does not fit.
        YopoError: If lm-eval is not installed.
        OSError: If there is no such model, or a data set cannot be downloaded.

    Example:
        >>> report = yopo.evaluate("llama-pruned", against="llama")  # doctest: +SKIP
    """
    names = list(PRESETS.get(tasks, (tasks,)) if isinstance(tasks, str) else tasks)
    for name, value in (("limit", limit), ("batch", batch), ("window", window)):
        if value is not None and value < 1:
            raise InvalidArgumentError(f"`{name}` must be at least 1, got {value}.")
    if few_shot is not None and few_shot < 0:
        raise InvalidArgumentError(f"`few_shot` must not be negative, got {few_shot}.")
    with _quiet(), generators_put_back():
        found = _load_tasks(names, data_dir, few_shot, seed)
        settings = {"few_shot": few_shot, "limit": limit, "batch": batch, "seed": seed}
        earlier = against if isinstance(against, TaskReport) else None
        if against is not None and not isinstance(against, TaskReport):
            earlier = _measure(against, tokenizer, names, found, data_dir, window, settings)
        report = _measure(model, tokenizer, names, found, data_dir, window, settings)
    return report if earlier is None else _beside(report, earlier)


@cache
def _manager_of_lm_eval() -> Any:
    """Return what finds lm-eval's own definitions: of thousands, which takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _manager(data_dir: str | None) -> Any:
    """Return what finds the definitions of tasks."""
    from lm_eval.tasks import TaskManager

    if data_dir is None:
        return _manager_of_lm_eval()
    paths = [str(_DEFINITIONS), data_dir]
    return TaskManager(include_path=paths, include_defaults=False, metadata={"data_dir": data_dir})


def _load_tasks(
    names: Sequence[str], data_dir: str | Path | None, few_shot: int | None, seed: int
) -> Any:
    """Return tasks and groups as lm-eval holds them.

    Raises:
        InvalidArgumentError: If one is unknown, or a local file is missing or damaged.
        YopoError: If lm-eval is not installed.
        OSError: If a data set cannot be downloaded.
    """
    if data_dir is not None and not Path(data_dir).is_dir():
        raise InvalidArgumentError(f"`data_dir={str(data_dir)!r}` is no folder.")
    try:
        manager = _manager(None if data_dir is None else str(data_dir))
    except ImportError as error:
        raise missing_extra("tasks need lm-eval", "eval") from error
    known = manager.all_tasks
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 3) or known[:5]
            where = "lm-eval knows" if data_dir is None else "are defined for local files"
            raise InvalidArgumentError(
                f"there is no task {name!r}; {where}, among others, {', '.join(near)}. Presets "
                f"are {', '.join(PRESETS)}."
            )
    if not names:
        raise InvalidArgumentError("`tasks` names none.")
    try:
        loaded = manager.load(list(names))
    except ConnectionError as error:
        raise OSError(
            f"the questions cannot be downloaded: {error}. On a machine without a network, pass "
            "`data_dir`, a folder that holds them."
        ) from error
    for task in loaded["tasks"].values():
        if few_shot is not None or task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=few_shot or 0)
        task.set_fewshot_seed(seed=seed)
    return loaded


def _measure(
    source: Source,
    tokenizer: Any,
    names: Sequence[str],
    tasks: Any,
    data_dir: str | Path | None,
    window: int | None,
    settings: dict[str, Any],
) -> TaskReport:
    """Return what one model scores."""
    from lm_eval import evaluate as ask
    from lm_eval.models.huggingface import HFLM
    from transformers import set_seed

    model, tokenizer = open_with_tokenizer(source, tokenizer)
    check_tokenizer(model, tokenizer)
    training = model.training
    try:
        lm = HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=settings["batch"], max_length=window
        )
        set_seed(settings["seed"])
        found = ask(lm, tasks, limit=settings["limit"], bootstrap_iters=_RESAMPLED)
    finally:
        model.train(training)
    groups = found.get("groups", {})
    return TaskReport(
        names=(_name(source, "model"), "against"),
        scores=tuple(_score(name, found) for name in dict.fromkeys([*names, *groups])),
        members=tuple(_score(name, found) for name in found["n-samples"] if name not in names),
        pinned=_pinned(model, lm, found, data_dir, settings),
    )


def open_with_tokenizer(
    source: Source, tokenizer: Any = None, *, dtype: str = "auto"
) -> tuple[Any, Any]:
    """Return a model and its tokenizer; what has to be loaded goes to the accelerator if any.

    Args:
        source: A model in memory, which stays where it is, a folder, or a name on the hub.
        tokenizer: Its tokenizer; by default that of the folder.
        dtype: Dtype to load the weights in.

    Raises:
        InvalidArgumentError: If there is no tokenizer.
        OSError: If there is no such model.
    """
    if isinstance(source, nn.Module):
        if tokenizer is None:
            raise InvalidArgumentError("`tokenizer` is needed beside a model in memory.")
        return source, tokenizer
    from transformers import AutoTokenizer

    if tokenizer is None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError, KeyError) as error:
            raise InvalidArgumentError(
                f"`{source}` holds no tokenizer that can be read: pass `tokenizer`."
            ) from error
    device = torch.accelerator.current_accelerator(check_available=True)
    return load(source, dtype=dtype).to(device or "cpu"), tokenizer


def _score(name: str, found: dict[str, Any]) -> TaskScore:
    """Return the score of a task, or of a group of tasks, out of what lm-eval has found."""
    result = {**found["results"], **found.get("groups", {})}[name]
    values = {
        key.partition(",")[0]: value
        for key, value in result.items()
        if "," in key and isinstance(value, float) and "_stderr" not in key
    }
    metric = next((metric for metric in _PREFERRED if metric in values), next(iter(values), None))
    if metric is None:
        raise YopoError(f"lm-eval has found no number for {name!r}.")
    errors = [value for key, value in result.items() if key.startswith(f"{metric}_stderr,")]
    members = _members(name, found["group_subtasks"])
    samples = [sample for member in members for sample in found["samples"][member]]
    return TaskScore(
        task=name,
        metric=metric,
        questions=len(samples),
        chance=_chance(samples) if metric in ("acc", "acc_norm") else None,
        model=Score(values[metric], float(errors[0]) if errors and errors[0] != "N/A" else None),
    )


def _members(name: str, children: dict[str, list[str]]) -> list[str]:
    """Return the tasks inside a group, or the task itself."""
    if not children.get(name):
        return [name]
    return [task for child in children[name] for task in _members(child, children)]


def _chance(samples: Sequence[dict[str, Any]]) -> float | None:
    """Return what guessing scores: the mean of one over the number of choices."""
    choices = [len(sample["resps"]) for sample in samples]
    return sum(1 / count for count in choices) / len(choices) if min(choices) > 1 else None


def _pinned(
    model: Any,
    lm: Any,
    found: dict[str, Any],
    data_dir: str | Path | None,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Return what moves the numbers."""
    shots, versions = set(found["n-shot"].values()), found["versions"]
    return {
        "lm-eval": version("lm-eval"),
        "task versions": {name: versions[name] for name in found["n-samples"]},
        "questions from": "the hub" if data_dir is None else str(data_dir),
        "few-shot": shots.pop() if len(shots) == 1 else found["n-shot"],
        "limit": settings["limit"],
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "window": lm.max_length,
        "batch": settings["batch"],
        "seed": settings["seed"],
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def _beside(report: TaskReport, other: TaskReport) -> TaskReport:
    """Return a report with the scores of another one beside its own.

    Raises:
        InvalidArgumentError: If they were measured in different ways.
    """
    moved = {
        name: (value, other.pinned.get(name))
        for name, value in report.pinned.items()
        if name != "dtype" and other.pinned.get(name) != value
    }
    if moved:
        told = ", ".join(f"{name} {theirs}, not {ours}" for name, (ours, theirs) in moved.items())
        raise InvalidArgumentError(f"`against` was measured in another way: {told}.")
    theirs = {score.task: score.model for score in (*other.scores, *other.members)}
    return replace(
        report,
        names=(report.names[0], other.names[0] if other.names[0] != "model" else "against"),
        scores=tuple(replace(score, against=theirs[score.task]) for score in report.scores),
        members=tuple(replace(score, against=theirs[score.task]) for score in report.members),
    )


def _name(source: Source, default: str) -> str:
    return default if isinstance(source, nn.Module) else Path(source).name


@contextmanager
def _quiet() -> Iterator[None]:
    """Let lm-eval log errors only: it warns of what is done here on purpose."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
