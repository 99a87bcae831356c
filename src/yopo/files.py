"""Small folders of tensors and JSON, written all or nothing, read with distrust."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from yopo.errors import PolicyFileError

FORMAT = 1
"""Version of the files. Readers refuse newer ones."""


def write_folder(
    path: str | Path,
    kind: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    card: str | None = None,
) -> None:
    """Write `{kind}.safetensors`, `{kind}_config.json` and an optional card into the folder `path`.

    Everything is written beside its place, inside the folder, and then moved there, so that no
    reader sees half a file. The config, which moves last, holds the checksum of the tensors it
    belongs to.

    Raises:
        PolicyFileError: If the folder cannot be written.
    """
    folder = Path(path)
    # Copies, because safetensors refuses tensors that share memory.
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    try:
        existed = folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{kind}-", dir=folder))
        try:
            # Not `save_file`, whose files only their owner may read, whatever the umask says.
            (staging / f"{kind}.safetensors").write_bytes(save(copies, {"format": "pt"}))
            document = {
                "format": FORMAT,
                "kind": f"yopo-{kind}",
                "sha256": _checksum(staging / f"{kind}.safetensors"),
                **config,
            }
            if card is not None:
                (staging / "README.md").write_text(card, encoding="utf-8")
            text = json.dumps(document, indent=2) + "\n"
            (staging / f"{kind}_config.json").write_text(text, encoding="utf-8")
            if not (folder / f"{kind}_config.json").exists() and (folder / "README.md").exists():
                (staging / "README.md").unlink(missing_ok=True)  # somebody else's card
            for name in ("README.md", f"{kind}.safetensors", f"{kind}_config.json"):
                if (staging / name).exists():
                    (staging / name).replace(folder / name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            if not existed:
                with suppress(OSError):  # a folder that holds what was written stays
                    folder.rmdir()
    except (OSError, SafetensorError) as error:
        raise PolicyFileError(f"cannot write the {kind} to `{folder}`: {error}.") from error


def read_folder(path: str | Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `write_folder` wrote.

    Raises:
        PolicyFileError: If a file is missing, damaged, of another kind or of a newer format.
    """
    folder = Path(path)
    config_file, tensor_file = folder / f"{kind}_config.json", folder / f"{kind}.safetensors"
    for file in (config_file, tensor_file):
        if not file.is_file():
            raise PolicyFileError(f"`{folder}` holds no {kind}: `{file.name}` is missing.")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PolicyFileError(f"`{config_file}` is damaged: {error}.") from error
    if not isinstance(config, dict) or config.get("kind") != f"yopo-{kind}":
        raise PolicyFileError(f"`{config_file}` was not written by yopo as a {kind}.")
    if not isinstance(config.get("format"), int) or config["format"] > FORMAT:
        raise PolicyFileError(
            f"`{config_file}` has format {config.get('format')!r}, this yopo reads up to {FORMAT}. "
            "Update yopo (`pip install --upgrade yopo-prune`)."
        )
    try:
        if config.get("sha256") != _checksum(tensor_file):
            raise PolicyFileError(
                f"`{tensor_file}` is damaged: it is not the file that `{config_file.name}` "
                "describes. Save it again."
            )
        return config, load_file(tensor_file)
    except (OSError, SafetensorError) as error:
        raise PolicyFileError(f"`{tensor_file}` is damaged: {error}.") from error


def _checksum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
