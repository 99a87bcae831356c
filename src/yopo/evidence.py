"""What is known of the hidden units of a model, and how it comes to be known.

Shapes: N sequences, W tokens a sequence.
"""

import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from secrets import token_bytes
from typing import Any

import torch
from torch import Tensor, nn

from yopo.adapters import Ffn
from yopo.errors import InvalidArgumentError, UnsupportedModelError
from yopo.imagining import imagine_moments
from yopo.memory import is_out_of_memory, memory_left, moments_bytes, too_little_memory
from yopo.moments import Moments, read_moments
from yopo.writing import LENGTH, SEQUENCES, can_write, positions_of, write_tokens

logger = logging.getLogger(__name__)

_SHARE = 2 / 3
"""Share of the memory left that moments and the work on them may take."""

_WORK = 6
"""Matrices as large as the moments of an FFN that elimination or restoring needs beside them."""

_REMEMBERED = 1 / 8
"""Share of the memory left that remembered moments may take for as long as a pruner lives."""

_CHUNK = 2**20
"""Numbers that are summed up at a time."""


class Evidence:
    """Give the moments of the hidden units of any model, by one of three ways.

    Args:
        kind: "self" for text that the model writes itself, "weights" for imagined inputs, "auto"
            for the first where the model can write and the second elsewhere; or token ids
            `(N, W)`, which is calibration on data.
        seed: Seed of the text or the inputs.

    Raises:
        InvalidArgumentError: If `kind` is none of these.
    """

    def __init__(self, kind: str | Tensor, *, seed: int) -> None:
        """Check the arguments; nothing is written before it is needed."""
        if isinstance(kind, Tensor):
            check_rows_of_tokens(kind, called="evidence")
        elif kind not in ("auto", "self", "weights"):
            raise InvalidArgumentError(
                f'`evidence` must be "auto", "self", "weights" or token ids, got {kind!r}.'
            )
        self._kind, self._seed = kind, seed
        self._checksum, self._inputs = b"", dict[str, Tensor]()
        self._seen: dict[str, Moments] = {}

    def moments(self, model: nn.Module, ffns: Sequence[Ffn]) -> Iterator[tuple[Ffn, Moments]]:
        """Yield each FFN with its moments, holding no more at once than memory allows.

        Moments that take little of it are remembered for models with the same weights, and so is
        the text that a model has written.

        Raises:
            UnsupportedModelError: If the model writes NaN, or cannot serve as asked, or there is
                too little memory for the moments of one FFN.
            InvalidArgumentError: If the model cannot read the tokens given.
        """
        on_disk = _is_on_disk(model)
        checksum = token_bytes() if on_disk else checksum_of(model)  # what may change is not known
        if checksum != self._checksum:
            self._checksum, self._inputs, self._seen = checksum, {}, {}
        if all(ffn.name in self._seen for ffn in ffns):
            yield from ((ffn, self._seen[ffn.name]) for ffn in ffns)
            return
        self._seen = {}
        waiting, remember = list(_groups(ffns)), _take_little(ffns)
        inputs = self._inputs = self._inputs or self._find_inputs(model)
        while waiting:
            group = waiting.pop(0)
            found = self._measure(model, group, inputs)
            if found is None:  # less memory is left than it seemed
                half = len(group) // 2
                waiting = [group[:half], group[half:], *waiting]
            elif remember and len(group) == len(ffns):
                self._seen = found
                yield from ((ffn, found[ffn.name]) for ffn in ffns)
            else:
                yield from ((ffn, found.pop(ffn.name)) for ffn in group)

    def _find_inputs(self, model: nn.Module) -> dict[str, Tensor]:
        """Return what the model is to read, nothing where weights alone are looked at."""
        kind, on_disk = self._kind, _is_on_disk(model)
        if kind == "auto" and on_disk:
            logger.warning(
                "A checkpoint on disk is not run, so it is judged from weights alone. To judge it "
                "on text that the model writes itself, load it with its weights."
            )
            return {}
        if kind == "weights" or (kind == "auto" and not can_write(model)):
            return {}
        if on_disk:
            raise UnsupportedModelError(
                "a checkpoint on disk is not run, so it cannot write or read text. Use "
                "`evidence='weights'`, or load the model with its weights."
            )
        if isinstance(kind, Tensor):
            check_tokens(model, kind, called="evidence")
            return {"input_ids": kind}
        if not can_write(model):
            raise UnsupportedModelError(
                f"{type(model).__name__} does not generate text, so it cannot write its own "
                "evidence. Use the model with its language-model head, or "
                "`evidence='weights'`."
            )
        return write_tokens(model, seed=self._seed)

    def _measure(
        self, model: nn.Module, group: Sequence[Ffn], inputs: dict[str, Tensor]
    ) -> dict[str, Moments] | None:
        """Return the moments of a group, or None where several together exceed the memory."""
        try:
            if not inputs:
                return self._imagined(model, group)
            found = read_moments(model, group, inputs)
            unseen = [ffn for ffn in group if found[ffn.name].tokens == 0]
            if unseen:
                told = f"No token reaches {len(unseen)} FFNs, such as `{unseen[0].name}`"
                try:
                    imagined = self._imagined(model, unseen)
                    logger.info(f"{told}: they are judged from weights alone.")
                except UnsupportedModelError as error:
                    imagined = {}
                    logger.warning(f"{told}: their rows go as they come, for {error}")
                found |= {name: replace(moments, tokens=0) for name, moments in imagined.items()}
            return found
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if len(group) == 1:
                raise too_little_memory(group[0]) from error
        return None

    def _imagined(self, model: nn.Module, ffns: Sequence[Ffn]) -> dict[str, Moments]:
        return imagine_moments(model, ffns, tokens=SEQUENCES * LENGTH, seed=self._seed)


