"""Cut rows out of a model in place, and write the new widths into its config.

Everything is checked before the first tensor changes: the class of the model is built from the new
config on the meta device, and must have the shapes that the cut will leave.
"""

import logging
import signal
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from yopo.adapters import Ffn, Slot, find_ffns
from yopo.adapters.attention import HEAD_FIELD
from yopo.adapters.skeleton import build_skeleton, shapes_of
from yopo.errors import InvalidArgumentError, UnsupportedModelError
from yopo.plan import PruningPlan
from yopo.upkeep import (
    WIDTHS_KEY,
    Fields,
    loading_arguments,
    rebuild_rotary,
    sync_overridden,
    sync_sizes,
    warn_on_save,
    write_config,
)

logger = logging.getLogger(__name__)


def apply_plan(model: nn.Module, plan: PruningPlan, *, ffns: Sequence[Ffn] | None = None) -> None:
    """Remove from `model`, in place, every row that `plan` does not keep.

    Parameters stay the same objects with their device, dtype, `requires_grad` and memory format;
    gradients, whose shapes no longer fit, are dropped. Module sizes and config fields follow.

    If the widths that come out cannot be written into the config, the log warns that only
    `yopo.load` can load the saved model.

    Args:
        model: A `PreTrainedModel`; its weights may be on the meta device.
        plan: Which rows stay. It must name every FFN of the model, at its present width.
        ffns: The FFNs of the model if the caller has found them already.

    Raises:
        UnsupportedModelError: If the model cannot be pruned, or the result could not be loaded
            again.
        InvalidArgumentError: If `plan` is no plan, or was made for another model.
    """
    overrides = cut_rows(model, plan, find_ffns(model) if ffns is None else ffns)
    if overrides:
        name = type(model).__name__
        arguments = loading_arguments("path", name)
        logger.warning(
            f"The config of {name} cannot express the new widths of {len(overrides)} FFNs. After "
            f"`save_pretrained`, load the model with `yopo.load({arguments})`."
        )


def cut_rows(model: nn.Module, plan: PruningPlan, ffns: Sequence[Ffn]) -> dict[str, int]:
    """Do what `apply_plan` does, and return the widths that the config cannot express, by name."""
    check_plan(ffns, plan)
    fields, overrides = _config_changes(model, ffns, plan)
    skeletons = _skeletons(model, ffns, plan, fields, overrides)
    # Weights made in inference mode could never be trained again.
    with interrupts_held(), torch.inference_mode(False):
        _cut_parameters(ffns, plan)
        sync_sizes(model, skeletons)
        sync_overridden(model, [ffn for ffn in ffns if ffn.name in overrides], plan)
        write_config(model, fields, overrides)
        if any(key == HEAD_FIELD for _, key in fields):
            rebuild_rotary(model)
    if overrides:
        warn_on_save(model)
    return overrides


def check_plan(ffns: Sequence[Ffn], plan: PruningPlan) -> None:
    """Check that `plan` is one, and was made for a model with these FFNs.

    Raises:
        InvalidArgumentError: If it is not.
    """
    if not isinstance(plan, PruningPlan):
        raise InvalidArgumentError(
            f"`plan` must be a PruningPlan, got {plan!r}. Read a saved one with "
            "`PruningPlan.load(path)`."
        )
    present = {ffn.name: ffn.rows for ffn in ffns}
    for name, rows in present.items():
        if plan.rows.get(name) != rows:
            planned = plan.rows.get(name)
            told = "does not name it" if planned is None else f"was made for {planned}"
            raise InvalidArgumentError(
                f"the plan does not fit this model: `{name}` has {rows} rows, the plan {told}."
            )
    if unknown := plan.rows.keys() - present.keys():
        raise InvalidArgumentError(
            f"the plan does not fit this model, which has no FFN `{min(unknown)}`."
        )
    tensors: dict[tuple[int, int], tuple[Ffn, int]] = {}
    for ffn in ffns:
        width = len(plan.kept[ffn.name])
        for slot in ffn.slots:
            first, expected = tensors.setdefault((id(slot.parameter), ffn.rows), (ffn, width))
            if width != expected:
                raise InvalidArgumentError(
                    f"`{first.name}` and `{ffn.name}` lie in one tensor and need one width, got "
                    f"{expected} and {width}."
                )


