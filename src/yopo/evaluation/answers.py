"""Scores out of what lm-eval has found: which metric counts, of which filter, on which samples."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from yopo.errors import YopoError
from yopo.evaluation.scores import Score, TaskScore
from yopo.evaluation.windows import check_finite

_PREFERRED = ("acc_norm", "acc", "exact_match", "word_perplexity")
"""Which metric of a task counts, likeliest first: length-normalised accuracy where there is one."""


def score_of(name: str, found: Mapping[str, Any]) -> TaskScore:
    """Return the score of a task, or of a group of tasks.

    Of several filters, by which answers are read off what a model writes, the first counts.

    Raises:
        YopoError: If there is none.
    """
    result = {**found["results"], **found.get("groups", {})}[name]
    keys = [
        k for k, v in result.items() if "," in k and "_stderr," not in k and isinstance(v, float)
    ]
    if not keys:
        raise YopoError(f"lm-eval has found no number for {name!r}.")
    key = min(keys, key=_place)
    metric, _, answers = key.partition(",")
    error = result.get(f"{metric}_stderr,{answers}", "N/A")
    samples = [
        sample
        for member in _members(name, found["group_subtasks"])
        for sample in found["samples"][member]
        if sample["filter"] == answers
    ]
    return TaskScore(
        task=name,
        metric=metric if answers == "none" else f"{metric}, {answers}",
        questions=len(samples),
        chance=_chance(samples) if metric in ("acc", "acc_norm") else None,
        model=Score(result[key], None if error == "N/A" else float(error)),
    )


def check_answers(samples: Iterable[Mapping[str, Any]]) -> None:
    """Check that log-likelihoods of answers are numbers: lm-eval makes accuracies of NaN as well.

    Raises:
        InvalidArgumentError: If one is NaN or infinite.
    """
    for sample in samples:
        for response in (response for responses in sample["resps"] for response in responses):
            value = response[0] if isinstance(response, tuple) else response
            if isinstance(value, float):  # of what is written there are words
                check_finite(value)


def _place(key: str) -> int:
    """Return where the metric of a key stands among those that are preferred."""
    metric = key.partition(",")[0]
    return _PREFERRED.index(metric) if metric in _PREFERRED else len(_PREFERRED)


def _members(name: str, children: Mapping[str, list[str]]) -> list[str]:
    """Return the tasks inside a group, or the task itself."""
    if not children.get(name):
        return [name]
    return [task for child in children[name] for task in _members(child, children)]


def _chance(samples: Sequence[Mapping[str, Any]]) -> float | None:
    """Return what guessing scores: the mean of one over the number of choices."""
    choices = [len(sample["resps"]) for sample in samples]
    return sum(1 / count for count in choices) / len(choices) if min(choices) > 1 else None