def _is_on_disk(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def check_rows_of_tokens(ids: Tensor, *, called: str) -> None:
    """Check that a tensor can be token ids `(N, W)`.

    Args:
        ids: The tensor.
        called: The argument that it was given as.

    Raises:
        InvalidArgumentError: If it cannot.
    """
    if ids.dim() != 2 or ids.dtype != torch.int64 or ids.numel() == 0:
        raise InvalidArgumentError(
            f"`{called}` tokens must be int64 ids of shape (sequences, length), got {ids.dtype} of "
            f"shape {tuple(ids.shape)}."
        )


def check_tokens(model: nn.Module, ids_NW: Tensor, *, called: str) -> None:
    """Check that `model` can read the tokens.

    Args:
        model: The model.
        ids_NW: Token ids.
        called: The argument that they were given as.

    Raises:
        InvalidArgumentError: If an id is outside its vocabulary, or a sequence is too long.
    """
    config: Any = model.config
    text = config.get_text_config()
    vocabulary = getattr(text, "vocab_size", None) or int(ids_NW.max()) + 1
    if ids_NW.min() < 0 or ids_NW.max() >= vocabulary:
        raise InvalidArgumentError(
            f"`{called}` ids must lie in [0, {vocabulary}), the model's vocabulary, got "
            f"{int(ids_NW.min())} to {int(ids_NW.max())}."
        )
    longest = positions_of(config)
    if longest is not None and ids_NW.shape[1] > longest:
        raise InvalidArgumentError(
            f"`{called}` sequences may have at most {longest} tokens, as many as the model can "
            f"read, got {ids_NW.shape[1]}."
        )


def checksum_of(model: nn.Module) -> bytes:
    """Return a checksum of the class and all weights of `model`, summed up where they lie."""
    generator = torch.Generator().manual_seed(0)
    longest = max((p.numel() * p.element_size() for p in model.parameters()), default=0)
    factors = min(_CHUNK, longest // 8 + 1)
    odd = torch.randint(2**62, (factors,), generator=generator, device="cpu") * 2 + 1
    odd_by_device: dict[torch.device, Tensor] = {}
    digest = hashlib.blake2b(repr(type(model)).encode(), digest_size=16)
    for name, parameter in model.named_parameters():
        numbers = parameter.detach().reshape(-1)
        spare = -len(numbers) % (8 // numbers.element_size())
        if spare or numbers.storage_offset() * numbers.element_size() % 8:
            numbers = torch.cat([numbers, numbers.new_zeros(spare)])
        device = parameter.device
        if device not in odd_by_device:
            odd_by_device[device] = odd.to(device)
        # Products of integers wrap around, so with odd factors no single change goes unseen.
        sums = [
            (chunk * odd_by_device[device][: len(chunk)]).sum()
            for chunk in torch.split(numbers.view(torch.int64), _CHUNK)
        ]
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(torch.stack(sums).cpu().numpy().tobytes())
    return digest.digest()


def _take_little(ffns: Sequence[Ffn]) -> bool:
    """Tell whether the moments of `ffns` may be remembered."""
    needed: dict[torch.device, int] = defaultdict(int)
    for ffn in ffns:
        needed[ffn.device] += moments_bytes(ffn)
    return all(size <= _REMEMBERED * memory_left(device) for device, size in needed.items())


def _groups(ffns: Sequence[Ffn]) -> Iterator[list[Ffn]]:
    """Split `ffns` into runs whose moments fit into memory, wherever each FFN lies.

    Raises:
        UnsupportedModelError: If those of one FFN alone do not.
    """
    most: dict[torch.device, Ffn] = {}
    for ffn in ffns:
        device = ffn.device
        most[device] = max(ffn, most.get(device, ffn), key=moments_bytes)
    spare: dict[torch.device, float] = {}
    for device, ffn in most.items():
        memory, work = memory_left(device), _WORK * moments_bytes(ffn)
        if memory < work:
            raise too_little_memory(ffn)
        spare[device] = _SHARE * memory - work
    group: list[Ffn] = []
    left = dict(spare)
    for ffn in ffns:
        device, size = ffn.device, moments_bytes(ffn)
        if group and left[device] < size:
            yield group
            group, left = [], dict(spare)
        group.append(ffn)
        left[device] -= size
    yield group
