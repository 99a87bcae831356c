"""What training changes on the way and has to put back: modules, modes, precision."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

Undo = Callable[[], None]


@contextmanager
def put_back(*undo: Undo) -> Iterator[None]:
    """Undo what has been done since, whatever happens."""
    with ExitStack() as stack:
        for each in reversed(undo):
            stack.callback(each)
        yield


@contextmanager
def put_back_on_error(*undo: Undo) -> Iterator[None]:
    """Undo what has been done since, should it end in an error."""
    try:
        yield
    except BaseException:
        for each in undo:
            each()
        raise


def remember_state(model: Any) -> Undo:
    """Return what puts back modes, `requires_grad`, device and dtype, and the config's cache."""
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(p, p.requires_grad, p.device, p.dtype) for p in model.parameters()]
    buffers = [(buffer, buffer.device, buffer.dtype) for buffer in model.buffers()]
    caches = [(c, c.use_cache) for c in _configs(model) if hasattr(c, "use_cache")]
    hooked = bool(getattr(model, "_require_grads_hooks", None))

    def undo() -> None:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad, device, dtype in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.data = parameter.data.to(device, dtype)
        for buffer, device, dtype in buffers:
            buffer.data = buffer.data.to(device, dtype)
        for config, use_cache in caches:
            config.use_cache = use_cache
        if not hooked and hasattr(model, "disable_input_require_grads"):
            model.disable_input_require_grads()

    return undo


def remember_values(parameters: Iterable[nn.Parameter]) -> Undo:
    """Return what puts back the values of parameters, which the CPU keeps until then."""
    values = [(parameter, parameter.detach().to("cpu", copy=True)) for parameter in parameters]

    def undo() -> None:
        for parameter, value in values:
            parameter.data.copy_(value)

    return undo


def remember_modules(model: Any) -> Undo:
    """Return what puts back the modules that peft replaces, even half of them."""
    children = [(module, dict(module._modules)) for module in model.modules()]

    def undo() -> None:
        for module, held in children:
            module._modules.clear()
            module._modules.update(held)
        model.__dict__.pop("peft_config", None)

    return undo


@contextmanager
def verbosity_put_back() -> Iterator[None]:
    """Put back how much transformers logs, which the Trainer sets on other ranks."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


@contextmanager
def activations_checkpointed(model: Any, wanted: bool) -> Iterator[None]:
    """Let `model` compute activations twice instead of keeping them, unless it does already."""
    flagged = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
    if not wanted or any(module.gradient_checkpointing for module in flagged):
        yield
        return
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)()
    try:
        yield
    finally:
        for module in flagged:
            module.gradient_checkpointing = False


def _configs(model: Any) -> list[Any]:
    """Return the config of `model` and, where it has one of its own, that of its text part."""
    config = model.config
    text = config.get_text_config()
    return [config] if text is config else [config, text]
