"""What a report says of a cut, against what the models themselves say."""

import base64
import json
import logging
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
import yaml
from scipy.stats import ks_2samp
from transformers import AutoModelForCausalLM

import yopo
from conftest import build, files_in, save
from yopo import InvalidArgumentError, NotFittedError, PolicyFileError, PolicyPruner, PruningReport
from yopo.card import MARK
from yopo.evaluation import Score, TaskReport, TaskScore
from yopo.pages import to_html
from yopo.speed.result import Speed, SpeedReport

TASKS = TaskReport(
    names=("pruned", "dense"),
    scores=(
        TaskScore("piqa", "acc_norm", 100, 0.5, Score(0.7, 0.01), Score(0.75, 0.01)),
        TaskScore("words", "word_perplexity", 9, None, Score(12.5), Score(11.0)),
    ),
    members=(),
    pinned={"lm-eval": "0.4.9", "task versions": {"piqa": 1.0, "words": 1.0}},
)


@pytest.fixture(autouse=True)
def no_noise():
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture
def without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def pruned(kind="llama", *, ratio=0.4, pruner=None, **overrides):
    """Prune a model, and return the pruner, the dense model and the pruned one."""
    pruner = pruner or PolicyPruner.lean(seed=3)
    model = build(kind, **overrides)
    pruner.fit(model).prune(model, ratio)
    return pruner, build(kind, **overrides), model


def speed():
    one = Speed(
        name="pruned",
        device="cpu",
        dtype="float32",
        parameters=10,
        bytes=40,
        prefill=(100.0, 110.0),
        decode=None,
        prefill_bound=150.0,
        decode_bound=None,
        run_peak=None,
        operations_per_second=1e9,
        bytes_per_second=1e9,
    )
    return SpeedReport(
        one, replace(one, name="dense", decode=(1.0, 2.0), decode_bound=3.0), 1, 8, 4
    )


@pytest.fixture(scope="module")
def full():
    """A report that holds everything a report can hold."""
    pruner = PolicyPruner(reward="spectral", restore=False, episodes=2, seed=3)
    pruner, dense, _ = pruned(pruner=pruner)
    report = replace(pruner.report, base="org/name", metadata={"license": "mit"})
    report = report.with_spectra(dense).with_perplexity("wiki|text <b>", dense=5.5, pruned=6.5)
    return report.with_tasks(TASKS).with_speed(speed())


def settings_in(text):
    """Return the settings of a Markdown table of two columns."""
    rows = [line.strip("| ").split("|") for line in text.splitlines() if line.startswith("|")]
    return {row[0].strip(): row[1].strip() for row in rows if len(row) == 2}


# What a cut says of itself.


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2", "t5", "qwen2_moe", "gpt_oss"])
def test_sizes_widths_and_ratios_are_those_of_the_models(kind):
    pruner, dense, model = pruned(kind)
    report = pruner.report
    for sizes, counted in ((report.before, dense), (report.after, model)):
        ffns = yopo.find_ffns(counted)
        assert sizes.parameters == sum(p.numel() for p in counted.parameters())
        assert sizes.bytes == 4 * sizes.parameters
        assert sizes.ffn_rows == sum(ffn.rows for ffn in ffns)
    rows, widths = ({f.name: f.rows for f in yopo.find_ffns(m)} for m in (dense, model))
    assert (report.plan.rows, report.plan.widths) == (rows, widths)
    assert report.plan.ratio == 0.4
    assert report.plan.ratio_reached == 1 - report.after.ffn_rows / report.before.ffn_rows
    assert report.model_class == type(model).__name__
    assert not report.needs_yopo


def test_the_report_is_of_the_last_cut_and_there_is_none_before():
    pruner = PolicyPruner.lean().fit(build("llama"))
    with pytest.raises(NotFittedError, match="this pruner has pruned nothing yet"):
        _ = pruner.report
    pruner.plan(build("llama"))
    with pytest.raises(NotFittedError):
        _ = pruner.report
    for ratio in (0.2, 0.5):
        pruner.prune(build("llama"), ratio)
        assert pruner.report.plan.ratio == ratio


def test_a_cut_that_fails_leaves_the_report_of_the_one_before():
    pruner, _, _ = pruned()
    before = pruner.report
    with pytest.raises(InvalidArgumentError):
        pruner.prune(build("llama"), 1.5)
    assert pruner.report is before


