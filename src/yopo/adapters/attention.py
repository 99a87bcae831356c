"""Attention heads, shown as if they were FFNs, for PruneNet's variant that cuts them too.

A row of a unit is one dimension of a head. Queries and keys meet in a dot product, so they lose
the same dimensions; values and the output matrix likewise. Every query head that shares a
key-value head follows it. Rotary embeddings turn dimensions in pairs, which stay or go together.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from yopo.adapters.ffn import Ffn, Slot, WidthField
from yopo.adapters.skeleton import build_skeleton, shapes_of
from yopo.errors import UnsupportedModelError

_OUTPUTS = ("o_proj", "out_proj", "dense")
HEAD_FIELD = "head_dim"
"""Config field that sets the size of a head, where an architecture has one."""


def find_attention_units(model: nn.Module) -> list[Ffn]:
    """Return the prunable parts of every attention head of `model`.

    Raises:
        UnsupportedModelError: If the model keeps its attention in a way that yopo does not know:
            fused projections, norms inside the heads, or rotary embeddings of another kind than
            the two halves of LLaMA.
    """
    config: Any = model.config
    text = config.get_text_config()
    if not hasattr(text, "num_attention_heads"):
        raise UnsupportedModelError("the model's config names no `num_attention_heads`.")
    rotary = any(hasattr(module, "inv_freq") for module in model.modules())
    share = Fraction(str(_rotary_share(text))).limit_denominator(1000) if rotary else Fraction(0)
    units: list[Ffn] = []
    for path, module in model.named_modules():
        children = dict(module.named_children())
        if not {"q_proj", "k_proj", "v_proj"} <= children.keys():
            continue
        if any("norm" in name for name in children):
            raise UnsupportedModelError(
                f"`{path}` normalises its heads, whose dimensions then share one gain. Use "
                "`attention=False`."
            )
        if rotary and not _rotates_halves(module):
            raise UnsupportedModelError(
                f"`{path}` uses rotary embeddings of a kind that yopo does not know. Use "
                "`attention=False`."
            )
        units += _units(path, module, int(text.num_attention_heads), share)
    if not units:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no attention with `q_proj`, `k_proj` and `v_proj`. Use "
            "`attention=False`."
        )
    return _with_field(model, units)


def _units(path: str, module: nn.Module, heads: int, share: Fraction) -> Iterator[Ffn]:
    projections = {name: module.get_submodule(name) for name in ("q_proj", "k_proj", "v_proj")}
    output = next(child for name, child in module.named_children() if name in _OUTPUTS)
    lengths = {name: _weight(child).shape[0] for name, child in projections.items()}
    size = lengths["q_proj"] // heads
    groups = lengths["k_proj"] // size
    rotary = int(size * share)
    for group in range(groups):
        queries = range(group * heads // groups, (group + 1) * heads // groups)

        def slots(
            key: str, offset: int, group: int = group, queries: range = queries
        ) -> list[Slot]:
            numbers = queries if key == "q_proj" else [group]
            return [Slot(projections[key], "weight", 0, n * size + offset) for n in numbers]

        value = slots("v_proj", 0)
        columns = [Slot(output, "weight", 1, number * size) for number in queries]
        yield _unit(f"{path}.value.{group}", path, size, value, columns)
        if rotary:
            halves = [0, rotary // 2]
            query = [slot for offset in halves for slot in slots("q_proj", offset)]
            key = [slot for offset in halves for slot in slots("k_proj", offset)]
            yield _unit(f"{path}.rotary.{group}", path, rotary // 2, query, key)
        if size > rotary:
            query, key = slots("q_proj", rotary), slots("k_proj", rotary)
            yield _unit(f"{path}.query_key.{group}", path, size - rotary, query, key)


def _unit(name: str, path: str, rows: int, expand: list[Slot], contract: list[Slot]) -> Ffn:
    """Return a unit whose first matrices are scored, and whose other slots follow."""
    weights = [*expand, *contract]
    biases = [
        Slot(slot.module, "bias", 0, slot.start)
        for slot in weights
        if slot.axis == 0 and getattr(slot.module, "bias", None) is not None
    ]
    return Ffn(
        name=name,
        path=path,
        rows=rows,
        expand=tuple(expand),
        scored=len(expand),
        contract=contract[0],
        vectors=(*contract[1:], *biases),
    )


def _with_field(model: nn.Module, units: list[Ffn]) -> list[Ffn]:
    """Return `units` with the field that sets the head size, if the architecture has one."""
    size = max(unit.rows for unit in units)
    config: Any = model.config
    path = () if config.get_text_config() is config else ("text_config",)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    try:
        grown = shapes_of(build_skeleton(model, {(path, HEAD_FIELD): 2 * size}))
    except Exception:  # the architecture derives its head size
        return units
    for unit in units:
        for slot in (*unit.expand, unit.contract):
            if grown[names[id(slot.parameter)]][slot.axis] != 2 * slot.parameter.shape[slot.axis]:
                return units
    return [
        replace(unit, width=WidthField(path, HEAD_FIELD, Fraction(size, unit.rows)))
        for unit in units
    ]


def _rotary_share(config: Any) -> float:
    """Return the share of a head's dimensions that rotary embeddings turn."""
    parameters = getattr(config, "rope_parameters", None) or {}
    share = parameters.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
    return 1.0 if share is None else float(share)


def _rotates_halves(module: nn.Module) -> bool:
    """Tell whether the code of `module` turns dimension i with dimension i + half."""
    rotate = getattr(sys.modules[type(module).__module__], "rotate_half", None)
    if rotate is None:
        return False
    return bool(rotate(torch.arange(4.0, device="cpu")).tolist() == [-2.0, -3.0, 0.0, 1.0])


def _weight(module: nn.Module) -> torch.Tensor:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight
