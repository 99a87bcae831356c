"""Load pruned models, those with widths that their config cannot express included."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from yopo.adapters import find_ffns
from yopo.adapters.attention import find_attention_units
from yopo.errors import InvalidArgumentError
from yopo.plan import PruningPlan
from yopo.shards import read_header
from yopo.surgery import cut_rows
from yopo.upkeep import WIDTHS_KEY

_WAY_OUT = (
    "Where the code of a model is no part of transformers, load it yourself and pass the model: "
    "`PolicyPruner().fit(model).prune(model)`; one that was pruned to unequal widths loads with "
    "`yopo.load(path, model_class=…)`."
)


def load(source: str | Path, *, model_class: type[nn.Module] | None = None, **kwargs: Any) -> Any:
    """Load a model, one that yopo pruned to unequal widths included.

    A model of one width is an ordinary checkpoint, and this is `from_pretrained` of its class. A
    model with unequal widths is built by the same class and resized before its weights arrive.

    Args:
        source: A folder that `save_pretrained` wrote, or a model on the hub.
        model_class: Its class, a `PreTrainedModel` of your own; by default that of transformers
            which the config names.
        **kwargs: Passed on to `from_pretrained`: `dtype`, `device_map` and so on.

    Returns:
        The model, an instance of that class.

    Raises:
        InvalidArgumentError: If the folder holds no config, or one that transformers cannot use,
            names no class of transformers, or gives widths that the model does not have; if its
            weights are damaged; or if `model_class` is no class of models.
        OSError: If there is no such folder and no such model on the hub.

    Example:
        >>> model = yopo.load("llama-pruned", dtype="auto")
    """
    its_class: Any = model_class
    if its_class is None:
        config, its_class, widths = read_config(source)
    else:
        config, widths = _read_own_config(source, its_class)
    try:
        if not widths:
            return its_class.from_pretrained(source, **kwargs)
        model = _resized_class(its_class, widths).from_pretrained(source, **kwargs)
    except SafetensorError as error:
        for file in sorted(Path(source).glob("*.safetensors")):
            read_header(file)  # tells which one is damaged
        raise InvalidArgumentError(
            f"the weights of `{source}` are damaged: {error}. Download or save them again."
        ) from error
    except (OSError, InvalidArgumentError):
        raise
    except Exception:
        build_on_meta(config, its_class, widths, dtype=torch.float32)  # tells what is unfit
        raise
    model.__class__ = its_class
    return model


def _read_own_config(source: str | Path, model_class: Any) -> tuple[Any, dict[str, int]]:
    """Return the config of a model of a known class, and the widths that no field of it expresses.

    Raises:
        InvalidArgumentError: If the class is none of models.
        OSError: If there is no config.
    """
    config_class = getattr(model_class, "config_class", None)
    if config_class is None:
        raise InvalidArgumentError(
            f"`model_class` must be a PreTrainedModel with a `config_class`, got {model_class!r}."
        )
    config = config_class.from_pretrained(source)
    return config, getattr(config, WIDTHS_KEY, None) or {}


def read_config(source: str | Path) -> tuple[Any, Any, dict[str, int]]:
    """Return the config of a model, its class, and the widths that no config field expresses.

    No code is run that comes with a model.

    Args:
        source: As for `load`.

    Raises:
        InvalidArgumentError: If the folder holds no config, or one that transformers cannot use, or
            names no class of transformers.
        OSError: If there is no such folder and no such model on the hub.
    """
    import transformers

    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise InvalidArgumentError(f"`{source}` holds no model: `config.json` is missing.")
    try:
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    except OSError:
        raise
    except Exception as error:  # each kind of damage has another type
        raise InvalidArgumentError(
            f"transformers cannot use the config of `{source}`: {_told(error)}. {_WAY_OUT}"
        ) from error
    names = [None] if config.architectures in (None, []) else config.architectures
    if not isinstance(names, list):
        raise InvalidArgumentError(
            f"`architectures` in the config of `{source}` must be a list of names, got {names!r}."
        )
    model_class = getattr(transformers, str(names[0]), None)
    if model_class is None:
        raise InvalidArgumentError(
            f"the config of `{source}` names the architecture {names[0]!r}, which transformers "
            f"does not have. {_WAY_OUT}"
        )
    return config, model_class, getattr(config, WIDTHS_KEY, None) or {}


def _told(error: Exception) -> str:
    """Return what an error of transformers says, on one line."""
    if isinstance(error, KeyError):  # says nothing but the key
        return f"{error} is unknown"
    return " ".join(" ".join(str(error).splitlines()[:2]).split()).rstrip(".")


def build_on_meta(
    config: Any, model_class: Any, widths: dict[str, int], *, dtype: torch.dtype
) -> Any:
    """Return a model without weights, on the meta device, unequal widths and all.

    Args:
        config: Its config.
        model_class: Its class.
        widths: Rows of FFNs that no config field expresses, by name.
        dtype: Dtype of its parameters.

    Raises:
        InvalidArgumentError: If the class cannot be built from such a config, or has not those
            FFNs.
    """
    built = _resized_class(model_class, widths) if widths else model_class
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = built._from_config(config, dtype=dtype)
    except InvalidArgumentError:
        raise
    except Exception as error:  # each kind of damage has another type
        raise InvalidArgumentError(
            f"{model_class.__name__} cannot be built from its config: {_told(error)}."
        ) from error
    model.__class__ = model_class
    return model.eval()


def _resized_class(model_class: type[nn.Module], widths: dict[str, int]) -> Any:
    """Return a class that builds `model_class` and cuts its FFNs to `widths` at once."""

    def build(self: nn.Module, config: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, config, *args, **kwargs)
        self.__class__ = model_class
        try:
            _resize(self, widths)
        finally:
            self.__class__ = resized

    resized = type(model_class.__name__, (model_class,), {"__init__": build})
    resized.__module__ = model_class.__module__
    return resized


def _resize(model: nn.Module, widths: dict[str, int]) -> None:
    """Cut the FFNs of a freshly built model to `widths`; its weights do not matter yet."""
    ffns = find_ffns(model, prove_unknown=False)
    if not set(widths) <= {ffn.name for ffn in ffns}:
        ffns += find_attention_units(model)
    rows = {ffn.name: ffn.rows for ffn in ffns}
    if not isinstance(widths, dict) or not all(
        isinstance(width, int) and 0 < width <= rows.get(name, 0) for name, width in widths.items()
    ):
        raise InvalidArgumentError(
            f"`{WIDTHS_KEY}` in the config of {type(model).__name__} do not fit its FFNs, which "
            f"run from `{ffns[0].name}` to `{ffns[-1].name}`."
        )
    kept = {ffn.name: torch.arange(widths.get(ffn.name, ffn.rows), device="cpu") for ffn in ffns}
    setattr(model.config, WIDTHS_KEY, None)
    cut_rows(model, PruningPlan(kept=kept, rows=rows, ratio=0.0), ffns)
