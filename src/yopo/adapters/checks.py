"""What must hold of a model before yopo looks for FFNs in it."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod

from yopo.adapters.ffn import Ffn
from yopo.errors import UnsupportedModelError

_NO_MODEL = "yopo prunes models of transformers, got a {}. Pass the `PreTrainedModel` itself."
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_PERMANENT = (
    "Make it permanent first, with `torch.nn.utils.prune.remove` or "
    "`torch.nn.utils.parametrize.remove_parametrizations`."
)
_ZEROS = 0.2
"""From which share of zeros on a matrix counts as sparse; rounding to 4 bits makes fewer."""
_SAMPLED = 16
"""Outputs of a matrix in which zeros are counted."""


def check_model(model: nn.Module) -> None:
    """Refuse wrappers, adapters, masks, quantised, sharded and offloaded models, with the way out.

    Raises:
        UnsupportedModelError: If rows of `model` cannot be removed in place.
    """
    _check_wrapper(model)
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        raise UnsupportedModelError(
            "the model is quantised, and its packed weights have no rows to remove. Prune the "
            "unquantised model first, then quantise the result."
        )
    for name, module in model.named_modules():
        _check_module(name, module)
    for name, parameter in model.named_parameters():
        _check_parameter(name, parameter)
    if any(getattr(_hook(module), "offload", False) for module in model.modules()):
        raise UnsupportedModelError(
            "some weights are offloaded to the CPU or the disk. Load the model with a `device_map` "
            "that keeps every weight on a device, for example `device_map='cpu'`."
        )


def check_weights(ffns: Iterable[Ffn]) -> None:
    """Check that every weight of the FFNs is there and finite.

    Raises:
        UnsupportedModelError: If weights are on the meta device, not finite, or have no rows.
    """
    checked: set[tuple[int, str]] = set()
    for ffn in ffns:
        if ffn.rows == 0:
            raise UnsupportedModelError(f"`{ffn.name}` has 0 rows: nothing is left to prune.")
        places = {(id(slot.module), slot.name): slot for slot in ffn.slots}
        new = [slot for place, slot in places.items() if place not in checked]
        checked |= places.keys()
        if new:
            with ffn.loaded():
                for slot in new:
                    _check_weight(ffn.name, slot.parameter)


def _check_weight(name: str, parameter: nn.Parameter) -> None:
    if parameter.is_meta:
        raise UnsupportedModelError(
            f"the weights of `{name}` are on the meta device. Load the model with its weights; a "
            "`PruningPlan` can be applied without them."
        )
    # NaN and infinity show in the extremes, which one pass finds.
    if not torch.isfinite(torch.stack(parameter.detach().aminmax())).all():
        raise UnsupportedModelError(
            f"`{name}` has weights that are NaN or infinite. Mend the checkpoint, or load it in a "
            "wider `dtype`."
        )


def check_parameters(ffns: Iterable[Ffn]) -> None:
    """Check that the FFNs are made of parameters alone, which nothing else is computed into.

    Raises:
        UnsupportedModelError: If a matrix or a bias is masked or parametrised, or a linear layer
            holds other tensors beside them, as low-rank adapters and masks of one's own do.
    """
    for ffn in ffns:
        for slot in ffn.slots:
            names = {slot.name, "bias"} if slot.name == "weight" else {slot.name}
            for name in sorted(names):
                if _is_computed(slot.module, name):
                    raise UnsupportedModelError(
                        f"`{name}` of a matrix of `{ffn.name}` is no parameter: a mask or a "
                        f"parametrisation computes it. {_PERMANENT}"
                    )
            if isinstance(slot.module, nn.Linear) and (more := _more_tensors(slot.module)):
                raise UnsupportedModelError(
                    f"a linear layer of `{ffn.name}` holds `{more[0]}` beside its weight. If that "
                    "is an adapter or a mask, it would no longer fit: merge it into the weight "
                    "first, or add it after pruning."
                )


def share_of_zeros(ffn: Ffn) -> float:
    """Return the share of zeros in the contract matrix, 0 where it is too small for a mask.

    A few outputs stand for all, so that little is read from a disk.
    """
    sample = ffn.contract_weight()[:, :_SAMPLED]
    share = 1.0 - float(torch.count_nonzero(sample)) / max(1, sample.numel())
    return share if share >= _ZEROS else 0.0


def check_stored(model: nn.Module, folder: Path, names: Iterable[str]) -> None:
    """Refuse a checkpoint on disk that masks, parametrisations or an adapter go with.

    Args:
        model: The model, as its config builds it.
        folder: The folder.
        names: Names of all tensors in it.

    Raises:
        UnsupportedModelError: If it holds masks of `torch.nn.utils.prune`, parametrisations that
            the class of the model does not make, or the config of a PEFT adapter.
    """
    if (folder / "adapter_config.json").is_file():
        raise UnsupportedModelError(
            f"`{folder}` holds a PEFT adapter beside the model, whose shapes would no longer fit. "
            "Merge it first: `PeftModel.from_pretrained(…).merge_and_unload()"
            ".save_pretrained(folder)`."
        )
    found = set(names)
    makes_them = any(is_parametrized(module) for module in model.modules())
    for name in sorted(found):
        is_masked = name.endswith("_orig") and f"{name.removesuffix('_orig')}_mask" in found
        if is_masked or (".parametrizations." in name and not makes_them):
            raise UnsupportedModelError(
                f"`{folder}` holds `{name}`, of a mask or a parametrisation that no loader would "
                f"apply. {_PERMANENT} Then save the model again."
            )


def _check_wrapper(model: nn.Module) -> None:
    kind = type(model).__name__
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(_NO_MODEL.format(kind))
    if kind in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"):
        raise UnsupportedModelError(
            f"the model is wrapped in {kind}. Prune `model.module` before wrapping it."
        )
    if kind == "OptimizedModule":
        raise UnsupportedModelError(
            "the model is compiled. Prune the original, `model._orig_mod`, then compile it again."
        )
    if kind.startswith("Peft") or any(_is_adapter(module) for module in model.modules()):
        raise UnsupportedModelError(
            "the model carries PEFT adapters, whose shapes would no longer fit. Call "
            "`model = model.merge_and_unload()` first, or prune before adding adapters."
        )
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise UnsupportedModelError("the model is sharded by FSDP. Prune it before wrapping it.")
    is_pretrained = hasattr(model, "save_pretrained")
    if not is_pretrained or not hasattr(getattr(model, "config", None), "to_dict"):
        raise UnsupportedModelError(_NO_MODEL.format(kind))


def _check_module(name: str, module: nn.Module) -> None:
    masks = any(isinstance(hook, BasePruningMethod) for hook in module._forward_pre_hooks.values())
    # Convolutions of speech models are parametrised by their own class, and load so.
    computes = is_parametrized(module) and not isinstance(module, _ConvNd)
    is_normed = isinstance(module, nn.Linear) and _is_computed(module, "weight")
    if masks or computes or is_normed:
        raise UnsupportedModelError(
            f"`{name}` has a mask or a parametrisation, which a saved model would lose without a "
            f"word. {_PERMANENT}"
        )
    if type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.qat")):
        raise UnsupportedModelError(
            f"`{name}` is quantised ({type(module).__name__}), and packed weights have no rows to "
            "remove. Prune the unquantised model, then quantise it."
        )


def _is_computed(module: nn.Module, name: str) -> bool:
    tensor = getattr(module, name, None)
    return isinstance(tensor, torch.Tensor) and not isinstance(tensor, nn.Parameter)


def _is_adapter(module: nn.Module) -> bool:
    return hasattr(module, "base_layer") or type(module).__module__.startswith("peft.")


def _more_tensors(module: nn.Module) -> Sequence[str]:
    """Return the names of tensors of more than one number that a linear layer has no need of."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return [
        name for name, tensor in tensors if name not in ("weight", "bias") and tensor.numel() > 1
    ]


