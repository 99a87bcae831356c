"""What was measured of a model, alone or beside another, and a table of it."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self

from yopo.report import format_table

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")

_FIGURES = (
    ("10⁶ parameters", "parameters", 1e6),
    ("weights, MB", "bytes", 1e6),
    ("loading, s", "load_seconds", 1.0),
    ("peak of loading, MB", "load_peak", 1e6),
    ("peak of a run, MB more", "run_peak", 1e6),
    ("10⁹ operations/s", "operations_per_second", 1e9),
    ("GB read/s", "bytes_per_second", 1e9),
)
"""What a table shows of a model before its speed: label, attribute of `Speed`, unit."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Hold what was measured of one model.

    Attributes:
        name: The path or hub name that it was loaded from, else the name of its class.
        device: Where its weights are.
        dtype: Their dtype.
        parameters: How many numbers they hold, tied ones once.
        bytes: What they take.
        prefill: Tokens a second of one pass over all prompts, in each repeat.
        decode: Tokens a second of writing on, in each repeat; None if the model does not write.
        prefill_bound: Tokens a second that operations and bandwidth allow.
        decode_bound: The same of decode.
        run_peak: Bytes that a run takes at most beyond what was held before it, such as the
            weights: memory of the accelerator, or on a CPU resident memory of the process. None
            where the system does not tell.
        operations_per_second: What the device reaches in a product of matrices of this dtype.
        bytes_per_second: What it reaches in reading memory.
        load_seconds: Seconds until every weight has arrived; None if the model was in memory.
        load_peak: As `run_peak`, of loading.
    """

    name: str
    device: str
    dtype: str
    parameters: int
    bytes: int
    prefill: tuple[float, ...]
    decode: tuple[float, ...] | None
    prefill_bound: float
    decode_bound: float | None
    run_peak: int | None
    operations_per_second: float
    bytes_per_second: float
    load_seconds: float | None = None
    load_peak: int | None = None


@dataclass(frozen=True, slots=True)
class SpeedReport:
    """Hold the speed of a model and of the one it was timed against; `str` makes a table of them.

    Attributes:
        model: What was measured of the model.
        against: What was measured of the other, None if there was none.
        batch: Sequences a pass.
        prompt: Tokens of each prompt.
        new_tokens: Tokens written after each.
    """

    model: Speed
    against: Speed | None
    batch: int
    prompt: int
    new_tokens: int

    def speed_up(self, phase: Phase) -> float | None:
        """Return how many times as fast as the other the model is, the median of all turns.

        None without another, or if one of the two does not decode.
        """
        ours, theirs = self._both(phase)
        return paired_ratio(ours, theirs) if ours and theirs else None

    def speed_up_bound(self, phase: Phase) -> float | None:
        """Return how many times as fast it could be, were both at their bounds."""
        ours, theirs = self._both(f"{phase}_bound")
        return ours / theirs if ours and theirs else None

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values that JSON can hold, speed-ups included."""
        return asdict(self) | {
            "speed_up": {phase: self.speed_up(phase) for phase in PHASES},
            "speed_up_bound": {phase: self.speed_up_bound(phase) for phase in PHASES},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the report that `to_dict` has written out, or that was read from JSON.

        Raises:
            KeyError: If something is missing.
        """
        against = values["against"]
        return cls(
            model=_speed_from(values["model"]),
            against=None if against is None else _speed_from(against),
            **{name: values[name] for name in ("batch", "prompt", "new_tokens")},
        )

    def __str__(self) -> str:
        """Return a Markdown table: medians, and in brackets the least and the most."""
        return f"{self.settings}\n\n{format_table(self.rows())}"

    @property
    def settings(self) -> str:
        """Return in words what was run how often."""
        return (
            f"Batch {self.batch}, prompt {self.prompt}, {self.new_tokens} new tokens, "
            f"{len(self.model.prefill)} repeats."
        )

    def rows(self) -> list[list[str]]:
        """Return the table: medians, and in brackets the least and the most."""
        speeds = [self.model] if self.against is None else [self.model, self.against]
        lines: list[tuple[str, list[str], float | None]] = [
            ("on", [f"{speed.device}, {speed.dtype}" for speed in speeds], None)
        ]
        for label, name, unit in _FIGURES:
            values = [getattr(speed, name) for speed in speeds]
            ratio = values[0] / values[-1] if name in ("parameters", "bytes") else None
            lines.append((label, [_scaled(value, unit) for value in values], ratio))
        for phase in PHASES:
            reached, bound, share = zip(*(speed_cells(s, phase) for s in speeds), strict=True)
            lines += [
                (f"{phase}, tokens/s", list(reached), self.speed_up(phase)),
                ("bound of it", list(bound), self.speed_up_bound(phase)),
                ("share reached", list(share), None),
            ]
        rows = [["", *(speed.name for speed in speeds), "times"]]
        rows += [[label, *cells, _scaled(ratio)] for label, cells, ratio in lines]
        return [row[:-1] for row in rows] if self.against is None else rows

    def _both(self, name: str) -> tuple[Any, Any]:
        return getattr(self.model, name), getattr(self.against, name, None)


def _speed_from(values: Mapping[str, Any]) -> Speed:
    found: dict[str, Any] = {field.name: values[field.name] for field in fields(Speed)}
    for phase in PHASES:
        found[phase] = None if found[phase] is None else tuple(found[phase])
    return Speed(**found)


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the median of the ratios of what was measured in the same turn."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def speed_cells(speed: Speed, phase: Phase) -> tuple[str, str, str]:
    """Return the median with the least and the most, the bound, and the share of it reached."""
    reached: tuple[float, ...] | None = getattr(speed, phase)
    bound: float | None = getattr(speed, f"{phase}_bound")
    if reached is None or bound is None:
        return "", "", ""
    median = statistics.median(reached)
    spread = f"{median:,.1f} ({min(reached):,.1f} to {max(reached):,.1f})"
    return spread, f"{bound:,.1f}", f"{median / bound:.0%}"


def _scaled(value: float | None, unit: float = 1.0) -> str:
    return "" if value is None else f"{value / unit:,.2f}"