def test_how_it_was_made_can_be_made_again():
    model = build("llama")
    pruner = PolicyPruner(ratio=0.2, reward="spectral", restore=False, episodes=2, seed=5)
    pruner.fit(model).prune(model, parameters=24_000, layers=iter([1]))
    report = pruner.report
    assert report.call == (
        "yopo.PolicyPruner(ratio=0.2, episodes=2, reward='spectral', restore=False, seed=5)"
        ".fit(model).prune(model, parameters=24000, layers=[1])"
    )
    again = build("llama")
    eval(report.call, {"yopo": yopo, "model": again})
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    assert report.recipe["seed"] == 5
    assert report.history == tuple(pruner.history)
    assert report.needs_yopo
    assert report.seconds.keys() == {"fit", "decide", "cut"}
    assert all(spent >= 0 for spent in report.seconds.values())
    assert report.versions["torch"] == torch.__version__


def test_a_policy_from_disk_is_told_by_its_folder(tmp_path):
    PolicyPruner(evidence="weights").fit(build("llama")).save_policy(tmp_path / "policy")
    pruner = PolicyPruner.from_policy(tmp_path / "policy", evidence="weights")
    pruner.prune(build("llama"))
    place = str(tmp_path / "policy")
    assert pruner.report.call == (
        f"yopo.PolicyPruner.from_policy({place!r}, evidence='weights').prune(model)"
    )
    assert pruner.report.seconds.keys() == {"decide", "cut"}


@pytest.mark.parametrize(
    ("kind", "evidence", "used"),
    [("llama", "auto", "self"), ("llama", "weights", None), ("t5", "auto", "self")],
)
def test_the_evidence_is_told_that_was_used(kind, evidence, used, monkeypatch):
    monkeypatch.setitem(yopo.writing.write_tokens.__kwdefaults__, "sequences", 8)
    pruner, _, _ = pruned(kind, pruner=PolicyPruner(evidence=evidence))
    assert pruner.report.recipe["evidence"] == evidence
    assert pruner.report.recipe.get("evidence_used") == used


def test_the_base_is_where_the_model_came_from(tmp_path, tiny_llama):
    folder = save(tiny_llama(), tmp_path / "deep" / "my-llama")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    model = AutoModelForCausalLM.from_pretrained(folder)
    pruner = PolicyPruner.lean().fit(model)
    pruner.prune(model)
    assert pruner.report.base == "my-llama"
    assert pruner.report.metadata == {"license": "mit"}
    assert str(tmp_path) not in json.dumps(pruner.report.to_dict())
    unnamed, _, _ = pruned()
    assert unnamed.report.base == ""
    assert "Of LlamaForCausalLM (LlamaForCausalLM)" in str(unnamed.report)


