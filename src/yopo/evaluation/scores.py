"""What models score on tasks, one beside another, and a table of it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from yopo.report import format_table

_AVERAGE = "average"
"""What the mean over tasks is called among them."""


@dataclass(frozen=True, slots=True)
class Score:
    """Hold what a model scores.

    Attributes:
        value: The metric; accuracies in [0, 1].
        error: Its standard error over the questions, None where lm-eval knows none.
    """

    value: float
    error: float | None = None


@dataclass(frozen=True, slots=True)
class TaskScore:
    """Hold what a model, and one that it is compared with, score on a task.

    Attributes:
        task: The task, or the group of tasks.
        metric: What was measured.
        questions: On how many questions.
        chance: What guessing scores, None where that is not known.
        model: What the model scores.
        against: What the other one scores, None if there is none.
    """

    task: str
    metric: str
    questions: int
    chance: float | None
    model: Score
    against: Score | None = None

    @property
    def is_share(self) -> bool:
        """Tell whether the metric is a share of the questions, not a perplexity."""
        return "perplexity" not in self.metric

    @property
    def retention(self) -> float | None:
        """Return the score as a share of the other model's; None for a perplexity."""
        return _share(self.model, self.against, 0.0) if self.is_share else None

    @property
    def retention_above_chance(self) -> float | None:
        """Return by how much the score exceeds chance, as a share of the same of the other model.

        None where the other one is not clearly, by two standard errors, above chance itself.
        """
        if self.chance is None or self.against is None or self.against.error is None:
            return None
        if self.against.value - self.chance < 2 * self.against.error:
            return None
        return _share(self.model, self.against, self.chance)


@dataclass(frozen=True, slots=True)
class TaskReport:
    """Hold scores on tasks, and all that moves them; `str` makes a table.

    Attributes:
        names: What the table calls the model and the one that it is compared with.
        scores: Those of the tasks and groups that were asked for, and of groups inside them.
        members: Those of the single tasks inside groups.
        pinned: What moves the numbers: versions, prompts, dtype, window, seed and so on.
    """

    names: tuple[str, str]
    scores: tuple[TaskScore, ...]
    members: tuple[TaskScore, ...]
    pinned: dict[str, Any]

    @property
    def average(self) -> TaskScore | None:
        """Return the mean over tasks that one metric each was asked for of; None below two.

        Each task counts alike, as in the paper's tables. None too where there are groups, or
        perplexities, which have no place in a mean of accuracies.
        """
        if len(self.scores) < 2 or self.members or not all(s.is_share for s in self.scores):
            return None
        chances = [score.chance for score in self.scores]
        others = [score.against for score in self.scores if score.against is not None]
        known = [chance for chance in chances if chance is not None]
        return TaskScore(
            task=_AVERAGE,
            metric="",
            questions=sum(score.questions for score in self.scores),
            chance=sum(known) / len(known) if len(known) == len(chances) else None,
            model=_mean([score.model for score in self.scores]),
            against=_mean(others) if len(others) == len(self.scores) else None,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values that JSON can hold, retention included."""
        return {
            "names": list(self.names),
            "tasks": {score.task: _plain(score) for score in self._scores()},
            "members": {score.task: _plain(score) for score in self.members},
            "pinned": self.pinned,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the report that `to_dict` has written out, or that was read from JSON.

        Raises:
            KeyError: If something is missing.
        """
        scores = [_score_from(name, found) for name, found in values["tasks"].items()]
        return cls(
            names=(values["names"][0], values["names"][1]),
            scores=tuple(score for score in scores if score.task != _AVERAGE),
            members=tuple(_score_from(name, v) for name, v in values["members"].items()),
            pinned=dict(values["pinned"]),
        )

    def __str__(self) -> str:
        """Return a Markdown table, and below it what moves the numbers."""
        return f"{format_table(self.rows())}\n\n{self.settings}"

    @property
    def settings(self) -> str:
        """Return in words what moves the numbers."""
        pinned = "; ".join(f"{name} {_short(value)}" for name, value in self.pinned.items())
        return f"Accuracies in percent, ± one standard error over the questions. {pinned}."

    def rows(self) -> list[list[str]]:
        """Return the table."""
        compared = any(score.against is not None for score in self.scores)
        header = ["task", "metric", "questions", "chance"]
        header += [*reversed(self.names), "kept", "kept above chance"] if compared else ["score"]
        rows = [header]
        for score in self._scores():
            unit = 100 if score.is_share else 1
            row = [score.task, score.metric, f"{score.questions:,}", _percent(score.chance)]
            if compared:
                row += [_cell(score.against, unit), _cell(score.model, unit)]
                row += [_percent(score.retention), _percent(score.retention_above_chance)]
            else:
                row += [_cell(score.model, unit)]
            rows.append(row)
        return rows

    def _scores(self) -> list[TaskScore]:
        average = self.average
        return [*self.scores, *([] if average is None else [average])]


def _score_from(task: str, values: Mapping[str, Any]) -> TaskScore:
    model, against = values["model"], values["against"]
    return TaskScore(
        task=task,
        **{name: values[name] for name in ("metric", "questions", "chance")},
        model=Score(**model),
        against=None if against is None else Score(**against),
    )


def _plain(score: TaskScore) -> dict[str, Any]:
    found = asdict(score)
    del found["task"]
    return found | {
        "retention": score.retention,
        "retention_above_chance": score.retention_above_chance,
    }


def _share(score: Score, other: Score | None, floor: float) -> float | None:
    if other is None or other.value <= floor:
        return None
    return (score.value - floor) / (other.value - floor)


def _mean(scores: Sequence[Score]) -> Score:
    """Return the mean of scores on different questions, with its standard error."""
    errors = [score.error for score in scores if score.error is not None]
    error = math.hypot(*errors) / len(scores) if len(errors) == len(scores) else None
    return Score(sum(score.value for score in scores) / len(scores), error)


def _short(value: Any) -> Any:
    """Return the one value that all tasks share, if they do."""
    shared = list(dict.fromkeys(value.values())) if isinstance(value, dict) else [value]
    return shared[0] if len(shared) == 1 else value


def _cell(score: Score | None, unit: int) -> str:
    if score is None:
        return ""
    told = f"{unit * score.value:.2f}"
    return told if score.error is None else f"{told} ± {unit * score.error:.2f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"
