"""The benchmarks of checkpoints and of ranks run, and keep what has been measured before."""

import json
import subprocess

import pytest

import checkpoint
import common
import ranks


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty folder for results; no page cache is emptied, and no disk waited for."""
    folder = tmp_path / "results"
    folder.mkdir()
    monkeypatch.setattr(common, "RESULTS", folder)
    monkeypatch.setattr(checkpoint, "CACHES", tmp_path / "drop_caches")
    monkeypatch.setattr("os.sync", lambda: None)
    return folder


def test_the_benchmark_of_checkpoints_runs_from_end_to_end_and_keeps_no_small_shape(
    results, tmp_path, monkeypatch, capsys, run_forked
):
    run = subprocess.run

    def forked(command, **settings):
        if command[0] == "cp":
            return run(command, **settings)
        return run_forked("-c", f"import os; os.sync = int\n{command[2]}", *command[3:])

    smaller = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2}
    smaller |= {"num_attention_heads": 4, "vocab_size": 64}
    monkeypatch.setitem(checkpoint.SHAPES, "small", smaller)
    monkeypatch.setattr("subprocess.run", forked)
    checkpoint.main(
        ["--shape", "small", "--folder", str(tmp_path), "--threads", "1", "--repeats", "1"]
    )
    told = capsys.readouterr().out
    assert "## small, 2 layers: 0.00 GB" in told
    for work in ("cp -r", "cut", "lean", "prunenet"):
        assert f"| {work:>8} |" in told
    assert list(results.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drop_caches", "results"]


def test_a_run_replaces_only_what_it_has_measured_again(results, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "SHAPES", {"wide": checkpoint.SHAPES["small"]})
    taken = {"seconds": 2.0, "anonymous": 10**6, "all": 10**6}
    monkeypatch.setattr(checkpoint, "run", lambda *_: dict(taken))

    def measured(*more):
        checkpoint.main(["--shape", "wide", "--folder", str(tmp_path), *more])
        rows = json.loads((results / "checkpoint.json").read_text("utf-8"))["rows"]
        return [(list(row["work"]), row["work"]["cp -r"][0]["seconds"]) for row in rows]

    assert measured("--only", "cut", "lean") == [(["cp -r", "cut", "lean"], 2.0)]
    taken["seconds"] = 3.0
    both = [(["cp -r", "cut", "lean"], 2.0), (["cp -r", "prunenet"], 3.0)]
    assert measured("--only", "prunenet") == both
    taken["seconds"] = 4.0
    assert measured() == [(["cp -r", "cut", "lean", "prunenet"], 4.0)]
    monkeypatch.setattr(checkpoint, "machine", lambda device: "another")
    assert len(measured("--only", "prunenet")) == 2
    assert "on another" in (results / "checkpoint.md").read_text("utf-8")


def test_the_benchmark_of_ranks_keeps_no_tiny_shape(results, monkeypatch, capsys):
    monkeypatch.setattr(
        ranks, "run", lambda *_, runs=1: [{"seconds": float(runs), "policy": "same"}]
    )
    ranks.main(["--shape", "tiny", "--repeats", "1"])
    assert "the shape of tiny" in capsys.readouterr().out
    assert list(results.iterdir()) == []
    ranks.main(["--repeats", "1"])
    assert "opt-125m" in (results / "ranks.md").read_text("utf-8")
