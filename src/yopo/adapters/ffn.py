"""The view of one FFN that everything else works on: which parameters hold its rows, and where."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from fractions import Fraction
from typing import cast

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """Say where the rows of one FFN lie in one parameter.

    Row `r` of the FFN is entry `start + step * r` along `axis` of the parameter, or of
    `parameter[expert]` where one parameter holds all experts of a layer. A fused `gate_up_proj`
    is two slots of the same parameter: its halves (`start` 0 and F, `step` 1), or its even and
    odd rows (`start` 0 and 1, `step` 2).
    """

    module: nn.Module
    name: str
    axis: int
    start: int = 0
    step: int = 1
    expert: int | None = None

    @property
    def parameter(self) -> nn.Parameter:
        """Return the parameter as it is now."""
        return cast(nn.Parameter, getattr(self.module, self.name))

    def read(self, rows: int) -> Tensor:
        """Return a view `(F, …)` of the `rows` rows, rows first, without copying."""
        tensor = self.parameter.detach()
        if self.expert is not None:
            tensor = tensor[self.expert]
        stop = self.start + self.step * rows
        return tensor.movedim(self.axis, 0)[self.start : stop : self.step]

    def indices(self, kept_K: Tensor) -> Tensor:
        """Return the entries along `axis` that belong to the rows `kept_K`."""
        return self.start + self.step * kept_K


@dataclass(frozen=True, slots=True)
class WidthField:
    """Name the config field that sets the width of an FFN.

    Attributes:
        path: Names of the nested configs that lead to the field, `("text_config",)` or empty.
        key: The field, `"intermediate_size"`.
        per_row: What the field grows by when the FFN grows by one row: 1, but 1/2 for a shared
            expert that is built twice as wide as the field says.
    """

    path: tuple[str, ...]
    key: str
    per_row: Fraction = Fraction(1)

    def __str__(self) -> str:
        """Return the field as its owner would write it, `text_config.intermediate_size`."""
        return ".".join((*self.path, self.key))


@dataclass(frozen=True, slots=True, eq=False)
class Ffn:
    """Show one FFN: the matrices that its rows run through.

    Attributes:
        name: Path of the FFN in the model; `….experts.3` for the fourth expert of a layer whose
            experts share one tensor.
        path: Path of the module that holds it, which may be the whole decoder layer.
        rows: Number of hidden units, F.
        expand: Matrices from d_model to d_ff, the one inside the activation first (gate and up,
            or fc1).
        contract: Matrix from d_ff back to d_model.
        vectors: One-dimensional parameters with an entry a row: biases, gains of an inner norm.
        norm: The norm whose output the FFN reads, where the layout tells.
        scored: How many of the expand matrices PruneNet's scorer looks at, from the first.
        width: The config field that sets its width, None where the architecture fixes it.
        known: Whether a built-in layout found it; whatever else found it has to be proved.
        loaded: Context in which its parameters, and those of its norm, are there to be read. Only
            an FFN whose weights lie on a disk has more to do than nothing. Threads may share it.
    """

    name: str
    path: str
    rows: int
    expand: tuple[Slot, ...]
    contract: Slot
    vectors: tuple[Slot, ...] = ()
    norm: nn.Module | None = None
    scored: int = 1
    width: WidthField | None = None
    known: bool = True
    loaded: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    def device(self) -> torch.device:
        """Return where its weights are worked on: the CPU for those that lie on a disk."""
        device = self.contract.parameter.device
        return torch.device("cpu") if device.type == "meta" else device

    @property
    def is_on_disk(self) -> bool:
        """Tell whether its weights are there only inside `loaded`."""
        return self.contract.parameter.is_meta

    @property
    def modules(self) -> list[nn.Module]:
        """Return every module whose own parameters the FFN needs, those of its norm included."""
        holders = {id(slot.module): slot.module for slot in self.slots}
        return [*holders.values(), *(self.norm.modules() if self.norm is not None else ())]

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Return every place where a row of this FFN is stored."""
        return (*self.expand, self.contract, *self.vectors)

    def expand_weights(self) -> list[Tensor]:
        """Return the expand matrices, each as a view `(F, D)`."""
        return [slot.read(self.rows) for slot in self.expand]

    @contextmanager
    def gate(self) -> Iterator[Tensor]:
        """Give the first expand matrix (gate, or fc1) as a view `(F, D)`, loaded."""
        with self.loaded():
            yield self.expand_weights()[0]

    def contract_weight(self) -> Tensor:
        """Return the columns of the contract matrix as a view `(F, D)`."""
        return self.contract.read(self.rows)

    @property
    def bias_parameter(self) -> nn.Parameter | None:
        """Return the parameter with the contract matrix's bias, or None; experts may share it."""
        slot = self.contract
        name = "bias" if slot.name == "weight" else f"{slot.name}_bias"
        bias = getattr(slot.module, name, None)
        return bias if isinstance(bias, nn.Parameter) else None

    def contract_bias(self) -> Tensor | None:
        """Return the bias `(D,)` of the contract matrix as a view, None where it has none."""
        bias, expert = self.bias_parameter, self.contract.expert
        if bias is None:
            return None
        return bias.detach() if expert is None else bias.detach()[expert]

    @property
    def parameters_per_row(self) -> int:
        """Return how many numbers go when one row goes."""
        return sum(slot.read(self.rows)[0].numel() for slot in self.slots)

    @property
    def bytes_per_row(self) -> int:
        """Return how many bytes go when one row goes."""
        return sum(
            slot.read(self.rows)[0].numel() * slot.parameter.element_size() for slot in self.slots
        )


def norm_gain_and_bias(ffn: Ffn, width: int) -> tuple[Tensor, Tensor]:
    """Return the gain and the bias, each `(D,)` in float32, of the norm that feeds `ffn`.

    They are read off the norm's own arithmetic, so that it does not matter whether a norm stores
    its gain as `w` or as `1 + w`: a vector of mean 0 and root mean square 1 comes out of any norm
    as gain · x + bias. Ones and zeros where no norm is known.
    """
    device = ffn.contract.parameter.device
    gain_D = torch.ones(width, device=device, dtype=torch.float32)
    bias_D = torch.zeros_like(gain_D)
    norm = ffn.norm
    if norm is None or any(parameter.is_meta for parameter in norm.parameters()):
        return gain_D, bias_D
    anchor = next(norm.parameters(), ffn.contract.parameter)
    probe_D = torch.ones(width, device=anchor.device, dtype=anchor.dtype)
    probe_D[1::2] = -1.0
    with torch.no_grad():
        plus_D, minus_D = norm(probe_D[None])[0].float(), norm(-probe_D[None])[0].float()
    return (plus_D - minus_D) / 2 * probe_D.float(), (plus_D + minus_D) / 2


def unique_parameters(ffns: Iterable[Ffn]) -> list[nn.Parameter]:
    """Return every parameter that holds rows of `ffns`, once each, in order."""
    seen: dict[int, nn.Parameter] = {}
    for ffn in ffns:
        for slot in ffn.slots:
            seen.setdefault(id(slot.parameter), slot.parameter)
    return list(seen.values())
