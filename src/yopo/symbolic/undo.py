"""Put weights back if what was begun cannot be finished."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from yopo.surgery import interrupts_held

Change = Callable[[Tensor, Tensor], None]


@contextmanager
def put_back_on_error() -> Iterator[Change]:
    """Give a function that writes new values into a weight, and undo all that on an error.

    What the weights were is held on the CPU until the end: of one whose values become zero or
    stay, only those that become zero.
    """
    changed: list[tuple[Tensor, Tensor, bool]] = []

    def change(weight: Tensor, new: Tensor) -> None:
        is_masked = bool(((new == weight) | (new == 0)).all())
        old = (weight[new == 0] if is_masked else weight).to("cpu", copy=True)
        with interrupts_held():
            changed.append((weight, old, is_masked))
            weight.copy_(new)

    try:
        yield change
    except BaseException:
        with interrupts_held():
            for weight, old, is_masked in reversed(changed):
                if is_masked:
                    weight[weight == 0] = old.to(weight.device)
                else:
                    weight.copy_(old)
        raise
