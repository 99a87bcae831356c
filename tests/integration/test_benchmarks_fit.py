"""The benchmarks of training: what they compare with is right, and they run from end to end."""

import json

import pytest
import torch

import common
import fit
import published_loop
import scaling
from yopo import find_ffns
from yopo.reward import spectral_rewards


def test_the_published_loop_earns_what_yopo_earns_for_the_same_rows(tiny_model):
    model = tiny_model("opt")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.random.fork_rng():
        run = published_loop.fit(model, ratio=0.3, episodes=3)
    ffns = find_ffns(model)
    reward = spectral_rewards(ffns)
    for kept, earned in zip(run.kept, run.rewards, strict=True):
        rows = {ffn.name: kept_K[None] for ffn, kept_K in zip(ffns, kept, strict=True)}
        assert [len(kept_K) for kept_K in kept] == [int(0.7 * ffn.rows) for ffn in ffns]
        assert reward(rows).flatten().tolist() == pytest.approx(earned, rel=1e-2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_published_loop_learns_on_a_gated_model_too(tiny_model):
    with torch.random.fork_rng():
        run = published_loop.fit(tiny_model("llama"), ratio=0.3, episodes=1)
    assert len(run.rewards[0]) == 2


def test_the_benchmark_of_fit_runs_from_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    fit.main(["--shape", "tiny", "--skip-peer", "--repeats", "1", "--threads", "1"])
    (row,) = json.loads((tmp_path / "fit.json").read_text("utf-8"))["rows"]
    assert set(row["sides"]) == {"yopo", "loop"}
    assert row["check"]["ks"] < 1e-3
    assert row["check"]["reward"] < 1e-2
    assert row["phases"]["eigenvalues"] > 0
    page = (tmp_path / "fit.md").read_text("utf-8")
    assert "worked out" in page
    assert page.strip() in capsys.readouterr().out


def test_fewer_episodes_than_asked_for_are_worked_out_and_the_dense_part_counts_once():
    answer = {"seconds": 7.0, "busy": 14.0, "dense": 1.0, "mebibytes": 5.0}
    assert fit._summary([answer], measured=3, episodes=20)["whole"] == 1 + 20 * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_benchmark_says_so_and_measures_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    fit.main(["--shape", "llama-2-7b", "--device", "cuda"])
    assert "no CUDA device" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_the_exponent_of_a_power_law_is_found_and_drawn(tmp_path):
    rows = [
        {
            "variable": name,
            "value": value,
            "machine": "none",
            "time": 0.1 * value**1.5,
            "memory": 7.0,
        }
        for name, sweep in scaling.SWEEPS.items()
        for value in sweep["values"]
    ]
    values = [1.0, 2.0, 4.0]
    assert scaling.fitted(values, [3 * value**2 for value in values]) == pytest.approx((2, 3))
    assert "1.50" in scaling.page(rows)
    scaling.plot(tmp_path / "scaling.png", rows)
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
