"""`PruningReport`: what a cut did to a model, and what was measured of it."""

import io
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from torch import nn

from yopo.card import MARK, set_aside
from yopo.errors import InvalidArgumentError, PolicyFileError, YopoError
from yopo.evaluation import TaskReport
from yopo.pages import to_html, to_markdown
from yopo.plan import PruningPlan
from yopo.pruning_report.plain import fields_of, values_of
from yopo.pruning_report.shown import card_of, plots_of, sections_of, title_of
from yopo.pruning_report.spectra import Pair, compare
from yopo.reinforce import Episode
from yopo.report import Sizes
from yopo.speed.result import SpeedReport

logger = logging.getLogger(__name__)

REPORT_FILE = "pruning_report.json"
"""The report in the folder of a pruned checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PruningReport:
    """Hold what was removed of a model, how, and what was measured of it; `str` makes a page.

    Attributes:
        base: What the model that was cut is called: its name on the hub, or its folder's; empty
            where it has none.
        model_class: Its class.
        plan: Which rows were kept, and the ratio that was asked for.
        before: How large it was.
        after: How large it is.
        needs_yopo: Whether its config cannot express its widths, so that it loads with `yopo.load`.
        call: The call, or the command, that made it.
        recipe: The settings of the pruner, seed included; empty where a plan was given.
        versions: Those of yopo, torch and transformers.
        metadata: What the card of the base says of licence, languages and task.
        history: The episodes of the policy, as `PolicyPruner.history`.
        seconds: How long it took to fit, decide and cut. Files beside a checkpoint leave it out,
            so that the same cut writes the same files.
        ks: Kolmogorov-Smirnov distance, in [0, 1], between the singular values of each FFN's gate
            matrix (or fc1) and those of its kept rows.
        spectra: Those singular values before and after, descending: all of them, or 200 at even
            steps, fewer where there are more than 200 FFNs.
        kept_by_norm: The share kept of each tenth of an FFN's rows, by the norm of the gate row,
            lowest first.
        perplexities: For each text the perplexity of the dense and of the pruned model.
        measured: For each text how its perplexity was measured, such as the window.
        recovery: How it was recovered afterwards, call and settings; empty if it was not.
        tasks: What `evaluate` has found.
        speed: What `benchmark` has measured.

    Example:
        >>> smaller = pruner.prune(model, ratio=0.3)
        >>> print(pruner.report)
    """

    base: str
    model_class: str
    plan: PruningPlan
    before: Sizes
    after: Sizes
    needs_yopo: bool = False
    call: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    history: tuple[Episode, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    ks: Mapping[str, float] = field(default_factory=dict)
    spectra: Mapping[str, Pair] = field(default_factory=dict)
    kept_by_norm: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    perplexities: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    measured: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    recovery: Mapping[str, Any] = field(default_factory=dict)
    tasks: TaskReport | None = None
    speed: SpeedReport | None = None

    def with_spectra(self, dense: nn.Module | str | Path) -> Self:
        """Return this report with KS distances, spectra, and which rows were kept by their norm.

        Args:
            dense: The model before the cut, or the folder or the name on the hub of its
                checkpoint, of which one FFN at a time is read.

        Raises:
            InvalidArgumentError: If it is another model, or has been cut.
            UnsupportedModelError: If its checkpoint cannot be read a piece at a time.
            OSError: If there is no such folder and no such model on the hub.
        """
        found = compare(self.plan, dense)
        return replace(self, ks=found.ks, spectra=found.spectra, kept_by_norm=found.kept_by_norm)

    def with_perplexity(
        self, text: str, *, dense: float, pruned: float, how: Mapping[str, Any] | None = None
    ) -> Self:
        """Return this report with the perplexities of both models on a text.

        Args:
            text: What the text is called.
            dense: The perplexity of the dense model.
            pruned: That of the pruned one.
            how: How they were measured, such as `{"window": 2048, "dtype": "bfloat16"}`.

        Raises:
            InvalidArgumentError: If one is no positive finite number.
        """
        for name, value in (("dense", dense), ("pruned", pruned)):
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise InvalidArgumentError(
                    f"`{name}` must be a positive finite number, got {value!r}."
                )
        found = dict(self.perplexities) | {text: (float(dense), float(pruned))}
        measured = {name: told for name, told in self.measured.items() if name != text}
        measured |= {} if how is None else {text: dict(how)}
        return replace(self, perplexities=found, measured=measured)

    def with_tasks(self, tasks: TaskReport) -> Self:
        """Return this report with what `evaluate` has measured of the pruned model.

        Raises:
            InvalidArgumentError: If it is no `TaskReport`.
        """
        if not isinstance(tasks, TaskReport):
            raise InvalidArgumentError(
                f"`tasks` must be a TaskReport, as `yopo.evaluate` returns it, got {tasks!r}."
            )
        return replace(self, tasks=tasks)

    def with_speed(self, speed: SpeedReport) -> Self:
        """Return this report with what `benchmark` has measured of the pruned model.

        Raises:
            InvalidArgumentError: If it is no `SpeedReport`.
        """
        if not isinstance(speed, SpeedReport):
            raise InvalidArgumentError(
                f"`speed` must be a SpeedReport, as `yopo.benchmark` returns it, got {speed!r}."
            )
        return replace(self, speed=speed)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values that JSON can hold.

        Kept rows are base64 of one bit a row, the first row in the highest bit:
        `np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8)).nonzero()[0]`.
        """
        return values_of(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the report that `to_dict` has written out, or that was read from JSON.

        Raises:
            PolicyFileError: If it is damaged, foreign, or of a newer format.
        """
        return cls(**fields_of(values))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read the report of a pruned checkpoint, or one that `save` wrote.

        Args:
            path: The folder of the checkpoint, the folder that `save` wrote, or a file of JSON.

        Raises:
            PolicyFileError: If there is none, or it is damaged, foreign, or of a newer format.
        """
        names = [Path(path), Path(path) / REPORT_FILE, Path(path) / "report.json"]
        file = next((name for name in names if name.is_file()), None)
        if file is None:
            raise PolicyFileError(
                f"`{path}` holds no report: `{REPORT_FILE}` is missing. `yopo.prune_checkpoint`, "
                "`yopo prune` and `pruner.report.write_card(folder)` write it."
            )
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PolicyFileError(f"`{file}` is damaged: {error}.") from error
        try:
            return cls.from_dict(values)
        except PolicyFileError as error:
            raise PolicyFileError(f"`{file}` cannot be read: {error}") from error

    def __str__(self) -> str:
        """Return the report in Markdown, without plots."""
        return to_markdown(title_of(self), sections_of(self))

    def to_html(self) -> str:
        """Return the report as one page of HTML, with plots where matplotlib is installed."""
        pictures: dict[str, bytes] = {}
        for name, draw in plots_of(self).items():
            stream = io.BytesIO()
            try:
                draw(stream)
            except YopoError as error:
                logger.warning(f"The page has no plots: {error}")
                break
            pictures[name] = stream.getvalue()
        return to_html(title_of(self), sections_of(self, pictures))

    def save(self, folder: str | Path) -> None:
        """Write `report.json`, `report.md`, `report.html` and each plot as PNG into a folder.

        Where matplotlib is not installed there are no plots, and a warning says so.

        Raises:
            OSError: If the folder cannot be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "report.json", self._json())
        _write(folder / "report.md", str(self))
        _write(folder / "report.html", self.to_html())
        for name, draw in plots_of(self).items():
            try:
                draw(folder / f"{name}.png")
            except YopoError:  # of which the page has warned
                return

    def card(self) -> str:
        """Return the model card of the pruned checkpoint: the text of its `README.md`."""
        return card_of(self)

    def write_card(self, folder: str | Path) -> None:
        """Write the card and the report, without timings, into the folder of the pruned checkpoint.

        Another `README.md` that is there already becomes `README.dense.md`.

        Raises:
            InvalidArgumentError: If there is no such folder.
            OSError: If it cannot be written.

        Example:
            >>> pruner.prune(model, ratio=0.3).save_pretrained("pruned")
            >>> pruner.report.write_card("pruned")
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise InvalidArgumentError(
                f"`{folder}` is no folder. Save the model there first: "
                f"`model.save_pretrained({str(folder)!r})`."
            )
        card, dense = folder / "README.md", folder / "README.dense.md"
        if card.is_file() and MARK not in card.read_text(encoding="utf-8", errors="replace"):
            set_aside(card)
        more = f"`{REPORT_FILE}` beside this file says more: `yopo report path/to/this/folder`.\n\n"
        if dense.is_file():
            more += f"[{dense.name}]({dense.name}) is the card of the model that was cut."
        _write(folder / REPORT_FILE, replace(self, seconds={})._json())
        _write(card, card_of(self, more=more))

    def _json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n"


def _write(file: Path, text: str) -> None:
    """Write a file so that no reader sees half of it."""
    part = file.with_name(f".{file.name}.partial")
    part.write_text(text, encoding="utf-8")
    part.replace(file)
