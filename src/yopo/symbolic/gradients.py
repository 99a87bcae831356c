"""G: how much the loss on a text changes with each weight.

Shapes: N sequences, W tokens a sequence, V vocabulary.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from yopo.errors import UnsupportedModelError
from yopo.memory import memory_left
from yopo.precision import in_float32
from yopo.symbolic.passes import batches_of
from yopo.watching import eager_experts
from yopo.writing import with_progress

SCALE = 100.0
"""By what the reference multiplies gradients."""

_SHARE = 1 / 2
"""Share of the memory left on a device that sums of squares may take at a time."""


def read_gradients(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], inputs: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return 100 · √(Σ gₙ²) of each parameter, in its shape, float32, on the CPU.

    gₙ is the gradient of the mean cross-entropy of sequence n. Differs from the reference, which
    computes in float16 and loses gradients that are small: here they are computed in bfloat16 or
    float32 and summed in float32, and dropout is off.

    Args:
        model: A causal language model, or an encoder-decoder; it is as it was afterwards.
        parameters: Of which parameters, by name. As many at a time as their sums fit into memory.
        inputs: `input_ids` `(N, W)`, and `decoder_input_ids` for an encoder-decoder.

    Raises:
        UnsupportedModelError: If the model predicts no next tokens, its loss has no gradients, or
            they are not finite.
    """
    found: dict[str, Tensor] = {}
    with _ready(model):
        groups = list(_groups(parameters))
        for number, group in enumerate(groups, start=1):
            told = "gradients" if len(groups) == 1 else f"gradients {number}/{len(groups)}"
            found |= _read_group(model, group, inputs, told)
    for name, gradient in found.items():
        if not torch.isfinite(gradient).all():
            raise UnsupportedModelError(
                f"the gradients of `{name}` are NaN or infinite on this text. Load the model in a "
                "wider `dtype`."
            )
    return found


def _read_group(
    model: nn.Module, group: Mapping[str, nn.Parameter], inputs: dict[str, Tensor], told: str
) -> dict[str, Tensor]:
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in group.items()}
    device = next(model.parameters()).device
    with ExitStack() as stack:
        for name, parameter in group.items():
            stack.callback(parameter.requires_grad_, False)
            hook = partial(_add_square, sums[name])
            handle = parameter.requires_grad_().register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            stack.callback(handle.remove)
        for batch in with_progress(batches_of(inputs, 1), told):
            loss = _loss(model, {key: ids.to(device) for key, ids in batch.items()})
            if loss.grad_fn is None:
                raise UnsupportedModelError(
                    f"the way in which {type(model).__name__} computes its loss hides from torch "
                    "what weights that depends on. Use a metric without G."
                )
            loss.backward()  # type: ignore[no-untyped-call]
    return {name: total.sqrt_().mul_(SCALE).cpu() for name, total in sums.items()}


def _add_square(total: Tensor, parameter: Tensor) -> None:
    """Add the square of a gradient, and free it before the next one comes."""
    gradient = parameter.grad
    assert gradient is not None
    parameter.grad = None
    gradient = gradient.float()
    total.addcmul_(gradient, gradient)


def _loss(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Return the mean cross-entropy of the next tokens of one sequence."""
    logits = getattr(model(**inputs, use_cache=False), "logits", None)
    ids = inputs.get("decoder_input_ids", inputs["input_ids"])
    if not isinstance(logits, Tensor) or logits.shape[:-1] != ids.shape:
        raise no_gradients(model)
    targets = ids[:, 1:].to(logits.device)
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten())


def no_gradients(model: nn.Module) -> UnsupportedModelError:
    """Return the error that says what kind of model has gradients to look at."""
    return UnsupportedModelError(
        f"{type(model).__name__} predicts no next tokens, so there is no loss to take gradients "
        "of. Pass the model with its language-model head, or use a metric without G."
    )


def _groups(parameters: Mapping[str, nn.Parameter]) -> Iterator[dict[str, nn.Parameter]]:
    """Split the parameters into runs whose sums fit into memory, wherever each lies."""
    devices = {parameter.device for parameter in parameters.values()}
    spare = {device: _SHARE * memory_left(device) for device in devices}
    group: dict[str, nn.Parameter] = {}
    left = dict(spare)
    for name, parameter in parameters.items():
        size = 4 * parameter.numel()
        if group and left[parameter.device] < size:
            yield group
            group, left = {}, dict(spare)
        group[name] = parameter
        left[parameter.device] -= size
    if group:
        yield group


@contextmanager
def _ready(model: nn.Module) -> Iterator[None]:
    """Let a model compute gradients of what is asked for alone, and put it back."""
    flags = [
        (parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()
    ]
    training = model.training
    try:
        model.eval().requires_grad_(False)
        with eager_experts(model), in_float32(model, float16_everywhere=True):
            yield
    finally:
        model.train(training)
        for parameter, requires_grad, gradient in flags:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
