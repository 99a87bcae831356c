"""What a config builds: parameter shapes of a model made on the meta device, which costs no memory.

Which field of a config sets which widths is not guessed from names. The model's own class is built
from a changed config and its shapes are compared: whatever grew with the field depends on it. The
same comparison proves, before a cut, that stock `from_pretrained` will build the cut model.
"""

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from yopo.adapters.ffn import WidthField

_WIDTH_NAME = re.compile(r"inter|ff|feed_?forward|inner|mlp|hidden_dim", re.IGNORECASE)
_SWITCHES = {"block_auto_adjust_ff_dim": False}
"""Fields that make an architecture round its width by itself; a cut model sets it exactly."""
_COARSEST_STEP = 0.02
"""Largest share of an FFN's rows by which one step of a config field may move its width."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Tell what one config field sets.

    Attributes:
        path: Names of the nested configs that lead to the field.
        key: The field.
        value: Its value now, None where the architecture derives the width by itself.
        axes: The axis that doubles with the field, for every parameter that does.
        is_true: Whether the model has those parameters in the shapes that its config gives them; a
            model that was cut to unequal widths has not.
    """

    path: tuple[str, ...]
    key: str
    value: int | None
    axes: Mapping[str, int]
    is_true: bool

    def field_for(self, rows: int) -> WidthField | None:
        """Return this field as the one that sets the width of an FFN of `rows` rows.

        None where the field moves the width in steps too coarse to express a ratio.
        """
        per_row = Fraction(1) if self.value is None else Fraction(self.value, rows)
        if per_row.denominator > max(rows * _COARSEST_STEP, 16):
            return None
        return WidthField(self.path, self.key, per_row)


def build_skeleton(
    model: nn.Module, widths: Mapping[tuple[tuple[str, ...], str], int]
) -> nn.Module:
    """Build the class of `model` on the meta device, from its config with `widths` written in.

    Args:
        model: A `PreTrainedModel`.
        widths: New values by `(path, key)` of the config field.

    Raises:
        Exception: Whatever the class raises for such a config.
    """
    changed: Any = copy.deepcopy(model.config)
    for (path, key), value in widths.items():
        write_width(config_at(changed, path), key, value)
    # Saved and read, because a config may derive some of its fields when it is read.
    return _built(type(model), type(changed), changed.to_diff_dict())


def _built(
    model_class: Callable[[Any], nn.Module],
    config_class: Callable[..., Any],
    fields: Mapping[str, Any],
) -> nn.Module:
    """Return what a class builds on the meta device, from a config that is made of `fields`."""
    config = config_class(**fields)
    with torch.random.fork_rng(devices=[]), torch.device("meta"), _Unfilled():
        return model_class(config)


class _Unfilled(TorchFunctionMode):
    """Skip what fills parameters: most of the time, and for nothing on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch, unless it fills parameters."""
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by name, tied ones under each of their names."""
    return {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def probe_widths(model: nn.Module, candidate_rows: set[int], *, by_name: bool) -> list[Probe]:
    """Return the config fields that set widths of matrices.

    Args:
        model: A `PreTrainedModel`.
        candidate_rows: Widths to try for fields that are None, such as GPT-2's `n_inner`.
        by_name: Whether to try fields with the name of an FFN's width, or the other fields whose
            value is one of `candidate_rows`; all of them where there are no candidates.
    """
    try:
        base = build_skeleton(model, {})
    except Exception:  # a class that cannot be built from its config alone has no field to offer
        return []
    # Users drop layers, and share them.
    present = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    expected = shapes_of(base)
    probes = []
    for path, config in nested_configs(model.config):
        for key, value in _candidates(config, candidate_rows, by_name):
            doubled = [2 * value] if value is not None else [2 * rows for rows in candidate_rows]
            if value is not None and any(hasattr(config, switch) for switch in _SWITCHES):
                doubled += [2 * rows for rows in candidate_rows]
            for target in doubled:
                grown = _doubled_axes(model, base, path, key, target)
                axes = {name: axis for name, axis in grown.items() if name in present}
                if axes:
                    derived = value is None or target != 2 * value
                    is_true = all(present[name] == expected[name] for name in axes)
                    probes.append(Probe(path, key, None if derived else value, axes, is_true))
                    break
    return probes


def nested_configs(
    config: Any, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every config inside `config` with the path that leads there, itself first."""
    yield path, config
    for key, value in vars(config).items():
        if hasattr(value, "model_type") and hasattr(value, "to_dict") and value is not config:
            yield from nested_configs(value, (*path, key))


def config_at(config: Any, path: tuple[str, ...]) -> Any:
    """Return the nested config at `path`."""
    for key in path:
        config = getattr(config, key)
    return config


def write_width(config: Any, key: str, value: int) -> None:
    """Write a width into a config field, in every entry where the field holds one a layer."""
    current = getattr(config, key, None)
    setattr(config, key, [value] * len(current) if isinstance(current, list) else value)
    for switch, setting in _SWITCHES.items():
        if hasattr(config, switch):
            setattr(config, switch, setting)


def _candidates(config: Any, rows: set[int], by_name: bool) -> list[tuple[str, int | None]]:
    """Return the integer fields that may be widths, with their values."""
    candidates: list[tuple[str, int | None]] = []
    for key, entry in vars(config).items():
        one_a_layer = isinstance(entry, list) and entry and all(e == entry[0] for e in entry)
        value = entry[0] if one_a_layer else entry
        if isinstance(value, bool) or not isinstance(value, int | None):
            continue
        named = _WIDTH_NAME.search(key) is not None
        if by_name:
            plausible = value is None or value > 1
        else:
            plausible = value in rows if rows else (value or 0) > 1
        if named == by_name and plausible:
            candidates.append((key, value))
    return candidates


def _doubled_axes(
    model: nn.Module, base: nn.Module, path: tuple[str, ...], key: str, value: int
) -> dict[str, int]:
    """Return the axis that doubles for each parameter, nothing if any changes in another way.

    A field that an embedding grows with is the width of the model, not of an FFN.
    """
    try:
        skeleton = build_skeleton(model, {(path, key): value})
    except Exception:  # the config refuses the value: not a free width
        return {}
    grown = shapes_of(skeleton)
    if grown.keys() != shapes_of(base).keys() or _buffers_of(skeleton) != _buffers_of(base):
        return {}
    axes = {}
    for name, shape in shapes_of(base).items():
        if len(grown[name]) != len(shape):
            return {}
        changed = [axis for axis, size in enumerate(shape) if grown[name][axis] != size]
        if not changed:
            continue
        if len(changed) > 1 or grown[name][changed[0]] != 2 * shape[changed[0]]:
            return {}
        if isinstance(skeleton.get_submodule(name.rpartition(".")[0]), nn.Embedding):
            return {}
        axes[name] = changed[0]
    return axes


def _buffers_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of everything that is saved without being a parameter."""
    saved = model.state_dict().items()
    parameters = shapes_of(model)
    return {name: tuple(tensor.shape) for name, tensor in saved if name not in parameters}
