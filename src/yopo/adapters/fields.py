"""Which config field sets the width of which FFN, and what else grows with it."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from yopo.adapters.ffn import Ffn, Slot
from yopo.adapters.layouts import norm_before
from yopo.adapters.skeleton import Probe, probe_widths
from yopo.adapters.structure import ffns_by_structure


def with_fields(model: nn.Module, found: list[Ffn]) -> list[Ffn]:
    """Return `found` with the config fields that set their widths, and what only those show.

    Fields named like an FFN's width are tried first; the others where these do not suffice.
    """
    probes = probe_widths(model, {ffn.rows for ffn in found}, by_name=True)
    ffns = _complete(model, found, probes, telling=probes)
    missing = {ffn.rows for ffn in ffns if ffn.width is None}
    if missing or not ffns:
        others = probe_widths(model, missing, by_name=False)
        ffns = _complete(model, found, probes + others, telling=probes if ffns else others)
    return ffns


def _complete(
    model: nn.Module, found: list[Ffn], probes: list[Probe], *, telling: list[Probe]
) -> list[Ffn]:
    """Return the FFNs `found` with the fields of `probes`, and those that only `telling` shows.

    A field that also sizes what belongs to no FFN, such as the input of a projector, is not free.
    """
    ffns = _with_widths(model, found, probes)
    claimed = _axes(model, ffns)
    for probe in telling:
        guessed = list(ffns_by_structure(model, probe, {name for name, _ in claimed}))
        claimed |= _axes(model, guessed)
        ffns += [replace(ffn, norm=norm_before(model, ffn.path)) for ffn in guessed]
    bound = {(probe.path, probe.key) for probe in probes if probe.axes.items() - claimed}
    return [
        replace(ffn, width=None) if ffn.width and (ffn.width.path, ffn.width.key) in bound else ffn
        for ffn in ffns
    ]


def _with_widths(model: nn.Module, ffns: list[Ffn], probes: list[Probe]) -> list[Ffn]:
    """Return `ffns` with the config field that sets each width, and what else grows with it."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    by_axis: dict[tuple[str, int], Probe] = {}
    for probe in probes:
        if probe.is_true:
            by_axis = dict.fromkeys(probe.axes.items(), probe) | by_axis
    ffns = [
        ffn if _place(ffn.contract, names) in by_axis else _turned(ffn, names, by_axis)
        for ffn in ffns
    ]
    chosen = {ffn.name: by_axis.get(_place(ffn.contract, names)) for ffn in ffns}
    extras: dict[str, list[Slot]] = defaultdict(list)
    for used in {id(probe): probe for probe in chosen.values() if probe is not None}.values():
        for owner, slot in _companions(model, ffns, used):
            extras[owner].append(slot)
    return [
        ffn
        if probe is None
        else replace(
            ffn, width=probe.field_for(ffn.rows), vectors=(*ffn.vectors, *extras[ffn.name])
        )
        for ffn, probe in ((ffn, chosen[ffn.name]) for ffn in ffns)
    ]


def _turned(ffn: Ffn, names: Mapping[int, str], by_axis: Mapping[tuple[str, int], Probe]) -> Ffn:
    """Return `ffn` with the axes of its expert tensors exchanged, if a field says so.

    Tensors `(experts, D, F)` and `(experts, F, D)` do not tell by themselves which size is which.
    """
    contract = replace(ffn.contract, axis=1 - ffn.contract.axis)
    if contract.expert is None or _place(contract, names) not in by_axis:
        return ffn
    return replace(
        ffn,
        rows=contract.parameter.shape[1 + contract.axis],
        expand=tuple(replace(slot, axis=1 - slot.axis) for slot in ffn.expand),
        contract=contract,
    )


def _axes(model: nn.Module, ffns: Sequence[Ffn]) -> set[tuple[str, int]]:
    """Return by name the parameters in which `ffns` have rows, with the axis they run along."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {_place(slot, names) for ffn in ffns for slot in ffn.slots}


def _place(slot: Slot, names: Mapping[int, str]) -> tuple[str, int]:
    return names[id(slot.parameter)], slot.axis + (slot.expert is not None)


def _companions(model: nn.Module, ffns: list[Ffn], probe: Probe) -> list[tuple[str, Slot]]:
    """Return parameters that grow with an FFN without being matrices of it, with their owner.

    The gain of a norm between expand and contract is one.
    """
    claimed = {name for name, _ in _axes(model, ffns)}
    companions = []
    for name, axis in probe.axes.items():
        if name in claimed:
            continue
        owners = [ffn for ffn in ffns if name.startswith(ffn.path + ".")]
        if not owners:
            continue
        owner = max(owners, key=lambda ffn: len(ffn.path))
        path, _, key = name.rpartition(".")
        length = model.get_parameter(name).shape[axis]
        for start in {owner.rows: [0], 2 * owner.rows: [0, owner.rows]}.get(length, []):
            companions.append((owner.name, Slot(model.get_submodule(path), key, axis, start)))
    return companions
