"""Find tasks by name, and load them with their questions: from the hub, or from local files."""

import difflib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from yopo.errors import InvalidArgumentError, missing_extra

PRESETS = {
    "paper": ("piqa", "winogrande", "hellaswag", "arc_easy", "arc_challenge"),
    "mmlu": ("mmlu",),
}
"""The tasks of arXiv 2501.15296 under the names of lm-eval."""

_DEFINITIONS = Path(__file__).parent / "local"


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


def find_tasks(
    tasks: str | Sequence[str], data_dir: str | Path | None
) -> tuple[tuple[str, ...], Any]:
    """Return the names of tasks and groups, presets and tags spelt out, and what loads them.

    Raises:
        InvalidArgumentError: If one is unknown, or there is no folder `data_dir`.
        YopoError: If lm-eval is not installed.
    """
    if data_dir is not None and not Path(data_dir).is_dir():
        raise InvalidArgumentError(f"`data_dir={str(data_dir)!r}` is no folder.")
    try:
        manager = _manager(None if data_dir is None else str(data_dir))
    except ImportError as error:
        raise missing_extra("tasks need lm-eval", "eval") from error
    known, found = manager.all_tasks, []
    given = [tasks] if isinstance(tasks, str) else tasks
    for name in (name for each in given for name in PRESETS.get(each, (each,))):
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 3) or known[:5]
            where = "in lm-eval" if data_dir is None else "among those for local files"
            raise InvalidArgumentError(
                f"there is no task {name!r} {where}; there are {', '.join(near)}, and others. "
                f"Presets are {', '.join(PRESETS)}."
            )
        found += sorted(manager.task_index[name].tags) if name in manager.all_tags else [name]
    if not found:
        raise InvalidArgumentError("`tasks` names none.")
    return tuple(dict.fromkeys(found)), manager


def load_tasks(
    tasks: str | Sequence[str], data_dir: str | Path | None, *, few_shot: int | None, seed: int
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return tasks and groups as lm-eval holds them, and the names of those to tell the score of.

    A group of which lm-eval computes no score stands for its tasks.

    Raises:
        InvalidArgumentError: As `find_tasks`, if a local file is missing or damaged, or if it has
            no examples for `few_shot`.
        YopoError: As `find_tasks`.
        OSError: If a data set cannot be downloaded.
    """
    names, manager = find_tasks(tasks, data_dir)
    try:
        loaded = manager.load(list(names))
    except ConnectionError as error:
        raise OSError(
            f"the questions cannot be downloaded: {error}. On a machine without a network, pass "
            "`data_dir`, a folder that holds them."
        ) from error
    for name, task in loaded["tasks"].items():
        if few_shot and data_dir is not None and len(task.dataset) == 1:
            raise InvalidArgumentError(
                f"`few_shot` must be 0 for {name!r}: its file holds the questions alone, and no "
                f"solved examples. Got {few_shot}."
            )
        if few_shot is not None or task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=few_shot or 0)
        task.set_fewshot_seed(seed=seed)
    groups = loaded["groups"]
    told = [
        task
        for name in names
        for task in (
            [task.task_name for task in groups[name].get_all_tasks()]
            if name in groups and not groups[name].has_aggregation
            else [name]
        )
    ]
    return loaded, tuple(dict.fromkeys(told))