# Against the dense model.


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2", "qwen2_moe", "gpt_oss"])
def test_distances_and_spectra_are_those_of_scipy(kind):
    pruner, dense, _ = pruned(kind)
    report = pruner.report.with_spectra(dense)
    ffns = yopo.find_ffns(dense)
    assert list(report.ks) == [ffn.name for ffn in ffns]
    for ffn in ffns:
        gate_FD = ffn.expand_weights()[0].double()
        kept_K = report.plan.kept[ffn.name]
        before, after = torch.linalg.svdvals(gate_FD), torch.linalg.svdvals(gate_FD[kept_K])
        assert report.ks[ffn.name] == pytest.approx(ks_2samp(before, after).statistic, abs=1e-12)
        assert np.allclose(report.spectra[ffn.name][0], before, rtol=1e-5)
        assert np.allclose(report.spectra[ffn.name][1], after, rtol=1e-5)
        norms = gate_FD.norm(dim=1)
        top = set(norms.argsort()[-(ffn.rows // 10) :].tolist())
        share = report.kept_by_norm[ffn.name]
        assert sum(share) / 10 == pytest.approx(len(kept_K) / ffn.rows)
        if ffn.rows % 10 == 0:
            assert share[9] == pytest.approx(len(top & set(kept_K.tolist())) / len(top))


def test_a_folder_of_the_dense_model_does_as_well(tmp_path):
    pruner, dense, _ = pruned("llama")
    folder = save(dense, tmp_path / "dense")
    assert pruner.report.with_spectra(folder) == pruner.report.with_spectra(dense)
    assert pruner.report.with_spectra(str(folder)).ks


def test_spectra_of_wide_matrices_are_thinned_out_and_keep_their_ends():
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    pruner, dense, _ = pruned(**sizes)
    report = pruner.report.with_spectra(dense)
    ((before, after),) = report.spectra.values()
    assert len(before) == len(after) == 200
    exact = torch.linalg.svdvals(yopo.find_ffns(dense)[0].expand_weights()[0].double())
    assert before[0] == pytest.approx(float(exact[0]), rel=1e-5)
    assert before[-1] == pytest.approx(float(exact[-1]), rel=1e-5)


def test_ffns_that_were_not_cut_have_a_distance_of_zero():
    model = build("llama")
    pruner = PolicyPruner.lean().fit(model)
    pruner.prune(model, 0.5, layers=[0])
    report = pruner.report.with_spectra(build("llama"))
    assert report.ks["model.layers.0.mlp"] > 0
    assert report.ks["model.layers.1.mlp"] == 0
    assert "0.5000 of the rows of the 1 FFNs that were cut" in str(report)


def test_heads_that_were_cut_too_are_counted_and_have_no_spectrum():
    pruner = PolicyPruner.prunenet(episodes=1, attention=True)
    pruner, dense, model = pruned(pruner=pruner)
    report = pruner.report.with_spectra(dense)
    assert report.after.parameters == sum(p.numel() for p in model.parameters())
    assert list(report.ks) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert len(report.plan.rows) > 2


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (
            lambda: build("opt"),
            r"another model than the one that was cut: it has no `model\.layers",
        ),
        (lambda: build("llama", intermediate_size=48), r"has 48 rows, the plan was made for 80"),
        (lambda: pruned()[2], r"has 48 rows, the plan was made for 80"),
        (lambda: build("llama", num_hidden_layers=3), r"the plan does not name it"),
    ],
    ids=["architecture", "width", "pruned", "depth"],
)
def test_another_model_than_the_dense_one_is_refused(other, told):
    with pytest.raises(InvalidArgumentError, match=told):
        pruned()[0].report.with_spectra(other())


# What is added.


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan"), "3", None])
def test_a_perplexity_is_a_positive_number(value):
    report = pruned()[0].report
    for numbers in ({"dense": value, "pruned": 2.0}, {"dense": 2.0, "pruned": value}):
        with pytest.raises(InvalidArgumentError, match="must be a positive finite number"):
            report.with_perplexity("text", **numbers)


def test_what_is_no_result_of_tasks_is_refused():
    with pytest.raises(InvalidArgumentError, match="must be a TaskReport"):
        pruned()[0].report.with_tasks(TASKS.to_dict())


def test_what_is_no_speed_is_refused():
    with pytest.raises(InvalidArgumentError, match="must be a SpeedReport"):
        pruned()[0].report.with_speed(speed().to_dict())


def test_how_a_perplexity_was_measured_is_told_beside_it():
    how = {"window": 256, "tokens": 12345, "dtype": "float32 and bfloat16"}
    report = pruned()[0].report.with_perplexity("wiki", dense=1, pruned=2, how=how)
    report = report.with_perplexity("mine", dense=1, pruned=2)
    assert report.measured == {"wiki": how}
    told = "wiki: window 256, tokens 12345, dtype float32 and bfloat16."
    assert told in str(report)
    assert PruningReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_a_recovery_is_told_on_page_and_card(full):
    report = replace(full, recovery={"call": "yopo recover pruned", "rank": 8, "data": "a.txt"})
    assert str(report).startswith("# org/name, pruned at a ratio of 0.4 and recovered\n")
    for text in (str(report), report.card()):
        assert "## Recovery" in text
        assert "yopo recover pruned" in text
        assert settings_in(text.partition("## Recovery")[2])["rank"] == "8"
    assert PruningReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_a_report_of_an_earlier_yopo_knows_of_no_recovery(full):
    values = full.to_dict()
    del values["recovery"]
    assert PruningReport.from_dict(values) == full


def test_adding_leaves_the_report_as_it_was(full):
    report = pruned()[0].report
    more = report.with_perplexity("a", dense=1, pruned=2).with_perplexity("b", dense=3, pruned=4)
    assert more.perplexities == {"a": (1.0, 2.0), "b": (3.0, 4.0)}
    assert report.perplexities == {}
    assert full.tasks == TASKS


def test_scores_are_told_as_the_evaluation_tells_them(full):
    told = " ".join(str(full).split())
    assert TASKS.settings in told
    for row in TASKS.rows():
        assert " ".join(f"| {' | '.join(row)} |".split()) in told


# As data.


def test_a_report_survives_json(full):
    assert PruningReport.from_dict(json.loads(json.dumps(full.to_dict(), allow_nan=False))) == full
    plain = pruned()[0].report
    assert PruningReport.from_dict(json.loads(json.dumps(plain.to_dict()))) == plain
    assert plain != full


def test_kept_rows_can_be_read_without_yopo(full):
    values = full.to_dict()
    for name, kept_K in full.plan.kept.items():
        bits = np.unpackbits(np.frombuffer(base64.b64decode(values["kept"][name]), np.uint8))
        assert bits.nonzero()[0].tolist() == kept_K.tolist()
        assert values["widths"][name] == len(kept_K)
    assert values["ratio"] == {"asked": 0.4, "reached": full.plan.ratio_reached}


def test_what_was_saved_is_loaded_from_folder_or_file(full, tmp_path):
    full.save(tmp_path / "a")
    assert PruningReport.load(tmp_path / "a") == full
    assert PruningReport.load(str(tmp_path / "a" / "report.json")) == full
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == [
        "kept_rows.png",
        "report.html",
        "report.json",
        "report.md",
        "rewards.png",
        "spectra.png",
        "speed.png",
    ]
    assert (tmp_path / "a" / "report.md").read_text("utf-8") == str(full)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda values: [values], "no report that yopo wrote"),
        (lambda values: values | {"kind": "other"}, "no report that yopo wrote"),
        (lambda values: values | {"format": 99}, "reads up to 1. Update yopo"),
        (lambda values: values | {"format": "x"}, "reads up to 1. Update yopo"),
        (lambda values: {k: v for k, v in values.items() if k != "before"}, "damaged"),
        (lambda values: values | {"kept": dict.fromkeys(values["kept"], "AA==")}, "damaged"),
        (lambda values: values | {"kept": dict.fromkeys(values["kept"], "?")}, "damaged"),
        (lambda values: values | {"ratio": {"asked": 2}}, r"damaged: `ratio` must be in"),
        (lambda values: values | {"speed": {"model": {}}}, "damaged"),
        (lambda values: values | {"history": [{"number": 0, "other": [1]}]}, "damaged"),
        (lambda values: values | {"ks": None}, "damaged"),
    ],
)
def test_a_damaged_foreign_or_newer_report_is_refused(full, tmp_path, change, told):
    (tmp_path / "pruning_report.json").write_text(json.dumps(change(full.to_dict())))
    with pytest.raises(PolicyFileError, match=told) as caught:
        PruningReport.load(tmp_path)
    assert str(tmp_path / "pruning_report.json") in str(caught.value)


