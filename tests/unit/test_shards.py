"""Safetensors files, against the package that defines the format."""

import errno
import gc
import json
import os
import resource
import struct
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file

from conftest import assert_same
from yopo import InvalidArgumentError, shards
from yopo.shards import Piece, read_header, write_shard

TENSORS = {
    "a": torch.arange(12.0).view(3, 4),
    "b.weight": torch.arange(10, dtype=torch.bfloat16).view(2, 5),
    "c": torch.arange(3, dtype=torch.float16),
    "d": torch.arange(6, dtype=torch.float64).view(1, 2, 3),
    "number": torch.tensor(2.5),
    "nothing": torch.empty(0, 7),
}

COPIED = {
    "bool": torch.tensor([True, False, True]),
    "f8_e4m3": torch.arange(5.0).to(torch.float8_e4m3fn),
    "f8_e5m2": torch.arange(7.0).to(torch.float8_e5m2),
    "i8": torch.tensor([-3], dtype=torch.int8),
    "i16": torch.tensor([[-300, 4]], dtype=torch.int16),
    "i32": torch.arange(3, dtype=torch.int32),
    "i64": torch.tensor(-(2**40)),
    "u8": torch.arange(9, dtype=torch.uint8),
    "no_ints": torch.empty(3, 0, dtype=torch.int64),
}

DTYPES = ["float64", "float32", "float16", "bfloat16"]


@pytest.fixture
def file(tmp_path):
    save_file(TENSORS | COPIED, tmp_path / "old.safetensors", {"format": "pt", "of": "a test"})
    return tmp_path / "old.safetensors"


def with_header(file, header, body=b""):
    """Write a safetensors file that says whatever a test wants it to say."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return file


def mappings_of(file):
    """Return how many times this process has mapped a file at the moment."""
    gc.collect()
    return Path("/proc/self/maps").read_text().count(str(file))


def resident():
    """Return the bytes of memory that this process takes, files that it has mapped included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def as_it_is(file):
    return [Piece(stored, stored.shape) for stored in read_header(file)[0]]


def test_a_header_reads_like_safetensors_own_reader(file):
    tensors, metadata = read_header(file)
    with safe_open(file, "pt") as opened:
        assert {tensor.name for tensor in tensors} == set(opened.keys())
        assert metadata == opened.metadata()
        for tensor in tensors:
            part = opened.get_slice(tensor.name)
            assert tensor.dtype == part.get_dtype()
            assert list(tensor.shape) == part.get_shape()
            assert tensor.file == file


def test_tensors_come_in_the_order_of_their_bytes_and_fill_the_file(file):
    tensors, _ = read_header(file)
    assert all(one.stop == two.start for one, two in pairwise(tensors))
    assert tensors[-1].stop == file.stat().st_size


def test_every_float_tensor_is_mapped_as_what_was_saved(file):
    for stored in read_header(file)[0]:
        if stored.name in TENSORS:
            tensor = stored.map()
            assert tensor.dtype == TENSORS[stored.name].dtype
            assert tensor.device.type == "cpu"
            assert torch.equal(tensor, TENSORS[stored.name])


def test_a_file_without_metadata_or_tensors_is_one_too(tmp_path):
    save_file({}, tmp_path / "empty.safetensors")
    assert read_header(tmp_path / "empty.safetensors") == ([], {})
    save_file({"a": torch.ones(2)}, tmp_path / "plain.safetensors")
    tensors, metadata = read_header(tmp_path / "plain.safetensors")
    assert [tensor.name for tensor in tensors] == ["a"]
    assert metadata == {}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spaces", range(8))
def test_tensors_at_odd_addresses_are_mapped_too(tmp_path, dtype, spaces):
    """Headers need not be padded, and were not in the format's first years."""
    tensor = torch.arange(6, dtype=getattr(torch, dtype)).view(2, 3)
    data = save({"a": tensor})
    (length,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + length].rstrip() + b" " * spaces
    stored = read_header(with_header(tmp_path / "odd", header, data[8 + length :]))[0][0]
    assert torch.equal(stored.map(), tensor)
    write_shard(tmp_path / "new", [Piece(stored, (3,), [stored.map()[1:]])], {})
    assert torch.equal(load_file(tmp_path / "new")["a"], tensor[1])


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not tell")
def test_no_more_of_a_tensor_is_read_than_is_looked_at(tmp_path):
    shape = [2**15, 2**15]
    header = {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 2**32]}}
    file = with_header(tmp_path / "holes", header)
    try:
        os.truncate(file, file.stat().st_size + 2**32)
    except OSError as error:
        pytest.skip(f"the disk keeps no holes: {error}")
    before = resident()
    tensor = read_header(file)[0][0].map()
    assert list(tensor.shape) == shape
    assert tensor[::999, 2**14].sum() == 0.0
    assert resident() - before < 2**24


