from types import SimpleNamespace

import pytest
import torch

from conftest import save
from yopo import UnsupportedModelError, find_ffns, memory
from yopo.checkpoint import open_checkpoint
from yopo.memory import (
    given_back_at_once,
    is_out_of_memory,
    memory_left,
    moments_bytes,
    room_on_disk,
    too_little_memory,
)


def test_moments_are_a_square_of_float64(tiny_model):
    ffn = find_ffns(tiny_model("llama"))[0]
    assert moments_bytes(ffn) == ffn.rows * ffn.rows * torch.float64.itemsize


def test_the_memory_of_the_host_is_some_of_what_there_is():
    assert 2**20 < memory_left(torch.device("cpu")) < 2**50


def test_the_limit_of_a_container_counts(tmp_path, monkeypatch):
    (tmp_path / "limited").write_text("1048576\n")
    (tmp_path / "free").write_text("max\n")
    limits = tuple(str(tmp_path / name) for name in ("limited", "free", "missing"))
    monkeypatch.setattr(memory, "_LIMITS", limits)
    assert memory_left(torch.device("cpu")) == 1048576


def test_systems_without_such_calls_are_taken_to_be_small(monkeypatch):
    monkeypatch.setattr(memory, "Path", lambda name: SimpleNamespace(exists=lambda: False))
    monkeypatch.delattr("os.sysconf")
    assert memory_left(torch.device("cpu")) == 8 * 2**30


def test_what_an_accelerator_has_cached_counts_as_left(monkeypatch):
    module = SimpleNamespace(
        mem_get_info=lambda device: (1000, 9000),
        memory_reserved=lambda device: 500,
        memory_allocated=lambda device: 200,
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    assert memory_left(torch.device("cuda", 0)) == 1300


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("no memory"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory"), True),
        (RuntimeError("shapes differ"), False),
        (ValueError("DefaultCPUAllocator"), False),
    ],
)
def test_errors_that_say_that_memory_is_out(error, expected):
    assert is_out_of_memory(error) == expected


def test_what_cannot_be_allocated_on_the_host_is_known_as_such():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_the_error_names_the_ffn_its_need_and_the_ways_out(tiny_model):
    ffn = find_ffns(tiny_model("llama"))[1]
    error = too_little_memory(ffn)
    assert isinstance(error, UnsupportedModelError)
    for part in ("model.layers.1.mlp", f"{ffn.rows} rows", "GiB", "`cpu`", "reward='spectral'"):
        assert part in str(error)


def test_only_work_on_a_disk_has_little_room_three_times_the_largest_ffn(tiny_model, tmp_path):
    model = tiny_model("llama")
    assert room_on_disk(find_ffns(model)) is None
    checkpoint = open_checkpoint(save(model, tmp_path / "model"))
    ffn = 4 * 3 * 80 * 32  # bytes of three matrices in float32
    assert room_on_disk(checkpoint.ffns) == 3 * ffn + 2**24
    assert room_on_disk(checkpoint.ffns, taken=1000) == 3 * ffn + 2**24 - 1000


@pytest.fixture
def told(monkeypatch):
    """Return what the allocator is told, instead of telling it."""
    told = {}
    library = SimpleNamespace(mallopt=told.__setitem__)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(memory.sys, "platform", "linux")
    for name in ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    return told


def test_heaps_keep_little_inside_and_as_much_as_ever_afterwards(told):
    with given_back_at_once():
        assert told == {-3: 2**20, -1: 2**20}
    assert told == {-3: 2**25, -1: 2**26}


def test_an_allocator_that_the_user_has_set_is_left_alone(told, monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    with given_back_at_once():
        pass
    assert told == {}


def test_an_allocator_that_cannot_be_told_is_left_alone(told, monkeypatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: SimpleNamespace())
    with given_back_at_once():
        pass
    assert told == {}