def test_no_report_is_told_with_what_writes_one(tmp_path):
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(PolicyFileError, match=r"holds no report: `pruning_report\.json` is m"):
            PruningReport.load(place)
    (tmp_path / "report.json").write_bytes(b"\xff{")
    with pytest.raises(PolicyFileError, match="is damaged"):
        PruningReport.load(tmp_path)


# As a page.


def test_the_page_tells_everything_that_is_known(full):
    text = str(full)
    assert text.startswith("# org/name, pruned at a ratio of 0.4\n")
    titles = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    cut, measured = ["What was removed", "Widths", "How it was made"], ["Spectra", "Kept rows"]
    assert titles == [*cut, *measured, "Learning", "Perplexity", "Tasks", "Speed"]
    assert f"{full.plan.ratio_reached:.4f} of the FFN rows was removed; 0.4 was asked for" in text
    assert "2 episodes." in text
    assert "wiki\\|text &lt;b>" in text
    assert "75.00 ± 1.00" in text
    assert f"{full.ks['model.layers.0.mlp']:.4f}" in text
    settings = settings_in(text)
    assert settings["seed"] == "3"
    assert settings["ratio of the policy"] == "0.3"
    assert "seconds to cut" in settings


def test_what_is_not_known_has_no_section(full):
    text = str(pruned()[0].report)
    for title in ("Spectra", "Learning", "Perplexity", "Tasks", "Speed"):
        assert f"## {title}" not in text
    assert "learning_rate" not in text  # of a recipe that learns nothing
    assert "learning_rate" in str(full)


