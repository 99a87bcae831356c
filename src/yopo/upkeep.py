"""Keep true what a model remembers of its widths once rows have been cut: sizes, config, saving."""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from yopo.adapters import Ffn
from yopo.adapters.skeleton import nested_configs, write_width
from yopo.plan import PruningPlan

logger = logging.getLogger(__name__)

WIDTHS_KEY = "yopo_widths"
"""Config entry of a model whose widths no field of its config can express: rows by FFN."""

_SIZE_NAMES = {
    "expert_dim",
    "ffn_dim",
    "ffn_hidden_size",
    "head_dim",
    "intermediate_dim",
    "intermediate_size",
}
"""Attributes under which modules remember the width of an FFN or the size of a head."""

Fields = dict[tuple[tuple[str, ...], str], int]
"""New values of config fields, by the path of nested configs and the key."""


def sync_sizes(model: nn.Module, skeletons: tuple[nn.Module, nn.Module] | None) -> None:
    """Set what modules remember of their sizes to what their weights now are.

    Linear maps are read off their weights; for the rest, whatever a freshly built model remembers
    differently under the new config than under the old one is copied.
    """
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear) and isinstance(weight, Tensor):
            module.out_features, module.in_features = weight.shape
        elif type(module).__name__ == "Conv1D" and isinstance(weight, Tensor):
            module.__dict__.update(nx=weight.shape[0], nf=weight.shape[1])
    if skeletons is None:
        return
    dense, cut = (dict(skeleton.named_modules(remove_duplicate=False)) for skeleton in skeletons)
    for name, module in model.named_modules(remove_duplicate=False):
        if name not in cut:
            continue
        for key, value in vars(cut[name]).items():
            is_size = isinstance(value, int | float | tuple) and key in vars(module)
            if is_size and value != vars(dense[name]).get(key):
                setattr(module, key, value)


def sync_overridden(model: nn.Module, ffns: Sequence[Ffn], plan: PruningPlan) -> None:
    """Set the sizes remembered by modules whose new width no config, so no skeleton, can show."""
    for ffn in ffns:
        old, new = ffn.rows, len(plan.kept[ffn.name])
        holders = {id(slot.module): slot.module for slot in ffn.slots}
        for module in (model.get_submodule(ffn.path), *holders.values()):
            for key in _SIZE_NAMES & vars(module).keys():
                if getattr(module, key) == old:
                    setattr(module, key, new)
                    if key == "head_dim" and getattr(module, "scaling", None) == old**-0.5:
                        module.__dict__["scaling"] = new**-0.5


def write_config(model: nn.Module, fields: Fields, overrides: Mapping[str, int]) -> None:
    """Write the new widths into the config and into the copies that submodules keep.

    A config that `model.config` holds elsewhere is no copy, even if it is equal: the encoder's is
    not the decoder's.
    """
    named = {id(nested) for _, nested in nested_configs(model.config)}
    configs: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "to_dict"):
            for _, nested in nested_configs(config):
                configs[id(nested)] = nested
    for (path, key), value in fields.items():
        target = model.config
        for part in path:
            target = getattr(target, part)
        old = getattr(target, key, None)
        for config in configs.values():
            is_equal = type(config) is type(target) and getattr(config, key, None) == old
            if config is target or (is_equal and id(config) not in named):
                write_width(config, key, value)
    if overrides:
        setattr(model.config, WIDTHS_KEY, dict(overrides))


def rebuild_rotary(model: nn.Module) -> None:
    """Compute rotary frequencies anew where the size of a head has changed."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is None or not isinstance(getattr(module, "inv_freq", None), Tensor):
            continue
        rebuilt = type(module)(config)
        for name, buffer in rebuilt.named_buffers(recurse=False):
            old = getattr(module, name)
            if old.shape != buffer.shape:
                setattr(module, name, buffer.to(old.device, old.dtype))


def warn_on_save(model: nn.Module) -> None:
    """Make `model.save_pretrained` say that stock `from_pretrained` cannot load the result."""
    model.save_pretrained = partial(_save_with_warning, model)  # type: ignore[assignment]


def loading_arguments(path: str, model_class: str) -> str:
    """Return what `yopo.load` is given for a class, which it must be told if transformers lacks it.

    Args:
        path: The folder, as it is to be written.
        model_class: Name of the class.
    """
    import transformers

    return path if hasattr(transformers, model_class) else f"{path}, model_class={model_class}"


def _save_with_warning(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    arguments = loading_arguments("path", type(model).__name__)
    logger.warning(
        "This model has FFN widths that its config cannot express: stock `from_pretrained` will "
        f"refuse the saved files. Load them with `yopo.load({arguments})`."
    )
    return type(model).save_pretrained(model, *args, **kwargs)  # type: ignore[attr-defined]
