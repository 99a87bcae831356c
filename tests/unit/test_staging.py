import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import files_in
from yopo import InvalidArgumentError
from yopo.staging import check_space, check_target, staged, staging_folder

HOLDER = """
import sys
from pathlib import Path
from yopo.staging import staged

with staged(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("half a file")
    print("ready", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def target(tmp_path):
    return tmp_path / "place" / "target"


@pytest.fixture
def holder(target):
    """A live process that is writing the target."""
    command = [sys.executable, "-c", HOLDER, str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        yield process
        process.kill()


def test_the_target_is_absent_until_everything_is_there(target):
    with staged(target) as folder:
        assert folder == staging_folder(target)
        assert list(folder.iterdir()) == []
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("whole")
        assert not target.exists()
    assert files_in(target) == {"deep/file": b"whole"}
    assert list(target.parent.iterdir()) == [target]


def test_an_empty_folder_becomes_the_target(target):
    target.mkdir(parents=True)
    with staged(target) as folder:
        (folder / "file").write_text("whole")
    assert files_in(target) == {"file": b"whole"}


def test_a_relative_target_is_written_beside_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with staged(Path("target")) as folder:
        (folder / "file").write_text("whole")
        assert folder.parent == tmp_path
    assert files_in(tmp_path) == {"target/file": b"whole"}


@pytest.mark.parametrize("name", ["model-v1.5", ".hidden", "a.partial", "мodel"])
def test_any_name_will_do(tmp_path, name):
    with staged(tmp_path / name) as folder:
        (folder / "file").write_text("whole")
    assert files_in(tmp_path) == {f"{name}/file": b"whole"}


def test_targets_whose_names_begin_alike_can_be_written_at_once(tmp_path):
    with staged(tmp_path / "model-1.1") as one, staged(tmp_path / "model-1.2") as two:
        (one / "file").write_text("one")
        (two / "file").write_text("two")
    assert files_in(tmp_path) == {"model-1.1/file": b"one", "model-1.2/file": b"two"}


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit, OSError])
@pytest.mark.parametrize("existed", [False, True])
def test_an_error_leaves_nothing(tmp_path, target, error, existed):
    if existed:
        target.parent.mkdir()
    with pytest.raises(error), staged(target) as folder:  # noqa: PT012
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("half")
        raise error
    assert [path.name for path in tmp_path.rglob("*")] == (["place"] if existed else [])


def test_ctrl_c_leaves_nothing(tmp_path, target):
    with pytest.raises(KeyboardInterrupt), staged(target) as folder:  # noqa: PT012
        (folder / "file").write_text("half")
        signal.raise_signal(signal.SIGINT)
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_came_up_in_the_meantime_is_left_alone(target):
    with pytest.raises(OSError, match="target"), staged(target) as folder:  # noqa: PT012
        (folder / "file").write_text("ours")
        target.mkdir()
        (target / "file").write_text("theirs")
    assert files_in(target.parent) == {"target/file": b"theirs"}


def test_what_a_killed_process_left_is_cleared_away(target, holder):
    holder.kill()
    holder.wait()
    left = staging_folder(target)
    assert files_in(left) == {"half": b"half a file"}
    assert not target.exists()
    (left / "deep").mkdir()
    (left / "deep" / "file").write_text("more")
    with staged(target) as folder:
        assert list(folder.iterdir()) == []
        (folder / "file").write_text("whole")
    assert files_in(target.parent) == {"target/file": b"whole"}


def test_a_second_process_is_refused_and_does_no_harm(target, holder):
    told = r"another process is writing `.*target`"
    with pytest.raises(InvalidArgumentError, match=told), staged(target):
        pytest.fail("two write at once")
    assert files_in(staging_folder(target)) == {"half": b"half a file"}
    holder.communicate(b"\n")
    assert files_in(target.parent) == {"target/half": b"half a file"}


def test_a_second_process_cannot_come_between_the_last_file_and_the_name(target, monkeypatch):
    rename = Path.rename

    def meanwhile(self, other):
        with pytest.raises(InvalidArgumentError, match="another process"), staged(target):
            pytest.fail("two write at once")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", meanwhile)
    with staged(target) as folder:
        (folder / "file").write_text("whole")
    assert files_in(target.parent) == {"target/file": b"whole"}


def test_a_lock_whose_file_is_gone_is_none(target, monkeypatch):
    """Who opens the lock before it is removed, and gets it after, must not write."""
    stat = Path.stat

    def gone(self, **settings):
        if self.suffix == ".lock":
            raise FileNotFoundError(self)
        return stat(self, **settings)

    target.parent.mkdir()
    monkeypatch.setattr(Path, "stat", gone)
    with pytest.raises(InvalidArgumentError, match="another process"), staged(target):
        pytest.fail("the lock was not ours")


def test_a_disk_without_locks_is_written_all_the_same(target, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("yopo.staging.fcntl.flock", refuse)
    with staged(target) as folder:
        (folder / "file").write_text("whole")
    assert files_in(target.parent) == {"target/file": b"whole"}


@pytest.mark.parametrize(
    ("needed", "free", "told"),
    [
        (0, 10**6, "takes 1.0 MB, and 1.0 MB are"),
        (123_400_000, 1000, "takes 124.4 MB, and 0.0 MB are"),
        (6 * 10**9, 21 * 10**8, "takes 6.0 GB, and 2.1 GB are"),
    ],
)
def test_too_little_disk_is_told_in_units_that_show_it(tmp_path, monkeypatch, needed, free, told):
    usage = SimpleNamespace(free=free)
    monkeypatch.setattr("yopo.staging.shutil.disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match=f"the pruned checkpoint {told} free"):
        check_space(tmp_path, needed)
    usage.free = needed + 2**20
    check_space(tmp_path, needed)


def test_one_after_another_may_write(target):
    for number in range(3):
        with staged(target.with_name(f"target-{number}")) as folder:
            (folder / "file").write_text(str(number))
    assert len(files_in(target.parent)) == 3


def test_a_target_that_is_absent_or_empty_will_do(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / "empty").mkdir()
    for target in ("empty", "none", "deep/none", "source-2"):
        check_target(tmp_path / target, source)


def test_a_target_that_holds_something_is_refused(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / ".hidden").touch()
    with pytest.raises(InvalidArgumentError, match=r"full` exists and is not empty\. Name another"):
        check_target(tmp_path / "full", source)


def test_a_target_that_is_no_folder_is_refused(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "to-file").symlink_to(tmp_path / "file")
    (tmp_path / "to-folder").symlink_to(tmp_path / "empty")
    (tmp_path / "to-nothing").symlink_to(tmp_path / "nothing")
    for name in ("file", "to-file", "to-folder", "to-nothing"):
        with pytest.raises(InvalidArgumentError, match=f"{name}` exists and is no folder"):
            check_target(tmp_path / name, source)


def test_a_target_inside_the_source_is_refused(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / "link").symlink_to(source)
    monkeypatch.chdir(source)
    for target in (source, source / "a", tmp_path / "link" / "a", Path("a"), Path("../source/a/b")):
        with pytest.raises(InvalidArgumentError, match=r"lies inside the source `"):
            check_target(target, source)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become somebody else")
def test_a_folder_that_cannot_be_written_is_the_systems_error(tmp_path, target):
    target.parent.mkdir(mode=0o555)
    os.seteuid(65534)
    try:
        with pytest.raises(PermissionError), staged(target):
            pytest.fail("nobody may write here")
    finally:
        os.seteuid(0)
    assert list(target.parent.iterdir()) == []


def test_whoever_may_read_the_folder_around_may_read_the_target(target):
    previous = os.umask(0o022)
    try:
        with staged(target):
            pass
    finally:
        os.umask(previous)
    assert target.stat().st_mode & 0o777 == 0o755
