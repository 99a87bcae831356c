"""Means and second moments of hidden units.

Shapes: F rows of an FFN, D model width, T tokens.

A hidden unit is an input of the contract matrix. All that selection and restoring need of the units
are means and second moments over tokens, so states are summed up as they come and never stored.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from yopo.adapters import Ffn
from yopo.errors import UnsupportedModelError
from yopo.writing import with_progress

_BATCH = 16


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Hold what is known of the hidden units of one FFN.

    Attributes:
        second_FF: Mean of hᵀh over tokens, float64.
        mean_F: Mean of h over tokens, float64.
        tokens: How many tokens were seen, or imagined; 0 where no token of a text comes by.
    """

    second_FF: Tensor
    mean_F: Tensor
    tokens: int

    def covariance(self) -> Tensor:
        """Return the covariance of h, `(F, F)` in float64."""
        return self.second_FF - torch.outer(self.mean_F, self.mean_F)

    def behind(self, bias_D: Tensor | None) -> Tensor:
        """Return what counts of the moments in front of a bias, `(F, F)` in float64.

        A bias absorbs means, so behind one it is the covariance; else the second moments.
        """
        return self.second_FF if bias_D is None else self.covariance()


def read_moments(
    model: nn.Module, ffns: Sequence[Ffn], inputs: dict[str, Tensor]
) -> dict[str, Moments]:
    """Run `model` on `inputs` and return the moments of the hidden units of `ffns`, by name.

    Args:
        model: The model that holds `ffns`.
        ffns: FFNs whose moments fit into memory together: F² numbers each.
        inputs: Keyword arguments of the model, batch first.

    Raises:
        UnsupportedModelError: If hidden units are NaN or infinite.
    """
    sums = {ffn.name: MomentSums.zeros(ffn) for ffn in ffns}
    prefix = getattr(model, "base_model_prefix", "")
    if prefix and all(ffn.path.startswith(f"{prefix}.") for ffn in ffns):
        model = model.get_submodule(prefix)  # the head costs most of a pass and holds no FFN
    device = next(model.parameters()).device
    rows = len(next(iter(inputs.values())))
    training = model.training
    try:
        model.eval()
        with _eager_experts(model), torch.no_grad(), _Watch(ffns, sums):
            for start in with_progress(range(0, rows, _BATCH), "read"):
                batch = {key: value[start : start + _BATCH] for key, value in inputs.items()}
                model(**{key: value.to(device) for key, value in batch.items()}, use_cache=False)
    finally:
        model.train(training)
    found = {name: total.moments() for name, total in sums.items()}
    for name, moments in found.items():
        if not torch.isfinite(moments.second_FF.diagonal()).all():
            raise UnsupportedModelError(
                f"the hidden units of `{name}` are NaN or infinite on this text, so it cannot "
                "serve as evidence. Load the model in a wider `dtype`, or use `evidence='weights'`."
            )
    return found


class MomentSums:
    """Sum up hidden units and their products.

    Units are taken around the mean of the first batch, so that products in float32 hold the
    variance also of a unit whose mean is a thousand times larger.
    """

    def __init__(self, second_FF: Tensor, first_F: Tensor) -> None:
        """Start from sums that are all zero, float64."""
        self.second_FF, self.first_F, self.tokens = second_FF, first_F, 0
        self.centre_F = first_F.float()

    @classmethod
    def zeros(cls, ffn: Ffn) -> Self:
        """Return empty sums for the hidden units of `ffn`, where its weights lie."""
        device = ffn.device
        first_F = torch.zeros(ffn.rows, dtype=torch.float64, device=device)
        return cls(first_F.new_zeros(ffn.rows, ffn.rows), first_F)

    def add(self, hidden_TF: Tensor) -> None:
        """Add hidden units `(…, F)` of any dtype."""
        hidden_TF = hidden_TF.detach().reshape(-1, hidden_TF.shape[-1]).float()
        if self.tokens == 0 and len(hidden_TF):
            self.centre_F = hidden_TF.mean(dim=0)
        hidden_TF = hidden_TF - self.centre_F
        self.second_FF += hidden_TF.T @ hidden_TF
        self.first_F += hidden_TF.sum(dim=0, dtype=torch.float64)
        self.tokens += len(hidden_TF)

    def moments(self) -> Moments:
        """Return the moments; the sums are used up."""
        count, centre_F = max(self.tokens, 1), self.centre_F.double()
        mean_F = self.first_F / count
        second_FF = self.second_FF.div_(count)
        second_FF.addr_(mean_F + centre_F, centre_F).addr_(centre_F, mean_F)
        return Moments(second_FF, mean_F + centre_F, self.tokens)


class _Watch(TorchFunctionMode):
    """See every product with a contract matrix, wherever a model computes it.

    The factor in front of the matrix is the hidden units. It is looked for by the memory of the
    matrix, so that a `Linear`, a `Conv1D` and one expert's slice of a tensor are the same to it.
    """

    def __init__(self, ffns: Sequence[Ffn], sums: dict[str, MomentSums]) -> None:
        super().__init__()
        self._by_storage: dict[int, list[Ffn]] = defaultdict(list)
        self._sums = sums
        for ffn in ffns:
            self._by_storage[ffn.contract.parameter.untyped_storage().data_ptr()].append(ffn)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [value for value in args if isinstance(value, Tensor)]
        for hidden, weight in pairwise(tensors):
            ffns = self._by_storage.get(weight.untyped_storage().data_ptr(), [])
            for ffn in ffns:
                with torch._C.DisableTorchFunctionSubclass():
                    self._see(ffn, hidden, weight)
        return func(*args, **(kwargs or {}))

    def _see(self, ffn: Ffn, hidden: Tensor, weight: Tensor) -> None:
        slot = ffn.contract
        first = slot.read(ffn.rows)
        if weight.dim() == 3 and slot.expert is not None and hidden.dim() == 3:
            self._sums[ffn.name].add(hidden[slot.expert])
        elif weight.dim() == 2 and weight.storage_offset() == first.storage_offset():
            self._sums[ffn.name].add(hidden)


@contextmanager
def _eager_experts(model: nn.Module) -> Iterator[None]:
    """Let experts multiply one at a time, so that each product can be seen."""
    key = "_experts_implementation"
    configs = {id(c): c for m in model.modules() if hasattr(c := getattr(m, "config", None), key)}
    previous = {number: getattr(config, key) for number, config in configs.items()}
    try:
        for config in configs.values():
            setattr(config, key, "eager")
        yield
    finally:
        for number, config in configs.items():
            setattr(config, key, previous[number])
