"""Adapters of sparse matrices: a weight that is zero stays zero, in training and when merged.

Of a sparse matrix W with an adapter of factors A and B the model computes with W + s · BA ⊙ M,
where M = (W ≠ 0). W is frozen, so M is found anew whenever it is needed.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from yopo.recovery.targets import Places

_LEAST = 0.01
"""From which share of zeros on adapters are trained to keep them, which takes time.

A dense matrix has next to none. Those are kept when it is merged, which changes next to nothing.
"""


def is_sparse(model: nn.Module, places: Places) -> bool:
    """Tell whether a matrix of `model` that gets an adapter has zeros to keep."""
    return any(_has_zeros(model.get_parameter(name), _LEAST) for name in places.names)


def keep_zeros(adapted: Any, *, least: float = _LEAST) -> None:
    """Let adapters change no weight that is zero.

    Args:
        adapted: A model with adapters.
        least: From which share of zeros on.
    """
    from peft.tuners.lora.layer import Linear, ParamWrapper

    for layer in adapted.modules():
        if isinstance(layer, Linear) and _has_zeros(layer.weight, least):
            layer.lora_variant.update(dict.fromkeys(layer.lora_A, _KeepsZeros()))
        elif isinstance(layer, ParamWrapper) and _has_zeros(layer.get_param(), least):
            _keep_zeros_of_experts(layer)


def _has_zeros(matrix: Tensor, least: float) -> bool:
    zeros = matrix.numel() - int(torch.count_nonzero(matrix.detach()))
    return zeros > 0 and zeros >= least * matrix.numel()


class _KeepsZeros:
    """Say to an adapter of a linear map what it computes; peft calls this a variant of LoRA."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """Return `result`, of the map itself, with what the adapter adds to it."""

        def added(inputs: Tensor) -> Tensor:
            delta = _without_zeros(module.get_delta_weight(active_adapter), module.weight)
            return linear(inputs, delta.T if module.fan_in_fan_out else delta)

        # Computed twice: kept for the backward pass, `delta` would take as much as the weights.
        inputs = module.lora_dropout[active_adapter](x)
        more: Tensor = checkpoint(added, inputs, use_reentrant=False, preserve_rng_state=False)
        return result + more

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """Add the adapter to the weight, in place."""
        orig_weight.data += _without_zeros(module.get_delta_weight(active_adapter), orig_weight)


def _keep_zeros_of_experts(layer: Any) -> None:
    """Do the same for a parameter that holds all experts, which peft parametrises as they run."""
    activate, delta_of = layer._activate_lora, layer.get_delta_weight

    @contextmanager
    def masked(adapters: Iterable[str]) -> Iterator[None]:
        with activate(adapters):
            changed = layer.get_base_layer().parametrizations[layer.parameter_name]
            changed.append(_Mask(changed.original))
            try:
                yield
            finally:
                del changed[-1]

    layer._activate_lora = masked
    layer.get_delta_weight = lambda adapter: _without_zeros(delta_of(adapter), layer.get_param())


class _Mask(nn.Module):
    """Make zero what is zero in `weight`."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self._zeros = weight.detach() == 0

    def forward(self, changed: Tensor) -> Tensor:
        return changed.masked_fill(self._zeros, 0)


def _without_zeros(delta: Tensor, weight: Tensor) -> Tensor:
    """Return `delta` where `weight` is not zero, and zeros elsewhere."""
    return delta.masked_fill(weight.detach() == 0, 0)