def test_the_html_page_stands_alone_and_shows_the_plots(full):
    page = full.to_html()
    assert page.count('src="data:image/svg+xml;base64,') == 4
    assert "http://" not in page
    assert "https://" not in page
    assert "wiki|text &lt;b&gt;" in page
    assert page == full.to_html()
    assert page.startswith(to_html("org/name, pruned at a ratio of 0.4", []).split("<h1>")[0])


def test_a_page_without_matplotlib_has_no_plots_and_says_so(
    full, tmp_path, without_matplotlib, caplog
):
    full.save(tmp_path)
    names = [file.name for file in tmp_path.iterdir()]
    assert sorted(names) == ["report.html", "report.json", "report.md"]
    assert "<img" not in (tmp_path / "report.html").read_text("utf-8")
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert 'pip install "yopo-prune[plot]"' in record.getMessage()


def test_eighty_layers_make_a_page_that_can_be_read(tmp_path):
    pruner, dense, _ = pruned(num_hidden_layers=80, hidden_size=16, intermediate_size=24)
    report = pruner.report.with_spectra(dense)
    report.save(tmp_path)
    text = str(report)
    assert "model.layers.0.mlp … model.layers.79.mlp" in text
    assert len(text.splitlines()) < 160
    assert (tmp_path / "report.html").stat().st_size < 1_000_000


# As a card.


def front_of(card):
    return yaml.safe_load(card.split("---")[1])


def test_the_card_says_what_the_hub_and_its_readers_ask_for(full):
    card = full.card()
    assert front_of(card) == {
        "base_model": "org/name",
        "library_name": "transformers",
        "license": "mit",
        "tags": ["yopo", "pruned"],
    }
    assert MARK in card
    assert full.call in card
    assert 'AutoModelForCausalLM.from_pretrained("path/to/this/folder"' in card
    assert settings_in(card)["seed"] == "3"
    for told in ("0.4 was asked for", "75.00 ± 1.00", "6.500", "tokens/s", "48"):
        assert told in card
    assert "seconds to" not in card
    assert full.seconds


def test_a_card_is_written_beside_a_saved_model_and_says_the_same_twice(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        pruner, _, model = pruned()
        save(model, folder)
        pruner.report.write_card(folder)
    assert files_in(folders[0]) == files_in(folders[1])
    report = PruningReport.load(folders[0])
    assert report == replace(pruner.report, seconds={})
    card = (folders[0] / "README.md").read_text("utf-8")
    assert card.startswith(pruner.report.card().strip())
    assert "base_model" not in front_of(card)  # it came from no folder and no hub
    assert AutoModelForCausalLM.from_pretrained(folders[0]).config.intermediate_size == 48


def test_a_card_of_somebody_else_is_kept_and_one_of_yopo_overwritten(tmp_path, full):
    (tmp_path / "README.md").write_text("# theirs")
    full.write_card(tmp_path)
    assert (tmp_path / "README.dense.md").read_text() == "# theirs"
    assert "[README.dense.md](README.dense.md)" in (tmp_path / "README.md").read_text("utf-8")
    full.with_perplexity("more", dense=1.25, pruned=2).write_card(tmp_path)
    assert sorted(files_in(tmp_path)) == ["README.dense.md", "README.md", "pruning_report.json"]
    assert "1.250" in (tmp_path / "README.md").read_text("utf-8")
    edited = (tmp_path / "README.md").read_text("utf-8").replace(MARK, "")
    (tmp_path / "README.md").write_text(edited)
    full.write_card(tmp_path)
    assert (tmp_path / "README.dense.md").read_text("utf-8") == edited
    assert (tmp_path / "README.dense.2.md").read_text() == "# theirs"


def test_a_card_needs_a_folder(tmp_path, full):
    with pytest.raises(InvalidArgumentError, match="Save the model there first"):
        full.write_card(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []
