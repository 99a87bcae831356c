"""What must hold of a model before yopo looks for FFNs in it."""

from collections.abc import Iterable

import torch
from torch import nn

from yopo.adapters.ffn import Ffn
from yopo.errors import UnsupportedModelError

_NO_MODEL = "yopo prunes models of transformers, got a {}. Pass the `PreTrainedModel` itself."
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_model(model: nn.Module) -> None:
    """Refuse wrappers, adapters, quantised, sharded and offloaded models, each with its way out.

    Raises:
        UnsupportedModelError: If rows of `model` cannot be removed in place.
    """
    _check_wrapper(model)
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        raise UnsupportedModelError(
            "the model is quantised, and its packed weights have no rows to remove. Prune the "
            "unquantised model first, then quantise the result."
        )
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
    """Check that the FFNs are made of parameters, not of tensors computed from others.

    Raises:
        UnsupportedModelError: If a matrix is masked or parametrised.
    """
    for ffn in ffns:
        for slot in ffn.slots:
            if not isinstance(slot.parameter, nn.Parameter):
                raise UnsupportedModelError(
                    f"`{slot.name}` of a matrix of `{ffn.name}` is no parameter: a mask or a "
                    "parametrisation computes it. Make it permanent first, with "
                    "`torch.nn.utils.prune.remove` or "
                    "`torch.nn.utils.parametrize.remove_parametrizations`."
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
    if kind.startswith("Peft") or any(hasattr(module, "base_layer") for module in model.modules()):
        raise UnsupportedModelError(
            "the model carries PEFT adapters, whose shapes would no longer fit. Call "
            "`model = model.merge_and_unload()` first, or prune before adding adapters."
        )
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise UnsupportedModelError("the model is sharded by FSDP. Prune it before wrapping it.")
    is_pretrained = hasattr(model, "save_pretrained")
    if not is_pretrained or not hasattr(getattr(model, "config", None), "to_dict"):
        raise UnsupportedModelError(_NO_MODEL.format(kind))


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
