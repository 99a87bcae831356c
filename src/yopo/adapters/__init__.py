"""Where each architecture keeps its FFNs."""

import logging
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Literal
from weakref import WeakKeyDictionary

from torch import nn

from yopo.adapters.checks import (
    check_model,
    check_parameters,
    check_stored,
    check_weights,
    share_of_zeros,
)
from yopo.adapters.ffn import Ffn, Slot, WidthField, norm_gain_and_bias
from yopo.adapters.fields import with_fields
from yopo.adapters.layouts import LAYOUTS, Layout, ffns_of_module, norm_before
from yopo.adapters.proof import prove
from yopo.errors import InvalidArgumentError, UnsupportedModelError

__all__ = [
    "Ffn",
    "Slot",
    "WidthField",
    "check_stored",
    "check_weights",
    "find_ffns",
    "norm_gain_and_bias",
    "register_adapter",
    "share_of_zeros",
]

logger = logging.getLogger(__name__)

Load = Callable[[Sequence[nn.Module]], AbstractContextManager[None]]
"""Gives modules their own parameters, for as long as the context lasts."""

SOURCES: MutableMapping[nn.Module, Load] = WeakKeyDictionary()
"""Where the weights of models on the meta device come from, of those that have any."""


def register_adapter(
    *,
    expand: Sequence[str],
    contract: str,
    order: Literal["halves", "interleaved"] = "halves",
) -> None:
    """Teach yopo the names under which an architecture keeps its FFN.

    Args:
        expand: Paths, below the module that holds the FFN, of the one or two matrices from d_model
            to d_ff; the one inside the activation first. A single matrix with 2 · d_ff outputs
            is a fused pair.
        contract: Path of the matrix back to d_model.
        order: How a fused pair is stored: one half after the other, or row by row.

    Raises:
        InvalidArgumentError: If there is not one or two `expand` paths, or `order` is unknown.

    Example:
        >>> import yopo
        >>> yopo.register_adapter(expand=["lin_gate", "lin_up"], contract="lin_down")
    """
    if isinstance(expand, str) or len(expand) not in (1, 2):
        raise InvalidArgumentError(f"`expand` must name one or two matrices, got {expand!r}.")
    if order not in ("halves", "interleaved"):
        raise InvalidArgumentError(f'`order` must be "halves" or "interleaved", got {order!r}.')
    layout = Layout(tuple(expand), contract, order, known=False)
    if layout not in LAYOUTS:
        LAYOUTS.insert(0, layout)


def find_ffns(model: nn.Module, *, prove_unknown: bool = True) -> list[Ffn]:
    """Return every FFN of `model` whose rows can be removed, in the order of its modules.

    Known layouts come first; what they leave is searched by structure and proved by a trial run.
    An FFN whose width no config field sets is left out where the model has others: cutting it
    would give a checkpoint that only yopo could load. So is what only looks like an FFN.

    Args:
        model: A `PreTrainedModel` of transformers: a base model or one with any head.
        prove_unknown: Whether to run the model once where a layout is not in the built-in table.

    Raises:
        UnsupportedModelError: If the model is not a `PreTrainedModel`, is wrapped, quantised,
            sharded or offloaded, holds no FFN that can be proved, or shares some matrices of an
            FFN with another.
    """
    check_model(model)
    found = _distinct(_found_by_layout(model))
    check_parameters(found)
    ffns = with_fields(model, found)
    if any(ffn.width is not None for ffn in ffns):
        ffns = [ffn for ffn in ffns if ffn.width is not None]
    if not ffns:
        raise UnsupportedModelError(
            f"no FFN was found in {type(model).__name__}. If it has one, tell yopo the names of "
            "its matrices with `yopo.register_adapter`."
        )
    unproved = [ffn for ffn in ffns if not ffn.known]
    if unproved and prove_unknown:
        ffns = _without_unproved(ffns, found, prove(model, unproved))
    load = SOURCES.get(model)
    if load is None:
        return ffns
    return [
        replace(ffn, loaded=partial(load, [*ffn.modules, *_scalars(model, ffn)])) for ffn in ffns
    ]


def _scalars(model: nn.Module, ffn: Ffn) -> list[nn.Module]:
    """Return the modules of an FFN that hold single numbers, as activations that are trained do."""
    return [
        module
        for module in model.get_submodule(ffn.path).modules()
        if module._parameters
        and all(p is None or p.numel() == 1 for p in module._parameters.values())
    ]


def _without_unproved(ffns: list[Ffn], found: list[Ffn], reasons: Mapping[str, str]) -> list[Ffn]:
    """Drop guesses that the trial run did not prove, where the model has FFNs besides.

    Raises:
        UnsupportedModelError: If nothing is left, the user has described what was not proved, or
            its width cannot stay while that of the others shrinks.
    """
    rest = [ffn for ffn in ffns if ffn.name not in reasons]
    fields = {(ffn.width.path, ffn.width.key) for ffn in rest if ffn.width}
    for ffn in ffns:
        if ffn.name not in reasons:
            continue
        is_tied = ffn.width is not None and (ffn.width.path, ffn.width.key) in fields
        if not rest or is_tied or any(ffn.name == other.name for other in found):
            raise UnsupportedModelError(reasons[ffn.name])
        logger.info(f"Left alone: {reasons[ffn.name]}")
    return rest


def _found_by_layout(model: nn.Module) -> list[Ffn]:
    """Return what the table of layouts finds, each matrix by the first layout that names it."""
    found: list[Ffn] = []
    own = getattr(model, "base_model_prefix", "")  # such as `roberta_prelayernorm`
    for path, module in model.named_modules():
        if any(part.endswith("norm") and part != own for part in path.split(".")):
            continue  # a small gate inside a norm is no FFN
        taken: set[tuple[int, str]] = set()
        for layout in LAYOUTS:
            ffns = list(ffns_of_module(path, module, layout))
            places = {(id(slot.module), slot.name) for ffn in ffns for slot in ffn.slots}
            if not ffns or places & taken:
                continue
            if taken:  # a second FFN of one module is told apart by its own name
                inner = layout.contract.partition(".")[0]
                ffns = [replace(ffn, name=f"{ffn.name}.{inner}") for ffn in ffns]
            norm = norm_before(model, path)
            found += [replace(ffn, norm=norm) for ffn in ffns]
            taken |= places
    return found


def _distinct(ffns: list[Ffn]) -> list[Ffn]:
    """Drop FFNs that are another one under a second name; refuse those that share a part.

    Raises:
        UnsupportedModelError: If two FFNs share some of their matrices, but not all.
    """
    owners: dict[tuple[int, int | None, int], Ffn] = {}
    distinct = []
    for ffn in ffns:
        keys = {(id(slot.parameter), slot.expert, slot.start) for slot in ffn.slots}
        shared = {owners[key].name for key in keys if key in owners}
        if not shared:
            distinct.append(ffn)
            owners |= dict.fromkeys(keys, ffn)
        elif not all(key in owners for key in keys):
            raise UnsupportedModelError(
                f"`{ffn.name}` shares some of its matrices with `{min(shared)}`, but not all: "
                "removing rows of one would break the other. Untie them first."
            )
    return distinct
