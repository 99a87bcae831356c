"""What must hold of a call before anything is written or trained.

Shapes: B windows, W tokens a window, V vocabulary.
"""

import importlib.util
from typing import Any

import torch
from torch import nn

from yopo.adapters import check_weights, find_ffns
from yopo.errors import InvalidArgumentError, UnsupportedModelError, missing_extra
from yopo.ranks import rank_and_count
from yopo.recovery.settings import TARGETS, RecoverySettings
from yopo.recovery.targets import Places, find_places
from yopo.recovery.texts import Data, is_self, readable_length
from yopo.writing import can_write


def check_installed() -> None:
    """Check that what recovery is built on is there.

    Raises:
        YopoError: If it is not.
    """
    for name in ("peft", "accelerate"):
        if importlib.util.find_spec(name) is None:
            raise missing_extra(f"`recover` needs {name}", "recover")


def check_call(
    model: Any, data: Data, teacher: Any, settings: RecoverySettings, targets: str, seed: int
) -> Places:
    """Check what can be checked before anything is written, and return where adapters go.

    Raises:
        InvalidArgumentError: If an argument is outside its range.
        UnsupportedModelError: If a model cannot do its part.
    """
    if targets not in TARGETS:
        raise InvalidArgumentError(
            f'`targets` must be "both", "attention" or "ffn", got {targets!r}.'
        )
    if not isinstance(seed, int) or seed < 0:
        raise InvalidArgumentError(f"`seed` must be a whole number of at least 0, got {seed!r}.")
    for name, given in (("model", model), ("teacher", teacher)):
        if given is not None and not isinstance(given, nn.Module):
            raise InvalidArgumentError(
                f"`{name}` must be a model in memory, got {given!r}. Load it with `yopo.load`."
            )
    ffns = find_ffns(model)
    check_weights(ffns)
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"`recover` trains causal language models, got {type(model).__name__}. Pass the model "
            "with its language-model head."
        )
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1 and rank_and_count()[1] > 1:
        raise UnsupportedModelError(
            "a model that `device_map` spreads over devices is trained by one process: run without "
            "`torchrun`, or load it onto one device a rank."
        )
    if teacher is not None:
        _check_teacher(model, teacher)
    if is_self(data) and teacher is None:
        raise InvalidArgumentError(
            "`teacher` is needed: `data='self'` is text that the dense model writes. Pass the "
            "model as it was before it was pruned, or text as `data`."
        )
    if is_self(data) and not can_write(teacher):
        raise UnsupportedModelError(
            f"`teacher`, a {type(teacher).__name__}, cannot write text. Pass text as `data`."
        )
    places = find_places(model, ffns, targets)
    if places.parameters and settings.dropout > 0:
        raise InvalidArgumentError(
            f"`dropout` must be 0 for experts that share a tensor, such as "
            f"`{places.parameters[0]}`, got {settings.dropout}. Use "
            "`dataclasses.replace(settings, dropout=0.0)`, or `targets='attention'`."
        )
    return places


def check_logits(model: Any, name: str) -> None:
    """Check that a model computes numbers, before it is trained or teaches.

    Args:
        model: The model.
        name: The argument that it was passed as.

    Raises:
        UnsupportedModelError: If it gives NaN or infinity.
    """
    embeddings = model.get_input_embeddings().weight
    # Kernels of attention that are made for a few tokens may lose NaN.
    length = readable_length(model, 64)
    ids_BW = torch.arange(length, device=embeddings.device)[None] % len(embeddings)
    with torch.no_grad():
        logits_BWV = model(input_ids=ids_BW, use_cache=False).logits
    if logits_BWV.isnan().any() or logits_BWV.isposinf().any():
        raise UnsupportedModelError(
            f"`{name}` gives logits that are NaN or infinite. Mend the checkpoint, or load it in a "
            "wider `dtype`."
        )


def _check_teacher(model: Any, teacher: Any) -> None:
    """Check that the teacher is another model with the same vocabulary.

    Raises:
        InvalidArgumentError: If it is not.
    """
    own = {id(parameter) for parameter in model.parameters()}
    if any(id(parameter) in own for parameter in teacher.parameters()):
        raise InvalidArgumentError(
            "`teacher` is the model itself, or shares weights with it. Load the dense model once "
            "more, or keep a `copy.deepcopy(model)` before you prune."
        )
    words, known = (len(each.get_input_embeddings().weight) for each in (model, teacher))
    if words != known:
        raise InvalidArgumentError(
            f"`teacher` knows {known} tokens and the model {words}: it is not the model that was "
            "pruned."
        )
