"""What a report shows: its sections, its plots, and the model card."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING

from yopo.card import MARK, front_matter, loading_code
from yopo.pages import Section, to_markdown
from yopo.plots import Target, plot_kept_rows, plot_rewards, plot_spectra, plot_speed
from yopo.report import kept_rows, ks_rows, perplexity_rows, size_rows, width_rows

if TYPE_CHECKING:  # the report itself calls these functions
    from yopo.pruning_report.result import PruningReport

_KS = (
    "The Kolmogorov-Smirnov distance between the singular values of an FFN's gate matrix (or fc1) "
    "and those of its kept rows: 0 for equal distributions, 1 for such that do not overlap. "
    "Singular values shrink where rows go, so an FFN that was cut hardly ever has 0."
)
_KEPT = (
    "Which share of the rows was kept, by the norm of the gate row (or of fc1), lowest first; the "
    "mean over FFNs, and the FFNs with the least and the most. Whoever goes by that norm alone "
    "keeps the highest and nothing else."
)

_LABELS = {"ratio": "ratio of the policy", "evidence_used": "evidence used"}

_ON_CARD = {
    "What was removed",
    "Widths",
    "How it was made",
    "Recovery",
    "Perplexity",
    "Tasks",
    "Speed",
}
"""Sections that a model card has too."""


def title_of(report: "PruningReport") -> str:
    """Return what stands above the report."""
    recovered = " and recovered" if report.recovery else ""
    return f"{name_of(report)}, pruned at a ratio of {report.plan.ratio:g}{recovered}"


def name_of(report: "PruningReport") -> str:
    """Return what the base is called, its class where it has no name."""
    return report.base or report.model_class


def sections_of(
    report: "PruningReport", pictures: Mapping[str, bytes] | None = None
) -> Iterator[Section]:
    """Yield what is known, section by section.

    Args:
        report: The report.
        pictures: Plots by name.
    """
    drawn = pictures or {}
    yield from _sections_of_the_cut(report)
    if report.ks:
        yield Section("Spectra", _KS, rows=ks_rows(report.ks), picture=drawn.get("spectra", b""))
    if report.kept_by_norm:
        rows, picture = kept_rows(report.kept_by_norm), drawn.get("kept_rows", b"")
        yield Section("Kept rows", _KEPT, rows=rows, picture=picture)
    if report.history:
        first, last = (fmean(report.history[n].reward) for n in (0, -1))
        text = f"{len(report.history)} episodes. The reward, as the mean over FFNs, was "
        text += f"{first:.4g} in the first and {last:.4g} in the last."
        yield Section("Learning", text, picture=drawn.get("rewards", b""))
    if report.perplexities:
        told = [f"{text}: {_in_short(how)}." for text, how in report.measured.items()]
        yield Section("Perplexity", " ".join(told), rows=perplexity_rows(report.perplexities))
    if report.tasks is not None:
        yield Section("Tasks", report.tasks.settings, rows=report.tasks.rows())
    if report.speed is not None:
        rows, picture = report.speed.rows(), drawn.get("speed", b"")
        yield Section("Speed", report.speed.settings, rows=rows, picture=picture)


def _sections_of_the_cut(report: "PruningReport") -> Iterator[Section]:
    plan = report.plan
    yield Section(
        "What was removed", _in_words(report), rows=size_rows(report.before, report.after)
    )
    yield Section("Widths", rows=width_rows(plan.rows, plan.widths))
    idle = set() if report.recipe.get("episodes") else {"learning_rate", "discount", "samples"}
    settings = {
        **{_LABELS.get(key, key): v for key, v in report.recipe.items() if key not in idle},
        **{f"version of {name}": found for name, found in report.versions.items()},
        **{f"seconds to {step}": f"{spent:.2f}" for step, spent in report.seconds.items()},
    }
    yield Section("How it was made", code=report.call, rows=_table(settings))
    if report.recovery:
        call = {"call": "", **report.recovery}
        text = "After the cut low-rank adapters were trained and merged into the weights."
        yield Section("Recovery", text, code=call.pop("call"), rows=_table(call))


def _table(settings: Mapping[str, object]) -> list[list[str]]:
    return [["setting", "value"], *([name, str(value)] for name, value in settings.items())]


def _in_short(settings: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _in_words(report: "PruningReport") -> str:
    """Return what was asked for and what has become of it."""
    plan = report.plan
    cut = [name for name, width in plan.widths.items() if width < plan.rows[name]]
    told = ""
    if cut and len(cut) < len(plan.rows):
        kept, rows = sum(plan.widths[name] for name in cut), sum(plan.rows[name] for name in cut)
        told = f", {1 - kept / rows:.4f} of the rows of the {len(cut)} FFNs that were cut"
    share = 1 - report.after.parameters / report.before.parameters
    return (
        f"Of {name_of(report)} ({report.model_class}), a share of {plan.ratio_reached:.4f} of the "
        f"FFN rows was removed{told}; {plan.ratio:.4g} was asked for. That is {share:.1%} of all "
        "parameters."
    )


def plots_of(report: "PruningReport") -> dict[str, Callable[[Target], None]]:
    """Return, by name, what draws each plot that there is something for."""
    plots: dict[str, Callable[[Target], None]] = {}
    name, speed = name_of(report), report.speed

    def add(plot: str, title: str, draw: Callable[..., None], *given: object) -> None:
        plots[plot] = lambda path: draw(path, *given, title=f"{name}: {title}")

    if report.spectra:
        title = "singular values of the gates"
        add("spectra", title, plot_spectra, report.spectra, report.ks)
    if report.kept_by_norm:
        add("kept_rows", "which rows were kept", _plot_by_norm, report.kept_by_norm)
    if report.history:
        add("rewards", "what the episodes earned", plot_rewards, report.history)
    if speed is not None:
        add("speed", "speed", plot_speed, speed)
    return plots


def _plot_by_norm(path: Target, kept: Mapping[str, tuple[float, ...]], *, title: str) -> None:
    plot_kept_rows(path, kept, score="gate norm", title=title)


def card_of(report: "PruningReport", *, more: str = "") -> str:
    """Return the model card of the pruned checkpoint.

    Args:
        report: The report.
        more: A last paragraph.
    """
    fields = {
        "base_model": report.base,
        "library_name": "transformers",
        **report.metadata,
        "tags": ["yopo", "pruned"],
    }
    told = (
        "FFNs differ in width, which the config cannot say, so it loads with yopo "
        "(pip install yopo-prune)."
    )
    load = Section(
        "How to load it",
        text=told if report.needs_yopo else "",
        code=loading_code(report.model_class, needs_yopo=report.needs_yopo),
    )
    shown = [s for s in sections_of(replace(report, seconds={})) if s.title in _ON_CARD]
    page = to_markdown(title_of(report), [shown[0], load, *shown[1:]])
    parts = [f"{front_matter(fields)}\n{MARK}", page.strip(), more.strip()]
    return "\n\n".join(part for part in parts if part) + "\n"