def test_what_is_written_to_a_mapped_tensor_does_not_reach_the_file(file):
    before = file.read_bytes()
    for stored in read_header(file)[0]:
        if stored.name in TENSORS:
            stored.map().fill_(7.0)
    assert file.read_bytes() == before


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not tell")
def test_the_mapping_ends_with_the_last_reference_to_the_tensor(file):
    stored = next(tensor for tensor in read_header(file)[0] if tensor.name == "a")
    assert mappings_of(file) == 0
    tensor = stored.map()
    row = tensor[1]
    assert mappings_of(file) == 1
    del tensor
    assert mappings_of(file) == 1
    assert row.tolist() == [4.0, 5.0, 6.0, 7.0]
    del row
    assert mappings_of(file) == 0


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 60])
def test_a_file_whose_header_is_cut_short_is_damaged(file, keep):
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(InvalidArgumentError, match=r"old\.safetensors` is damaged or no safet"):
        read_header(file)


@pytest.mark.parametrize("missing", [1, 8, 100])
def test_a_file_whose_tensors_are_cut_short_is_told(file, missing):
    file.write_bytes(file.read_bytes()[:-missing])
    with pytest.raises(InvalidArgumentError, match=r"old\.safetensors` is cut short.*again\."):
        read_header(file)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xff\xfe",
        b"{",
        [],
        3,
        None,
        "text",
        {"a": 3},
        {"a": []},
        {"a": {}},
        {"a": {"dtype": "F32", "shape": [1]}},
        {"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}},
        {"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": 32, "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}},
        {"a": {"dtype": "I32", "shape": [1], "data_offsets": [4, 0]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {
            "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        },
        {"__metadata__": ["a"], "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
    ],
    ids=str,
)
def test_a_header_that_no_writer_writes_is_damage(tmp_path, header):
    file = with_header(tmp_path / "strange.safetensors", header, b"\0" * 8)
    with pytest.raises(SafetensorError):
        load_file(file)
    with pytest.raises(InvalidArgumentError, match=r"strange\.safetensors` is "):
        read_header(file)


@pytest.mark.parametrize("data", [b"PK\x03\x04" + b"\0" * 200, b"GGUF" * 40, b"version https://g"])
def test_files_of_other_formats_are_none(tmp_path, data):
    (tmp_path / "foreign.safetensors").write_bytes(data)
    with pytest.raises(InvalidArgumentError, match=r"foreign\.safetensors` is damaged or no safe"):
        read_header(tmp_path / "foreign.safetensors")


def test_a_missing_file_is_the_systems_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_header(tmp_path / "none.safetensors")


SMALL = save({"a": torch.arange(6.0).view(2, 3), "b": torch.arange(3)}, {"format": "pt"})


@given(st.integers(0, len(SMALL) - 1), st.integers(0, 255))
@example(0, 255)
def test_one_changed_byte_is_damage_or_what_safetensors_reads(tmp_path_factory, place, value):
    file = tmp_path_factory.mktemp("byte") / "one.safetensors"
    data = bytearray(SMALL)
    data[place] = value
    file.write_bytes(data)
    try:
        with safe_open(file, "pt") as opened:
            expected = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError:
        expected = None
    try:
        tensors = read_header(file)[0]
    except InvalidArgumentError as error:
        told = str(error)
    else:
        told = ""
    if told:
        assert str(file) in told
        assert expected is None
        return
    if expected is not None:
        assert {stored.name: stored.shape for stored in tensors} == {
            name: tuple(tensor.shape) for name, tensor in expected.items()
        }


def test_what_stays_as_it_is_is_read_by_safetensors_bit_for_bit(file, tmp_path):
    new = tmp_path / "new.safetensors"
    write_shard(new, as_it_is(file), {"format": "pt", "by": "yopo"})
    assert_same(load_file(new), TENSORS | COPIED)
    with safe_open(new, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "by": "yopo"}


def test_a_shard_without_metadata_or_tensors_can_be_written(file, tmp_path):
    write_shard(tmp_path / "plain", as_it_is(file), {})
    with safe_open(tmp_path / "plain", "pt") as opened:
        assert opened.metadata() is None
    write_shard(tmp_path / "empty", [], {"format": "pt"})
    assert load_file(tmp_path / "empty") == {}


def test_new_tensors_are_written_a_part_at_a_time_between_old_ones(file, tmp_path):
    stored = {tensor.name: tensor for tensor in read_header(file)[0]}
    a = torch.randn(5, 4)
    pieces = [
        Piece(stored["i64"], ()),
        Piece(stored["a"], (5, 4), (row for row in a)),
        Piece(stored["u8"], (9,)),
        Piece(stored["b.weight"], (5, 2), [TENSORS["b.weight"].T]),
        Piece(stored["nothing"], (0, 3), []),
        Piece(stored["c"], (0,), [torch.empty(0, dtype=torch.float16)]),
        Piece(stored["number"], ()),
    ]
    write_shard(tmp_path / "new", pieces, {})
    expected = {"a": a, "b.weight": TENSORS["b.weight"].T, "nothing": torch.empty(0, 3)}
    expected |= {"number": TENSORS["number"], "c": torch.empty(0, dtype=torch.float16)}
    assert_same(
        load_file(tmp_path / "new"), expected | {name: COPIED[name] for name in ("i64", "u8")}
    )


@pytest.mark.parametrize("length", range(1, 9))
def test_tensors_begin_at_a_multiple_of_eight_bytes_whatever_their_names(tmp_path, length):
    save_file({"n" * length: torch.ones(3)}, tmp_path / "old")
    write_shard(tmp_path / "new", as_it_is(tmp_path / "old"), {})
    assert read_header(tmp_path / "new")[0][0].start % 8 == 0
    assert torch.equal(load_file(tmp_path / "new")["n" * length], torch.ones(3))


def test_names_beyond_ascii_come_through(tmp_path):
    save_file({"слой.0": torch.ones(2), 'q"uote': torch.zeros(1)}, tmp_path / "old", {"é": "ü"})
    tensors, metadata = read_header(tmp_path / "old")
    write_shard(tmp_path / "new", [Piece(t, t.shape) for t in tensors], metadata)
    assert load_file(tmp_path / "new").keys() == {"слой.0", 'q"uote'}
    with safe_open(tmp_path / "new", "pt") as opened:
        assert opened.metadata() == {"é": "ü"}


def refuse(*args):
    raise OSError(errno.EXDEV, "Invalid cross-device link")


def half(*args):
    """Copy no more than 5 bytes a call, as the system may."""
    source, target, count, place = args
    return os.write(target, os.pread(source, min(count, 5), place))


@pytest.mark.parametrize("system", [None, refuse, lambda *args: 0, half])
def test_files_are_copied_where_the_system_will_not_or_only_in_part(
    file, tmp_path, monkeypatch, system
):
    if system is None:
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    else:
        monkeypatch.setattr(os, "copy_file_range", system, raising=False)
    monkeypatch.setattr(shards, "_COPIED", 16)
    write_shard(tmp_path / "new", as_it_is(file), {})
    assert_same(load_file(tmp_path / "new"), TENSORS | COPIED)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG])
def test_a_full_or_broken_disk_is_an_error_and_no_reason_to_try_again(
    file, tmp_path, monkeypatch, number
):
    def fail(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "copy_file_range", fail, raising=False)
    with pytest.raises(OSError, match=os.strerror(number)) as raised:
        write_shard(tmp_path / "new", as_it_is(file), {})
    assert raised.value.errno == number


def test_a_source_that_shrinks_while_it_is_copied_is_an_error(file, tmp_path, monkeypatch):
    monkeypatch.delattr(os, "copy_file_range", raising=False)
    pieces = as_it_is(file)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(OSError, match=r"old\.safetensors"):
        write_shard(tmp_path / "new", pieces, {})
