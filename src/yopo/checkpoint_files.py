"""Where the files of a checkpoint are."""

import json
from pathlib import Path

from yopo.errors import InvalidArgumentError, UnsupportedModelError
from yopo.loading import read_config

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def folder_of(name: str | Path) -> Path:
    """Return a folder by its name, or that to which a model on the hub has been downloaded.

    Args:
        name: The folder, or the model.

    Raises:
        OSError: If there is no such folder and no such model on the hub.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists():
        raise OSError(f"`{name}` is a file. Name the folder that holds the model.")
    try:
        return Path(snapshot_download(str(name)))
    except HFValidationError as error:
        raise OSError(
            f"there is no folder `{name}`, and no model on the hub is called so."
        ) from error
    except LocalEntryNotFoundError as error:
        raise OSError(
            f"there is no folder `{name}`, and the hub, where it may be a model, is out of reach."
        ) from error
    except OSError as error:
        reason = str(error).strip().partition("\n")[0]
        raise OSError(f"`{name}` is no folder, and no model on the hub: {reason}") from error


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that hold the model.

    Raises:
        InvalidArgumentError: If there are none, or some that the index names are missing.
        UnsupportedModelError: If the folder holds pickles or an adapter instead.
    """
    if (folder / WEIGHTS).is_file():  # transformers looks for this one first, too
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            names = sorted({str(name) for name in index["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidArgumentError(f"`{folder / INDEX}` is damaged: {error}.") from error
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise InvalidArgumentError(
                    f"`{folder / INDEX}` names `{name}`, which is missing. Download it again."
                )
        return [folder / name for name in names]
    if (folder / "adapter_config.json").is_file():
        raise UnsupportedModelError(
            f"`{folder}` holds a PEFT adapter, no model. Merge it first: `PeftModel.from_pretrained"
            "(…).merge_and_unload().save_pretrained(folder)`."
        )
    pickles = sorted(
        file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth")
    )
    if pickles:
        raise UnsupportedModelError(
            f"`{folder}` holds its weights as a pickle (`{pickles[0]}`), which may run code when "
            "opened and cannot be read a piece at a time. Convert it where you trust it, and prune "
            f"the new folder: `{_class_named(folder)}.from_pretrained({str(folder)!r}, "
            f"dtype='auto').save_pretrained({f'{folder}-safetensors'!r})`."
        )
    raise InvalidArgumentError(
        f"`{folder}` holds no weights: neither `{WEIGHTS}` nor `{INDEX}` is there."
    )


def _class_named(folder: Path) -> str:
    """Return the name of the class that a config names, a likely one where it names none."""
    try:
        return str(read_config(folder)[1].__name__)
    except InvalidArgumentError:
        return "AutoModelForCausalLM"
