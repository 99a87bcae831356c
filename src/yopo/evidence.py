"""What is known of the hidden units of a model, and how it comes to be known.

Shapes: N sequences, W tokens a sequence.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from yopo.adapters import Ffn
from yopo.errors import InvalidArgumentError, UnsupportedModelError
from yopo.moments import Moments, imagine_moments, read_moments
from yopo.writing import LENGTH, SEQUENCES, can_write, write_tokens


class Evidence:
    """Give the moments of the hidden units of any model, by one of three ways.

    Args:
        kind: "self" for text that the model writes itself, "weights" for Gaussian inputs, "auto"
            for the first where the model can write and the second elsewhere; or token ids
            `(N, W)`, which is calibration on data.
        seed: Seed of the text or the inputs.

    Raises:
        InvalidArgumentError: If `kind` is none of these.
    """

    def __init__(self, kind: str | Tensor, *, seed: int) -> None:
        """Check the arguments; nothing is written before it is needed."""
        if isinstance(kind, Tensor):
            if kind.dim() != 2 or kind.dtype != torch.int64 or kind.numel() == 0:
                raise InvalidArgumentError(
                    "`evidence` tokens must be int64 ids of shape (sequences, length), got "
                    f"{kind.dtype} of shape {tuple(kind.shape)}."
                )
        elif kind not in ("auto", "self", "weights"):
            raise InvalidArgumentError(
                f'`evidence` must be "auto", "self", "weights" or token ids, got {kind!r}.'
            )
        self._kind, self._seed = kind, seed
        self._seen: tuple[bytes, dict[str, Moments]] | None = None

    def moments(self, model: nn.Module, ffns: Sequence[Ffn]) -> Iterator[tuple[Ffn, Moments]]:
        """Yield each FFN with its moments, holding no more at once than memory allows.

        Moments that fit into memory together are remembered for models with the same weights.

        Raises:
            UnsupportedModelError: If the model writes NaN, or cannot serve as asked.
            InvalidArgumentError: If the model cannot read the tokens given.
        """
        groups = list(_groups(ffns))
        checksum = _checksum(model) if len(groups) == 1 else b""
        seen, found = self._seen or (b"", {})
        if seen == checksum and all(ffn.name in found for ffn in ffns):
            yield from ((ffn, found[ffn.name]) for ffn in ffns)
            return
        for group, found in self._by_group(model, groups):
            if len(groups) == 1:
                self._seen = (checksum, found)
            yield from ((ffn, found[ffn.name]) for ffn in group)

    def _by_group(
        self, model: nn.Module, groups: list[list[Ffn]]
    ) -> Iterator[tuple[list[Ffn], dict[str, Moments]]]:
        kind = self._kind
        if isinstance(kind, str) and kind == "auto":
            kind = "self" if can_write(model) else "weights"
        if isinstance(kind, Tensor):
            _check_tokens(model, kind)
            inputs = {"input_ids": kind}
        elif kind == "self":
            if not can_write(model):
                raise UnsupportedModelError(
                    f"{type(model).__name__} does not generate text, so it cannot write its own "
                    "evidence. Use the model with its language-model head, or "
                    "`evidence='weights'`."
                )
            inputs = write_tokens(model, seed=self._seed)
        else:
            inputs = {}
        for group in groups:
            if inputs:
                yield group, read_moments(model, group, inputs)
            else:
                tokens = SEQUENCES * LENGTH
                yield (
                    group,
                    {
                        f.name: imagine_moments(model, f, tokens=tokens, seed=self._seed)
                        for f in group
                    },
                )


def _check_tokens(model: nn.Module, ids_NW: Tensor) -> None:
    """Check that `model` can read the tokens.

    Raises:
        InvalidArgumentError: If an id is outside its vocabulary, or a sequence is too long.
    """
    config: Any = model.config
    text = config.get_text_config()
    vocabulary = getattr(text, "vocab_size", None) or int(ids_NW.max()) + 1
    if ids_NW.min() < 0 or ids_NW.max() >= vocabulary:
        raise InvalidArgumentError(
            f"`evidence` ids must lie in [0, {vocabulary}), the model's vocabulary, got "
            f"{int(ids_NW.min())} to {int(ids_NW.max())}."
        )
    longest = getattr(text, "max_position_embeddings", None) or ids_NW.shape[1]
    if ids_NW.shape[1] > longest:
        raise InvalidArgumentError(
            f"`evidence` sequences may have at most {longest} tokens, as many as the model can "
            f"read, got {ids_NW.shape[1]}."
        )


def _checksum(model: nn.Module) -> bytes:
    """Return a checksum of the class and all weights of `model`."""
    digest = hashlib.blake2b(repr(type(model)).encode(), digest_size=16)
    for parameter in model.parameters():
        numbers = parameter.detach().reshape(-1).view(torch.uint8).cpu().numpy()
        digest.update(numbers.tobytes())
    return digest.digest()


def _groups(ffns: Sequence[Ffn]) -> Iterator[list[Ffn]]:
    """Split `ffns` into runs whose moments take at most a quarter of the machine's memory."""
    budget = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
    group: list[Ffn] = []
    used = 0
    for ffn in ffns:
        size = 8 * ffn.rows**2
        if group and used + size > budget:
            yield group
            group, used = [], 0
        group.append(ffn)
        used += size
    yield group
