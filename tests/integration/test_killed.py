"""Whatever ends a run that prunes a checkpoint, the target is absent or complete.

Every time Python touches the disk an audit event is raised, before it happens. A process that kills
itself at the n-th one dies at the same point every time: while rows are decided on, amid a shard,
between two files, before the target gets its name, and after.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

import yopo
from conftest import assert_same, build, files_in, save, tensors_in
from yopo import PolicyPruner

WORK = """
import json, os, resource, shutil, signal, sys, traceback
from pathlib import Path
from conftest import build, files_in, save
import yopo
from yopo.checkpoint import open_checkpoint

ROOT = Path(sys.argv[1])
SOURCE, TARGET = ROOT / "source", ROOT / "place" / "target"
WATCHED = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.copyfile"}

def child(work):
    sys.stdout.flush()
    if (process := os.fork()) == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

def prune(kill_at=None, log=None):
    count = [0]
    def look(event, arguments):
        if event not in WATCHED:
            return
        paths = [str(a) for a in arguments if isinstance(a, str | os.PathLike)]
        if not any(path.startswith(str(ROOT)) for path in paths) or paths[0] == str(ROOT / "log"):
            return
        count[0] += 1
        if count[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if log is not None:
            log.append([event, *(path.removeprefix(str(ROOT) + "/") for path in paths)])
    sys.addaudithook(look)
    yopo.prune_checkpoint(SOURCE, TARGET, 0.4)

def listed():
    log = []
    prune(log=log)
    (ROOT / "log").write_text(json.dumps(log))

open_checkpoint(save(build("llama"), SOURCE))  # imports what it needs, for all children
assert child(listed) == 0
TARGET.rename(ROOT / "expected")
(ROOT / "place").rmdir()
events = json.loads((ROOT / "log").read_text())
total, most = len(events), int(sys.argv[2])
points = {1 + n * (total - 1) // most for n in range(most)} | set(range(total - 6, total + 1))
found, expected, source = [], files_in(ROOT / "expected"), files_in(SOURCE)
for point in sorted(points):
    status = child(lambda: prune(kill_at=point))
    after = {
        "point": point,
        "status": status,
        "event": events[point - 1],
        "target": None if not TARGET.exists() else files_in(TARGET) == expected,
        "left": sorted(files_in(ROOT / "place")) if not TARGET.exists() else [],
    }
    after["again"] = None if TARGET.exists() else child(prune)
    after["is_equal"] = files_in(TARGET) == expected
    after["source"] = files_in(SOURCE) == source
    shutil.rmtree(TARGET)
    after["rest"] = [str(path) for path in (ROOT / "place").iterdir()]
    shutil.rmtree(ROOT / "place")
    found.append(after)

def limited(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        yopo.prune_checkpoint(SOURCE, TARGET, 0.4)
    except OSError as error:
        sys.stdout.write(type(error).__name__)

def refused(limit):
    here, there = os.pipe()
    status = child(lambda: (os.dup2(there, 1), limited(limit), sys.stdout.flush()))
    os.close(there)
    return {
        "error": os.read(here, 100).decode() if status == 0 else status,
        "left": [str(path) for path in ROOT.glob("place/**/*")],
        "source": files_in(SOURCE) == source,
    }

told = {limit: refused(limit) for limit in (1000, 9000)}
print(json.dumps({"events": events, "found": found, "limited": told}))
"""

POINTS = 14


@pytest.fixture(scope="module")
def killed(tmp_path_factory, run_forked):
    """What was there after each kill, and after the run that followed."""
    done = run_forked("-c", WORK, tmp_path_factory.mktemp("killed"), POINTS)
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(**json.loads(done.stdout))


def test_the_target_is_absent_or_complete_wherever_a_run_is_killed(killed):
    for after in killed.found:
        assert after["status"] == -signal.SIGKILL, after
        assert after["target"] in (None, True), after


def test_the_source_is_as_it_was_wherever_a_run_is_killed(killed):
    assert all(after["source"] for after in killed.found)


def test_a_second_run_starts_over_and_ends_with_the_same(killed):
    for after in killed.found:
        assert after["again"] in (None, 0), after
        assert after["is_equal"], after


def test_a_second_run_clears_away_what_the_first_has_left(killed):
    for after in killed.found:
        if after["again"] is not None:
            assert after["rest"] == [], after
    assert any(after["left"] for after in killed.found)


def test_runs_were_killed_in_every_stage(killed):
    """While deciding, amid several shards, amid other files, before the last name and after it."""
    events, found = killed.events, killed.found
    killed_at = [after["point"] for after in found]
    shards = [n for n, (_, path, *_) in enumerate(events, 1) if "partial/model-" in path]
    renames = {paths[-1]: n for n, (event, *paths) in enumerate(events, 1) if event == "os.rename"}
    renamed = renames["place/target"]
    config = next(n for n, (_, path, *_) in enumerate(events, 1) if "partial/config.json" in path)
    assert any(point < shards[0] for point in killed_at)
    assert len([point for point in killed_at if shards[0] < point < shards[-1]]) >= 5
    assert any(config <= point < renamed for point in killed_at)
    assert renamed in killed_at
    assert [after["target"] for after in found if after["point"] > renamed].count(True) >= 1
    assert all(after["target"] is None for after in found if after["point"] <= renamed)
    parts = {len(after["left"]) for after in found if after["target"] is None}
    assert len(parts) >= 5  # what lay in the hidden folder differed


# A full disk.


@pytest.fixture
def source(tmp_path):
    return save(build("llama"), tmp_path / "source")


def expected_from(source, folder):
    yopo.prune_checkpoint(source, folder, 0.4)
    return tensors_in(folder)


def test_a_file_that_may_not_grow_ends_the_run_and_leaves_nothing(killed):
    """The system refuses to write for real: while deciding, and amid a shard."""
    for limit, told in killed.limited.items():
        assert told["error"] == "OSError", limit
        assert told["left"] == [], limit
        assert told["source"], limit


@pytest.mark.parametrize("call", [1, 4, 9])
def test_a_disk_that_is_full_amid_a_shard_leaves_nothing(source, tmp_path, monkeypatch, call):
    calls, write = [], yopo.shards._copied_by_system

    def full(*arguments):
        calls.append(arguments)
        if len(calls) >= call:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*arguments)

    before = files_in(source)
    monkeypatch.setattr("yopo.shards._copied_by_system", full)
    with pytest.raises(OSError, match="No space left"):
        yopo.prune_checkpoint(source, tmp_path / "target", 0.4)
    assert len(calls) >= call
    assert list(tmp_path.iterdir()) == [source]
    assert files_in(source) == before
    monkeypatch.undo()
    yopo.prune_checkpoint(source, tmp_path / "target", 0.4)
    assert tensors_in(tmp_path / "target").keys() == tensors_in(source).keys()


@pytest.mark.parametrize("name", ["shutil.copyfile", "yopo.rewriting._write_json"])
def test_a_disk_that_is_full_amid_the_other_files_leaves_nothing(
    source, tmp_path, monkeypatch, name
):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(name, full)
    with pytest.raises(OSError, match="No space left"):
        yopo.prune_checkpoint(source, tmp_path / "target", 0.4)
    assert list(tmp_path.iterdir()) == [source]


@pytest.fixture
def small_disk(tmp_path):
    """Return the function that makes a disk of so many KiB, for real."""
    mounted = []

    def of(size):
        place = tmp_path / f"disk-{size}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(place)]
        if shutil.which("mount") is None:
            pytest.skip("there is no `mount`")
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("nothing may be mounted here")
        mounted.append(place)
        return place

    yield of
    for place in mounted:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.parametrize("size", [4, 16, 40, 72])
def test_a_disk_that_is_really_full_ends_the_run_and_leaves_nothing(
    source, tmp_path, small_disk, monkeypatch, size
):
    disk = small_disk(size)
    usage = shutil.disk_usage(disk)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=2**40))
    with pytest.raises(OSError, match="No space left on device"):
        yopo.prune_checkpoint(source, disk / "deep" / "target", 0.4)
    assert list(disk.iterdir()) == []


def test_a_disk_that_is_too_small_is_told_beforehand(source, small_disk):
    disk = small_disk(200)
    with pytest.raises(OSError, match=r"and 0\.2 MB are free"):
        yopo.prune_checkpoint(source, disk / "target", 0.4)
    assert list(disk.iterdir()) == []


def test_another_disk_than_the_sources_will_do(source, tmp_path, small_disk):
    disk = small_disk(4096)
    yopo.prune_checkpoint(source, disk / "target", 0.4)
    assert_same(tensors_in(disk / "target"), expected_from(source, tmp_path / "here"))
    assert [file.name for file in disk.iterdir()] == ["target"]


# Ctrl-C.


@pytest.mark.parametrize("stage", ["yopo.on_disk._put_away", "yopo.on_disk._write_shard"])
def test_ctrl_c_leaves_nothing(source, tmp_path, monkeypatch, stage):
    module, _, name = stage.rpartition(".")
    work, calls = getattr(sys.modules[module], name), []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return work(*arguments)

    before = files_in(source)
    monkeypatch.setattr(stage, interrupted)
    with pytest.raises(KeyboardInterrupt):
        yopo.prune_checkpoint(source, tmp_path / "deep" / "target", 0.4, pruner=PolicyPruner.lean())
    assert list(tmp_path.iterdir()) == [source]
    assert files_in(source) == before
