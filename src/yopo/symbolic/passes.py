"""Run a model layer by layer, whatever it hands from one layer to the next.

Metrics are applied to one layer after another, each seeing what the pruned ones before it put out.
Every batch is a forward pass of the model itself, in a thread that waits in front of each layer, so
nothing needs to be known of masks, positions or caches. Only one thread runs at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from copy import deepcopy
from threading import Semaphore, Thread, current_thread
from typing import Any

import torch
from torch import Tensor, nn

from yopo.errors import UnsupportedModelError
from yopo.symbolic.matrices import Block
from yopo.watching import eager_experts, without_head
from yopo.writing import with_progress

BATCH = 16
"""Sequences of a pass."""

Run = Callable[[], None]
"""Runs one layer on what every batch brings to it; what it puts out is thrown away."""


def walk_blocks(
    model: nn.Module, blocks: Sequence[Block], inputs: dict[str, Tensor]
) -> Iterator[tuple[Block, Run]]:
    """Yield the layers in the order in which `model` runs them, and what runs each.

    Whatever is done to a layer before the next is asked for, the later ones see. Dropout is off and
    no gradients are kept.

    Args:
        model: The model that holds `blocks`; afterwards in the mode that it was in.
        blocks: Its layers. One that is run again and again is yielded the first time.
        inputs: Keyword arguments of the model `(N, …)`, batch first.
    """
    device = next(model.parameters()).device
    body = without_head(model, [block.name for block in blocks])
    waiting = {id(block.module): block for block in blocks}
    training = model.training
    passes = [
        _Pass(body, {key: value.to(device) for key, value in batch.items()})
        for batch in batches_of(inputs)
    ]
    with ExitStack() as stack:
        stack.callback(model.train, training)
        model.eval()
        stack.enter_context(eager_experts(model))
        for block in blocks:
            stack.enter_context(block.module.register_forward_pre_hook(_wait, with_kwargs=True))
        for each in passes:
            stack.callback(each.abandon)
        for _ in with_progress(range(len(blocks)), "layer", unit="layer"):
            module = _advance(passes, waiting)
            if module is None:
                return
            yield waiting.pop(id(module)), lambda: _run(passes)


def walk_all_blocks(
    model: nn.Module, blocks: Sequence[Block], inputs: dict[str, Tensor]
) -> Iterator[tuple[Block, Run]]:
    """Yield what `walk_blocks` does, and check in the end that it came by everywhere.

    Args:
        model: As for `walk_blocks`.
        blocks: As for `walk_blocks`.
        inputs: As for `walk_blocks`.

    Raises:
        UnsupportedModelError: If there are layers that the text does not reach.
    """
    missing = {id(block): block for block in blocks}
    for block, run in walk_blocks(model, blocks, inputs):
        del missing[id(block)]
        yield block, run
    for block in missing.values():
        raise UnsupportedModelError(
            f"no token reaches `{block.name}`, so nothing is known of its inputs. Use a metric "
            'without X, such as "magnitude".'
        )


def batches_of(inputs: dict[str, Tensor], size: int = BATCH) -> list[dict[str, Tensor]]:
    """Return the inputs in batches of at most `size` sequences."""
    split = {key: torch.split(value, size) for key, value in inputs.items()}
    count = len(next(iter(split.values())))
    return [{key: parts[n] for key, parts in split.items()} for n in range(count)]


def _advance(passes: Sequence["_Pass"], waiting: dict[int, Block]) -> nn.Module | None:
    """Let all passes go on to a layer that has not been visited, None where there is none."""
    while True:
        for each in passes:
            each.advance()
        module = passes[0].module
        if module is None or id(module) in waiting:
            return module


def _run(passes: Sequence["_Pass"]) -> None:
    with torch.no_grad():
        for each in passes:
            assert each.module is not None
            each.module(*each.args, **{key: _own(value) for key, value in each.kwargs.items()})


def _own(value: Any) -> Any:
    """Return a copy of a cache, which a layer that runs once more would write into once more."""
    from transformers import Cache

    return deepcopy(value) if isinstance(value, Cache) else value


class _AbandonedError(Exception):
    """End the thread of a pass that nobody waits for any more."""


class _Pass(Thread):
    """One forward pass, which waits in front of every layer."""

    def __init__(self, model: nn.Module, batch: dict[str, Tensor]) -> None:
        super().__init__(name="yopo-pass", daemon=True)
        self._model, self._batch = model, batch
        self._go, self._arrived = Semaphore(0), Semaphore(0)
        self._error: BaseException | None = None
        self._is_abandoned = False
        self.module: nn.Module | None = None
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}

    def run(self) -> None:
        """Run the model; what goes wrong is raised in the thread that waits."""
        try:
            with torch.no_grad():
                self._go.acquire()
                self._model(**self._batch, use_cache=False)
        except _AbandonedError:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.module = None
            self._arrived.release()

    def wait(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Wait in front of a layer, in this thread, until another lets it go on."""
        self.module, self.args, self.kwargs = module, args, kwargs
        self._arrived.release()
        self._go.acquire()
        if self._is_abandoned:
            raise _AbandonedError

    def advance(self) -> None:
        """Let it go on to the next layer, and wait until it is there."""
        if not self.ident:
            self.start()
        self._go.release()
        self._arrived.acquire()
        if self._error is not None:
            raise self._error

    def abandon(self) -> None:
        """End it, wherever it is."""
        self._is_abandoned = True
        self._go.release()
        if self.ident:
            self.join()


def _wait(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    thread = current_thread()
    if isinstance(thread, _Pass):
        thread.wait(module, args, kwargs)
