import json
import os
import shutil
import stat
import tempfile
from pathlib import Path

import pytest
import torch

from yopo import PolicyFileError
from yopo.files import FORMAT, read_folder, write_folder

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2])}


def write(folder, **config):
    write_folder(folder, "plan", config, TENSORS)


def contents(folder):
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def test_what_was_written_is_read_back(tmp_path):
    write_folder(tmp_path / "new" / "folder", "plan", {"ratio": 0.1}, TENSORS, card="# Card\n")
    config, tensors = read_folder(tmp_path / "new" / "folder", "plan")
    assert config["ratio"] == 0.1
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        name: tensor.tolist() for name, tensor in TENSORS.items()
    }
    assert (tmp_path / "new" / "folder" / "README.md").read_text() == "# Card\n"
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["folder"]


def test_what_was_written_before_is_replaced(tmp_path):
    write(tmp_path, ratio=0.1)
    write(tmp_path, ratio=0.2)
    assert read_folder(tmp_path, "plan")[0]["ratio"] == 0.2


def test_the_card_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "README.md").write_text("a model\n")
    write_folder(tmp_path, "plan", {}, TENSORS, card="# Card\n")
    assert (tmp_path / "README.md").read_text() == "a model\n"


def test_views_gradients_and_shared_memory_can_be_written(tmp_path):
    whole = torch.arange(12.0, requires_grad=True)
    tensors = {"a": whole, "b": whole, "c": whole[3:7], "d": whole.view(3, 4).T}
    write_folder(tmp_path, "plan", {}, tensors)
    read = read_folder(tmp_path, "plan")[1]
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_both_files_can_be_read_by_whom_the_umask_lets(tmp_path):
    previous = os.umask(0o022)
    try:
        write(tmp_path / "plan")
    finally:
        os.umask(previous)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "plan").iterdir()}
    assert modes == {0o644}


@pytest.mark.parametrize("below", ["file", "file/plan", "file/deep/plan"])
def test_a_path_that_cannot_be_written_is_an_error_and_leaves_nothing(tmp_path, below):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PolicyFileError, match=r"cannot write the plan to `.*file"):
        write(tmp_path / below)
    assert contents(tmp_path) == {"file": b"in the way"}


def test_a_folder_that_may_be_written_is_enough_whatever_its_parent_allows():
    parent = Path(tempfile.mkdtemp())
    parent.chmod(0o755)
    (parent / "plan").mkdir()
    user = 65534 if os.geteuid() == 0 else os.geteuid()
    os.chown(parent / "plan", user, -1)
    (parent).chmod(0o555)
    root = os.geteuid()
    os.seteuid(user)
    try:
        write(parent / "plan")
        assert sorted(contents(parent / "plan")) == ["plan.safetensors", "plan_config.json"]
        with pytest.raises(PolicyFileError, match=r"cannot write the plan to"):
            write(parent / "other")
    finally:
        os.seteuid(root)
        parent.chmod(0o755)
        shutil.rmtree(parent)


@pytest.mark.parametrize("existed", [False, True])
def test_a_write_that_fails_leaves_no_new_folder(tmp_path, monkeypatch, existed):
    if existed:
        (tmp_path / "plan").mkdir()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("yopo.files.save", full)
    with pytest.raises(PolicyFileError, match=r"No space left on device"):
        write(tmp_path / "plan")
    assert [file.name for file in tmp_path.rglob("*")] == (["plan"] if existed else [])


