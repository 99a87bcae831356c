"""The fifteen functions of Pruner-Zero's search space, each in two ways.

`compat` computes what the reference implementation computes, overflow and NaN included. `safe`
computes the same wherever that is well defined and far from overflow, and is finite everywhere.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

PrimitiveSet = Literal["safe", "compat"]

LARGEST = 1e37
"""What `safe` values are clamped to: sums and ranges of two of them are finite in float32."""

_LOG_SHIFT = 1e-3
_COMPAT_EXPONENT = 100.0
_SAFE_EXPONENT = 80.0
_SMALLEST_NORM = 1e-12
_EXPONENTS = 126


@dataclass(frozen=True, slots=True)
class Primitive:
    """Hold one function of the search space.

    Attributes:
        arity: How many operands it takes, 1 or 2.
        compat: What the reference computes.
        safe: The same without overflow, division by zero and NaN.
    """

    arity: int
    compat: Callable[..., Tensor]
    safe: Callable[..., Tensor]

    def function(self, primitives: PrimitiveSet) -> Callable[..., Tensor]:
        """Return the function of one of the two sets."""
        return self.safe if primitives == "safe" else self.compat


def _bounded(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return `function` with its values clamped to what further arithmetic can bear."""

    def bounded(*operands: Tensor) -> Tensor:
        return function(*operands).clamp_(-LARGEST, LARGEST)

    return bounded


def _plain(arity: int, function: Callable[..., Tensor]) -> Primitive:
    """Return a primitive that is unsafe only where it overflows."""
    return Primitive(arity, function, _bounded(function))


def _log(a: Tensor) -> Tensor:
    return torch.log(a.abs() + _LOG_SHIFT)


def _min_max(a: Tensor) -> Tensor:
    low, high = a.aminmax()
    return (a - low) / (high - low)


def _safe_min_max(a: Tensor) -> Tensor:
    scaled, _ = _scaled(a)
    low, high = scaled.aminmax()
    return (scaled - low) / torch.where(high > low, high - low, 1.0)


def _z_score(a: Tensor) -> Tensor:
    return (a - a.mean()) / a.std()


def _safe_z_score(a: Tensor) -> Tensor:
    if a.numel() < 2:
        return torch.zeros_like(a)
    scaled, _ = _scaled(a)
    deviation = scaled.std()
    centred = scaled - scaled.mean()
    return centred / deviation if deviation > 0 else torch.zeros_like(a)


def _divide_by_norm(a: Tensor, b: Tensor) -> Tensor:
    a, b = _spread(a, b)
    divided: Tensor = a / torch.linalg.vector_norm(b)
    return divided


def _safe_divide_by_norm(a: Tensor, b: Tensor) -> Tensor:
    a, b = _spread(a, b)
    scaled, exponent = _scaled(b)
    norm = torch.linalg.vector_norm(scaled) + _SMALLEST_NORM
    return torch.ldexp(a / norm, -exponent).clamp_(-LARGEST, LARGEST)


def _spread(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return views of both in the shape to which they broadcast."""
    a, b = torch.broadcast_tensors(a, b)  # type: ignore[no-untyped-call]
    return a, b


def _scaled(a: Tensor) -> tuple[Tensor, Tensor]:
    """Return `a` over a power of two, so that sums of its squares do not overflow, and its log."""
    low, high = a.aminmax()
    exponent = torch.frexp(torch.maximum(high, -low)).exponent.clamp(-_EXPONENTS, _EXPONENTS)
    return torch.ldexp(a, -exponent), exponent


PRIMITIVES: Mapping[str, Primitive] = MappingProxyType(
    {
        "sqr": _plain(1, lambda a: a * a),
        "neg": _plain(1, lambda a: -a),
        "abs": _plain(1, torch.abs),
        "log": _plain(1, _log),
        "exp": Primitive(
            1,
            lambda a: torch.exp(a.clamp(max=_COMPAT_EXPONENT)),
            lambda a: torch.exp(a.clamp(-_SAFE_EXPONENT, _SAFE_EXPONENT)),
        ),
        "sqrt": _plain(1, lambda a: a.abs().sqrt()),
        "tanh": _plain(1, torch.tanh),
        "pow": _plain(1, lambda a: a**2),
        "skp": Primitive(1, lambda a: a, lambda a: a),
        "mms": Primitive(1, _min_max, _safe_min_max),
        "zsn": Primitive(1, _z_score, _safe_z_score),
        "add": _plain(2, lambda a, b: a + b),
        "sub": _plain(2, lambda a, b: a - b),
        "mul": _plain(2, lambda a, b: a * b),
        "div": Primitive(2, _divide_by_norm, _safe_divide_by_norm),
    }
)
"""By name, in the order of the reference. `div` divides by the Frobenius norm of its second
operand, spread to the shape of both; `mms` and `zsn` take minimum, maximum, mean and unbiased
standard deviation over the whole tensor; `pow` is the same function as `sqr`."""
