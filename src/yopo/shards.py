"""Safetensors files, read and written a piece at a time.

The format is a length of 8 bytes, a header in JSON that gives each tensor's dtype, shape and place,
and the tensors' bytes. The package of that name hands over whole files, or maps them as a whole:
what has been looked at then counts as memory. Here one tensor is mapped at a time, and what stays
as it is goes from file to file without being looked at.
"""

import errno
import json
import mmap
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from yopo.errors import InvalidArgumentError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Dtypes of the format in which rows can be removed. Tensors of others are copied only."""

_COPIED = 2**26
"""Bytes that are copied at a time."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Say where a tensor lies on disk.

    Attributes:
        file: The safetensors file.
        name: Its name there.
        dtype: Its dtype, as the format writes it.
        shape: Its shape.
        start: Where its bytes begin in the file.
        stop: Where they end.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def map(self) -> Tensor:
        """Return the tensor without reading more of it than is looked at.

        It is let go of with the last reference to it. What is written to it does not reach the
        file.
        """
        dtype = DTYPES[self.dtype]
        if self.start == self.stop:
            return torch.empty(self.shape, dtype=dtype, device="cpu")
        offset = self.start % mmap.ALLOCATIONGRANULARITY
        length = self.stop - self.start + offset
        with self.file.open("rb") as stream:
            memory = mmap.mmap(
                stream.fileno(), length, access=mmap.ACCESS_COPY, offset=self.start - offset
            )
        flat = torch.frombuffer(memory, dtype=dtype, count=prod(self.shape), offset=offset)
        return flat.view(self.shape)


def read_header(file: Path) -> tuple[list[Stored], dict[str, str]]:
    """Return the tensors of a safetensors file, in the order of their bytes, and its metadata.

    Raises:
        InvalidArgumentError: If the file is damaged or cut short.
    """
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            size = os.fstat(stream.fileno()).st_size
            header = json.loads(stream.read(min(length, size)))
        metadata = dict(header.pop("__metadata__", {}))
        tensors = [_stored(file, name, entry, 8 + length) for name, entry in header.items()]
        tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
        _check_places(tensors, 8 + length)
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise InvalidArgumentError(
            f"`{file}` is damaged or no safetensors file: {error}. Download or save it again."
        ) from error
    if any(tensor.stop > size for tensor in tensors):
        raise InvalidArgumentError(
            f"`{file}` is cut short: tensors are missing at its end. Download or save it again."
        )
    return tensors, metadata


def _stored(file: Path, name: str, entry: Mapping[str, Any], begin: int) -> Stored:
    start, stop = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not isinstance(entry["dtype"], str):
        raise ValueError(f"`{name}` has no dtype")
    if not all(isinstance(size, int) and size >= 0 for size in (start, stop, *shape)):
        raise ValueError(f"`{name}` has sizes that are no numbers")
    dtype = DTYPES.get(entry["dtype"])
    if dtype is not None and stop - start != prod(shape) * dtype.itemsize:
        raise ValueError(f"`{name}` has other bytes than its shape")
    return Stored(file, name, entry["dtype"], shape, begin + start, begin + stop)


def _check_places(tensors: Iterable[Stored], begin: int) -> None:
    """Check that sorted tensors follow one another without gaps, as the format demands."""
    for tensor in tensors:
        if tensor.start != begin or tensor.stop < begin:
            raise ValueError(f"`{tensor.name}` overlaps another tensor, or leaves a gap")
        begin = tensor.stop


@dataclass(frozen=True, slots=True)
class Piece:
    """Say what to write for one tensor: its new shape, and its bytes, a part at a time.

    Attributes:
        stored: The tensor as it was.
        shape: Its shape now.
        parts: Tensors whose bytes follow one another; None where it stays as it is.
    """

    stored: Stored
    shape: tuple[int, ...]
    parts: Iterable[Tensor] | None = None

    @property
    def bytes(self) -> int:
        """Return how many bytes it takes now."""
        stored = self.stored
        if self.parts is None:
            return stored.stop - stored.start
        return prod(self.shape) * DTYPES[stored.dtype].itemsize


def write_shard(file: Path, pieces: Iterable[Piece], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, a piece at a time.

    Args:
        file: The file to write.
        pieces: What it holds, all from one source file.
        metadata: What its header says besides.
    """
    pieces = list(pieces)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for piece in pieces:
        start, end = end, end + piece.bytes
        header[piece.stored.name] = {
            "dtype": piece.stored.dtype,
            "shape": list(piece.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes
    with file.open("wb") as target:
        target.write(struct.pack("<Q", len(text)) + text)
        target.flush()
        for piece in pieces:
            if piece.parts is None:
                _copy(piece.stored, target)
                continue
            for part in piece.parts:
                target.write(part.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            target.flush()


def _copy(stored: Stored, target: IO[bytes]) -> None:
    """Append the bytes of a tensor to a file, inside the system where that can be done."""
    with stored.file.open("rb") as source:
        for place in range(stored.start, stored.stop, _COPIED):
            count = min(stored.stop - place, _COPIED)
            copied = _copied_by_system(source, target, place, count)
            if copied < count:
                source.seek(place + copied)
                rest = source.read(count - copied)
                if len(rest) < count - copied:
                    raise OSError(errno.EIO, "the file has become shorter", str(stored.file))
                target.write(rest)
                target.flush()


def _copied_by_system(source: IO[bytes], target: IO[bytes], place: int, count: int) -> int:
    """Return how many bytes the system has copied by itself; 0 where it or the disk cannot."""
    try:
        return os.copy_file_range(source.fileno(), target.fileno(), count, place)
    except (AttributeError, OSError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG):
            raise
        return 0