def test_a_write_that_fails_leaves_the_old_files_as_they_were(tmp_path, monkeypatch):
    write(tmp_path / "plan", ratio=0.1)
    before = contents(tmp_path / "plan")
    monkeypatch.setattr("yopo.files._checksum", lambda file: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(tmp_path / "plan", ratio=0.2)
    assert contents(tmp_path / "plan") == before
    assert [file.name for file in tmp_path.iterdir()] == ["plan"]


def test_a_disk_that_fails_between_the_two_moves_is_noticed_by_the_reader(tmp_path, monkeypatch):
    write(tmp_path / "plan", ratio=0.1)
    replace = Path.replace

    def failing(self, target):
        if self.name == "plan_config.json":
            raise OSError(28, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(PolicyFileError, match=r"No space left on device"):
        write_folder(tmp_path / "plan", "plan", {}, {"a": torch.ones(1)})
    with pytest.raises(PolicyFileError, match=r"is damaged: it is not the file that"):
        read_folder(tmp_path / "plan", "plan")


@pytest.mark.parametrize("name", ["plan_config.json", "plan.safetensors"])
def test_a_missing_file_is_named(tmp_path, name):
    write(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(PolicyFileError, match=f"holds no plan: `{name}` is missing"):
        read_folder(tmp_path, "plan")


def test_a_missing_folder_and_a_file_in_its_place_are_told(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "none", tmp_path / "file", str(tmp_path / "none")):
        with pytest.raises(PolicyFileError, match=r"holds no plan: `plan_config.json` is missing"):
            read_folder(path, "plan")


@pytest.mark.parametrize("keep", [0, 1, 8, 40, -1])
@pytest.mark.parametrize("name", ["plan_config.json", "plan.safetensors"])
def test_a_truncated_file_is_damaged(tmp_path, name, keep):
    write(tmp_path)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[:keep] if keep >= 0 else data[:-3])
    with pytest.raises(PolicyFileError, match=f"{name}` is damaged"):
        read_folder(tmp_path, "plan")


def test_one_flipped_bit_is_damage(tmp_path):
    write(tmp_path)
    data = bytearray((tmp_path / "plan.safetensors").read_bytes())
    data[-5] ^= 1
    (tmp_path / "plan.safetensors").write_bytes(data)
    with pytest.raises(PolicyFileError, match=r"is damaged: it is not the file that .* describes"):
        read_folder(tmp_path, "plan")


@pytest.mark.parametrize("text", [b"\xff\xfe\x00", b"{", b"", b"null garbage"])
def test_a_garbled_config_is_damaged(tmp_path, text):
    write(tmp_path)
    (tmp_path / "plan_config.json").write_bytes(text)
    with pytest.raises(PolicyFileError, match=r"plan_config\.json` is damaged"):
        read_folder(tmp_path, "plan")


@pytest.mark.parametrize("document", [[], 3, None, {}, {"kind": "yopo-policy"}, {"kind": None}])
def test_a_foreign_config_is_not_ours(tmp_path, document):
    write(tmp_path)
    (tmp_path / "plan_config.json").write_text(json.dumps(document))
    with pytest.raises(PolicyFileError, match=r"was not written by yopo as a plan"):
        read_folder(tmp_path, "plan")


@pytest.mark.parametrize("version", [FORMAT + 1, 99, None, "1", 1.5])
def test_a_newer_or_unknown_format_says_to_update(tmp_path, version):
    write(tmp_path)
    file = tmp_path / "plan_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": version}))
    with pytest.raises(PolicyFileError, match=r"this yopo reads up to 1. Update yopo"):
        read_folder(tmp_path, "plan")


def test_a_tensor_file_that_matches_its_checksum_but_is_none_is_damaged(tmp_path, monkeypatch):
    write(tmp_path)
    (tmp_path / "plan.safetensors").write_bytes(b"no tensors here")
    monkeypatch.setattr(
        "yopo.files._checksum", lambda file: json.loads(config.read_text())["sha256"]
    )
    config = tmp_path / "plan_config.json"
    with pytest.raises(PolicyFileError, match=r"plan\.safetensors` is damaged"):
        read_folder(tmp_path, "plan")


def test_the_working_directory_itself_can_be_written_and_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (".", "plan", Path("plan")):
        write(path, ratio=0.3)
        assert read_folder(path, "plan")[0]["ratio"] == 0.3
    assert sorted(contents(tmp_path / "plan")) == ["plan.safetensors", "plan_config.json"]
