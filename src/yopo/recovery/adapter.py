"""The adapters themselves: put on a model, filled, merged into it or left."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from yopo.errors import PolicyFileError
from yopo.recovery.settings import RecoverySettings
from yopo.recovery.targets import Places


@dataclass(frozen=True, slots=True)
class Trained:
    """Hold the adapter that validation likes best.

    Attributes:
        weights: By the names of the model's parameters once adapters are put on.
        first: Validation loss in nats before training.
        loss: Validation loss with these weights.
        step: Where they were found; 0 where training did not help.
        waited: How often none better was found since.
    """

    weights: dict[str, Tensor]
    first: float
    loss: float
    step: int = 0
    waited: int = 0

    def save(self, file: Path) -> None:
        """Write everything into `file`, all or nothing."""
        told = {key: getattr(self, key) for key in ("first", "loss", "step", "waited")}
        partial = file.with_name(f".{file.name}")
        save_file(self.weights, partial, {key: repr(value) for key, value in told.items()})
        partial.replace(file)

    @classmethod
    def load(cls, file: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            PolicyFileError: If it is damaged.
        """
        try:
            with safe_open(file, "pt") as opened:
                told = opened.metadata()
                names = list(opened.keys())
                weights = {name: opened.get_tensor(name) for name in names}
            first, loss = float(told["first"]), float(told["loss"])
            return cls(weights, first, loss, int(told["step"]), int(told["waited"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise PolicyFileError(
                f"`{file}` is damaged: {error}. Delete `{file.parent}`, and the same call trains "
                "again what is missing."
            ) from error


def put_on(model: Any, places: Places, settings: RecoverySettings) -> Any:
    """Return `model` with fresh LoRA adapters, in float32, which change nothing yet."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(places.modules),
        target_parameters=list(places.parameters) or None,
        fan_in_fan_out=places.transposed,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # peft asks transformers under a name that newer ones deprecate.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return get_peft_model(model, config)


def save_adapter(adapted: Any, path: Path) -> None:
    """Write the adapters as peft does, without asking the hub whether embeddings have grown."""
    adapted.save_pretrained(path, save_embedding_layers=False)


def read_weights(adapted: Any) -> dict[str, Tensor]:
    """Return copies of the weights of the adapters, on the CPU."""
    return {
        name: parameter.detach().to("cpu", copy=True)
        for name, parameter in adapted.named_parameters()
        if parameter.requires_grad
    }


def write_weights(adapted: Any, weights: Mapping[str, Tensor]) -> None:
    """Fill the adapters with what `read_weights` has returned."""
    parameters = dict(adapted.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].copy_(weight)
