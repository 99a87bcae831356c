"""How large a model is, what a plan would leave of it, and the tables that show it.

Shapes: F rows of an FFN, K kept rows.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from torch import Tensor, nn

from yopo.adapters import Ffn

_LINES = 100
"""So many FFNs are listed one by one, more are summed up."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Count a model, tied weights once.

    Attributes:
        parameters: Numbers in all weights.
        bytes: Memory of all weights.
        ffn_rows: Rows of all FFNs.
        ffn_parameters: Numbers that belong to rows of FFNs.
    """

    parameters: int
    bytes: int
    ffn_rows: int
    ffn_parameters: int


def sizes_of(
    model: nn.Module, ffns: Sequence[Ffn], widths: Mapping[str, int] | None = None
) -> Sizes:
    """Count `model` as it is, or as it would be if its FFNs had other widths, given by name."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    rows = ffn_parameters = 0
    for ffn in ffns:
        kept = ffn.rows if widths is None else widths[ffn.name]
        rows += kept
        ffn_parameters += kept * ffn.parameters_per_row
        parameters -= (ffn.rows - kept) * ffn.parameters_per_row
        size -= (ffn.rows - kept) * ffn.bytes_per_row
    return Sizes(parameters, size, rows, ffn_parameters)


def describe_ffns(ffns: Sequence[Ffn]) -> str:
    """Return a table of the FFNs of a model, one line for each kind."""
    kinds: dict[tuple[int, int, int, str], list[str]] = defaultdict(list)
    for ffn in ffns:
        field = "fixed by the architecture" if ffn.width is None else str(ffn.width)
        columns = ffn.expand_weights()[0].shape[1]
        kinds[ffn.rows, columns, len(ffn.expand), field].append(ffn.name)
    lines = [["FFNs", "first", "rows", "width in", "matrices", "config field"]]
    for (rows, columns, expand, field), names in kinds.items():
        matrices = "gated" if expand == 2 else "plain"
        lines.append([f"{len(names)}", names[0], f"{rows}", f"{columns}", matrices, field])
    return format_table(lines)


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Return `rows`, the first of which is the header, as a Markdown table in even columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def size_rows(before: Sizes, after: Sizes) -> list[list[str]]:
    """Return a table of what a model had, has, and has lost."""
    lines = [
        ("FFN rows", before.ffn_rows, after.ffn_rows),
        ("parameters of FFN rows", before.ffn_parameters, after.ffn_parameters),
        ("all parameters", before.parameters, after.parameters),
        ("bytes of all parameters", before.bytes, after.bytes),
    ]
    return [["", "before", "after", "removed"]] + [
        [label, f"{old:,}", f"{new:,}", f"{1 - new / old:.2%}" if old else ""]
        for label, old, new in lines
    ]


def width_rows(rows: Mapping[str, int], widths: Mapping[str, int]) -> list[list[str]]:
    """Return a table of the rows of FFNs before and after, a line for each pair of widths.

    Where there would be more than a hundred lines, one tells the range.
    """
    groups: dict[tuple[int, int], list[str]] = defaultdict(list)
    for name, width in widths.items():
        groups[rows[name], width].append(name)
    table = [["FFNs", "", "rows before", "rows after", "removed"]]
    if len(groups) > _LINES:
        old, new = (
            [f"{min(found):,} to {max(found):,}"] for found in (rows.values(), widths.values())
        )
        removed = [1 - width / rows[name] for name, width in widths.items()]
        span = f"{min(removed):.2%} to {max(removed):.2%}"
        return [*table, [f"{len(widths):,}", span_of(list(widths)), *old, *new, span]]
    for (before, after), names in groups.items():
        removed_share = f"{1 - after / before:.2%}"
        table.append(
            [f"{len(names):,}", span_of(names), f"{before:,}", f"{after:,}", removed_share]
        )
    return table


def span_of(names: Sequence[str]) -> str:
    """Return the first and the last of some names."""
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"


def ks_rows(ks: Mapping[str, float]) -> list[list[str]]:
    """Return a table of the distances of FFNs: their range, and up to a hundred one by one."""
    least, most = min(ks, key=lambda name: ks[name]), max(ks, key=lambda name: ks[name])
    table = [["", "FFN", "KS distance"]]
    if len(ks) > 1:
        table += [
            ["least", least, f"{ks[least]:.4f}"],
            ["mean", "", f"{fmean(ks.values()):.4f}"],
            ["most", most, f"{ks[most]:.4f}"],
        ]
    if len(ks) <= _LINES:
        table += [[str(n), name, f"{value:.4f}"] for n, (name, value) in enumerate(ks.items())]
    return table


def kept_by_score(kept_K: Tensor, scores_F: Tensor) -> tuple[float, ...]:
    """Return which share is kept of each tenth of the rows of an FFN, lowest scores first.

    A row on the border of two tenths counts in both, as much as it lies in each.

    Args:
        kept_K: The kept rows.
        scores_F: A score for each row; among equal ones, the earlier row counts as the lower.
    """
    rows = len(scores_F)
    is_kept_F = np.zeros(rows)
    is_kept_F[kept_K.cpu().numpy()] = 1.0
    order_F = scores_F.cpu().argsort(stable=True).numpy()
    kept_so_far = np.concatenate([[0.0], is_kept_F[order_F].cumsum()])
    ends = np.interp(np.linspace(0, rows, 11), np.arange(rows + 1), kept_so_far)
    return tuple(float(share) for share in np.diff(ends) / (rows / 10))


def kept_rows(kept: Mapping[str, Sequence[float]]) -> list[list[str]]:
    """Return a table of the shares kept of tenths of the rows, lowest scores first, over FFNs."""
    table = [["rows by score", "kept", "least", "most"]]
    for number, shares in enumerate(zip(*kept.values(), strict=True)):
        span = f"{10 * number} to {10 * (number + 1)} %"
        values = (fmean(shares), min(shares), max(shares))
        table.append([span, *(f"{share:.1%}" for share in values)])
    return table


def perplexity_rows(perplexities: Mapping[str, tuple[float, float]]) -> list[list[str]]:
    """Return a table of perplexities on texts, dense and pruned."""
    return [["text", "dense", "pruned", "times"]] + [
        [text, f"{dense:,.3f}", f"{pruned:,.3f}", f"{pruned / dense:.3f}"]
        for text, (dense, pruned) in perplexities.items()
    ]
