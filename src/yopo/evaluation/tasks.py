"""Accuracy on zero-shot and few-shot tasks, by EleutherAI's lm-eval."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from yopo.errors import InvalidArgumentError
from yopo.evaluation.answers import check_answers, score_of
from yopo.evaluation.definitions import load_tasks
from yopo.evaluation.scores import TaskReport
from yopo.evaluation.texts import check_tokenizer
from yopo.evaluation.windows import window_of
from yopo.generators import generators_put_back
from yopo.loading import load

_RESAMPLED = 1000
"""Draws of a bootstrap, for metrics whose standard error has no formula; accuracies have one."""

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
        tasks: "paper" for PIQA, WinoGrande, HellaSwag, ARC-easy and ARC-challenge; "mmlu"; tasks,
            groups and tags of lm-eval by name; or several of all these.
        against: The model to compare with, such as the dense one, or an earlier report of it.
        data_dir: Folder with the questions, for a machine without a network.
        few_shot: Solved examples before each question; by default as the task says, mostly none.
            Of the files in `data_dir` those of MMLU alone have any.
        limit: Questions of each task to ask, the first ones; by default all.
        batch: Requests a forward pass.
        window: Tokens that a request may have, what exceeds them is cut on the left; by default as
            many as the model has positions.
        seed: Seed of the choice of examples, and of whatever a task draws.

    Raises:
        InvalidArgumentError: If a task is unknown, a file is missing, damaged or without the
            examples for `few_shot`, the tokenizer is missing or has more tokens than the model, a
            window exceeds the model's positions or is shorter than an answer, the model gives NaN,
            or a report does not fit.
        YopoError: If lm-eval is not installed.
        OSError: If there is no such model, or a data set cannot be downloaded.

    Example:
        >>> report = yopo.evaluate("llama-pruned", against="llama")
    """
    for name, value in (("limit", limit), ("batch", batch)):
        if value is not None and value < 1:
            raise InvalidArgumentError(f"`{name}` must be at least 1, got {value}.")
    if few_shot is not None and few_shot < 0:
        raise InvalidArgumentError(f"`few_shot` must not be negative, got {few_shot}.")
    with _quiet(), generators_put_back():
        found, names = load_tasks(tasks, data_dir, few_shot=few_shot, seed=seed)
        settings = {"few_shot": few_shot, "limit": limit, "batch": batch, "seed": seed}
        earlier = against if isinstance(against, TaskReport) else None
        if against is not None and not isinstance(against, TaskReport):
            earlier = _measure(against, tokenizer, names, found, data_dir, window, settings)
        report = _measure(model, tokenizer, names, found, data_dir, window, settings)
    return report if earlier is None else _beside(report, earlier)


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
    if window is not None:
        window_of(model, window)
    training = model.training
    try:
        lm = HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=settings["batch"], max_length=window
        )
        lm._loglikelihood_tokens = partial(_scored, lm, lm._loglikelihood_tokens)
        set_seed(settings["seed"])
        found = ask(lm, tasks, limit=settings["limit"], bootstrap_iters=_RESAMPLED)
    finally:
        model.train(training)
    for samples in found["samples"].values():
        check_answers(samples)
    groups = found.get("groups", {})
    return TaskReport(
        names=(_name(source, "model"), "against"),
        scores=tuple(score_of(name, found) for name in dict.fromkeys([*names, *groups])),
        members=tuple(score_of(name, found) for name in found["n-samples"] if name not in names),
        pinned=_pinned(model, lm, found, data_dir, settings),
    )


def _scored(
    lm: Any,
    score: Callable[..., Any],
    requests: Sequence[tuple[Any, Any, Sequence[int]]],
    **named: Any,
) -> Any:
    """Return what `score` finds of requests, whose answers lm-eval asserts to fit into a window.

    Raises:
        InvalidArgumentError: If one does not.
    """
    longest = max(len(answer) for _, _, answer in requests)
    if longest > lm.max_length:
        raise InvalidArgumentError(
            f"`window={lm.max_length}` is too small for an answer of {longest} tokens."
        )
    return score(requests, **named)


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
        "questions from": "the hub" if data_dir is None else str(Path(data_dir)),
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