def _check_parameter(name: str, parameter: nn.Parameter) -> None:
    kind = type(parameter.data).__name__
    if kind == "DTensor":
        raise UnsupportedModelError(
            f"`{name}` is a DTensor, spread over processes by FSDP or tensor parallelism. Prune "
            "the model before spreading it."
        )
    if hasattr(parameter, "ds_id"):
        raise UnsupportedModelError(
            f"`{name}` is partitioned by DeepSpeed. Prune the model before DeepSpeed gets it."
        )
    if kind not in ("Tensor", "Parameter", "FakeTensor") or not parameter.is_floating_point():
        raise UnsupportedModelError(
            f"`{name}` is a {kind} of {parameter.dtype}: the model is quantised, and packed "
            "weights have no rows to remove. Prune the unquantised model, then quantise it."
        )
    if parameter.layout != torch.strided:
        raise UnsupportedModelError(
            f"`{name}` is sparse ({parameter.layout}). Prune the dense model: make such weights "
            "dense with `to_dense()`."
        )
    if parameter.dtype not in _FLOATS:
        raise UnsupportedModelError(
            f"`{name}` has dtype {parameter.dtype}; yopo prunes float64, float32, float16 and "
            "bfloat16. Load the model with `dtype=torch.bfloat16`."
        )


def _hook(module: nn.Module) -> object:
    """Return the hook by which accelerate moves weights, if any."""
    return getattr(module, "_hf_hook", None)