def _config_changes(
    model: nn.Module, ffns: Sequence[Ffn], plan: PruningPlan
) -> tuple[Fields, dict[str, int]]:
    """Return new values for config fields, and the widths that no field can express."""
    groups: dict[tuple[tuple[str, ...], str] | None, list[Ffn]] = defaultdict(list)
    for ffn in ffns:
        groups[(ffn.width.path, ffn.width.key) if ffn.width else None].append(ffn)
    fields: Fields = {}
    overrides = dict(getattr(model.config, WIDTHS_KEY, {}) or {})
    for field, group in groups.items():
        if all(len(plan.kept[ffn.name]) == ffn.rows for ffn in group):
            continue
        values = {
            ffn.width.per_row * len(plan.kept[ffn.name]) for ffn in group if ffn.width is not None
        }
        if field is not None and len(values) == 1 and min(values).denominator == 1:
            fields[field] = int(min(values))
        else:
            overrides |= {ffn.name: len(plan.kept[ffn.name]) for ffn in group}
    return fields, overrides


def _skeletons(
    model: nn.Module,
    ffns: Sequence[Ffn],
    plan: PruningPlan,
    fields: Fields,
    overrides: Mapping[str, int],
) -> tuple[nn.Module, nn.Module] | None:
    """Return what the config builds now and after the cut, having checked the shapes of the latter.

    None for a model whose class cannot be built from its config alone.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    shapes = {name: list(shape) for name, shape in shapes_of(model).items()}
    for ffn in ffns:
        removed = ffn.rows - len(plan.kept[ffn.name])
        for slot in ffn.slots:
            if not slot.expert:  # experts of one tensor shrink together: count the first
                axis = slot.axis + (slot.expert is not None)
                shapes[names[id(slot.parameter)]][axis] -= removed
    aliases = dict(model.named_parameters(remove_duplicate=False))
    expected = {name: tuple(shapes[names[id(parameter)]]) for name, parameter in aliases.items()}
    try:
        dense, cut = build_skeleton(model, {}), build_skeleton(model, fields)
    except Exception as error:
        if not fields:
            return None
        changes = ", ".join(f"{key}={value}" for (_, key), value in fields.items())
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be built with {changes}: {error}"
        ) from error
    if not overrides:
        for name, shape in shapes_of(cut).items():
            if expected.get(name, shape) != shape:
                raise UnsupportedModelError(
                    f"cutting would leave `{name}` with shape {expected[name]}, but loading the "
                    f"saved model would build {shape}. Please report this architecture."
                )
    return dense, cut


def _cut_parameters(ffns: Sequence[Ffn], plan: PruningPlan) -> None:
    parts: dict[int, list[tuple[Slot, Tensor]]] = defaultdict(list)
    for ffn in ffns:
        kept_K = plan.kept[ffn.name]
        if len(kept_K) != ffn.rows:
            for slot in ffn.slots:
                parts[id(slot.parameter)].append((slot, slot.indices(kept_K)))
    for slots in parts.values():
        _cut_parameter(slots)


def _cut_parameter(slots: list[tuple[Slot, Tensor]]) -> None:
    """Keep the given entries of one parameter, which all `slots` share."""
    slot = slots[0][0]
    parameter = slot.parameter
    by_expert: dict[int | None, list[Tensor]] = defaultdict(list)
    for part, indices in slots:
        by_expert[part.expert].append(indices)
    entries = {
        expert: torch.cat(indices).sort().values.to(parameter.device)
        for expert, indices in by_expert.items()
    }
    with torch.no_grad():
        if slot.expert is None:
            cut = _select(parameter.data, slot.axis, entries[None])
        else:
            spare = next(iter(entries.values()))  # for experts that a tensor holds and never uses
            cut = torch.stack(
                [
                    _select(matrix, slot.axis, entries.get(expert, spare))
                    for expert, matrix in enumerate(parameter.data)
                ]
            )
            cut = _laid_out_as(parameter.data, cut)
        parameter.grad = None
        parameter.data = cut


def _select(tensor: Tensor, axis: int, entries: Tensor) -> Tensor:
    """Return `entries` of `tensor` along `axis`, laid out in memory as `tensor` is."""
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    selected = tensor.permute(order).index_select(order.index(axis), entries)
    return _laid_out_as(tensor, selected.permute([order.index(dim) for dim in range(tensor.dim())]))


def _laid_out_as(model: Tensor, tensor: Tensor) -> Tensor:
    """Return `tensor` with its axes in memory in the order of `model`, a copy only if need be."""
    order = sorted(range(model.dim()), key=model.stride, reverse=True)
    laid_out = tensor.permute(order).contiguous()
    return laid_out.permute([order.index(dim) for dim in range(model.dim())])


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back until the block is done: half a cut would leave a broken model."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, _: pending.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if pending:
        signal.raise_signal(signal.SIGINT)
