import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

import yopo
from conftest import GOLDEN
from yopo.cli import main
from yopo.embedded import model_path
from yopo.embedded.stories import HELD_OUT_SEED, write_text


@pytest.fixture
def saved(tiny_model, tmp_path):
    path = tmp_path / "model"
    tiny_model("llama").save_pretrained(path)
    return str(path)


@pytest.fixture
def _short_texts(monkeypatch):
    """Let searches look at little text."""
    for function in (yopo.symbolic.collect_statistics, yopo.symbolic.PerplexityFitness.__init__):
        monkeypatch.setitem(function.__kwdefaults__, "sequences", 4)
        monkeypatch.setitem(function.__kwdefaults__, "length", 32)
    monkeypatch.setattr("yopo.divergence._LENGTH", 32)


def test_info_tells_what_each_ratio_would_remove(saved, capsys):
    assert main(["info", saved, "--ratio", "0.5"]) == 0
    printed = capsys.readouterr().out
    assert "intermediate_size" in printed
    removed = 2 * 40 * 3 * 32  # layers, rows, matrices, columns
    assert f"{removed:,}" in printed


def test_a_policy_fitted_on_the_command_line_prunes_like_one_fitted_in_python(
    saved, tmp_path, capsys
):
    policy, output = tmp_path / "policy", tmp_path / "pruned"
    spectral = ["--reward", "spectral", "--episodes", "2"]
    assert main(["fit", saved, "--output", str(policy), *spectral]) == 0
    settings = ["--policy", str(policy), "--ratio", "0.25"]
    assert main(["prune", saved, "--output", str(output), *settings]) == 0
    assert "Removed 40 of 160 FFN rows" in capsys.readouterr().out
    pruned = AutoModelForCausalLM.from_pretrained(output)
    expected = yopo.PolicyPruner(reward="spectral", episodes=2).fit(yopo.load(saved))
    expected = expected.prune(yopo.load(saved), 0.25)
    for name, weight in expected.state_dict().items():
        assert torch.equal(weight, pruned.state_dict()[name]), name


def test_chosen_layers_alone_are_cut_and_loaded_again(saved, tmp_path):
    output = tmp_path / "pruned"
    arguments = ["--layers", "1", "--method", "prunenet", "--episodes", "1"]
    assert main(["prune", saved, "--output", str(output), *arguments]) == 0
    widths = [ffn.rows for ffn in yopo.find_ffns(yopo.load(output))]
    assert widths == [80, 56]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune", "{model}", "--output", "{new}", "--ratio", "1.2"], "`ratio` must be in [0, 1)"),
        (["prune", "{model}", "--output", "{model}"], "exists and is not empty"),
        (["prune", "{new}", "--output", "{new}"], "{new}"),
        (
            ["prune", "{model}", "--output", "{new}", "--ratio", "0.3", "--parameters", "5e3"],
            "got `ratio` and `parameters`",
        ),
        (
            ["prune", "{model}", "--output", "{new}", "--evidence", "weights", "--bytes", "5e3"],
            "`bytes=5000` cannot be met by removing FFN rows",
        ),
        (
            "prune {model} --output {new} --method prunenet --allocation adaptive".split(),
            "`--allocation adaptive` does not go with",
        ),
        (["prune", "{model}", "--output", "{new}", "--policy", "{new}"], "holds no policy"),
        (["fit", "{model}", "--output", "{file}/policy"], "cannot write the policy"),
        (["sparsify", "{model}", "--output", "{model}"], "exists and is not empty"),
        (["sparsify", "{model}", "--output", "{file}"], "{file}` exists and is no folder"),
        (["recover", "{model}", "--output", "{file}"], "{file}` exists and is no folder"),
        (["prune", "{model}", "--output", "{model}/a", "--dtype", "float32"], "inside the source"),
        (["sparsify", "{model}", "--output", "{new}", "--pattern", "2:5"], "do not divide"),
        (
            "sparsify {model} --output {new} --structured".split(),
            "`--structured` needs `--sparsity`, the share of FFN rows to remove",
        ),
        (
            "sparsify {model} --output {new} --structured --sparsity 0.5 --pattern 2:4".split(),
            "`--structured` does not go with `--pattern`",
        ),
        (
            "evolve {model} --output {new} --rows --text {file}".split(),
            "`--rows` does not go with `--text`",
        ),
        (
            "evolve {model} --output {new} --rows --pattern 2:4".split(),
            "`--rows` does not go with `--pattern`",
        ),
        (
            "evolve {model} --output {new} --rows --sparsity 0.9".split(),
            "`--rows` does not go with `--sparsity`",
        ),
        ("evolve {model} --output {new} --ratio 0.9".split(), "`--ratio` needs `--rows`"),
        ("evolve {new} --output {model}".split(), "{model} exists and holds no search"),
        ("evolve {new} --output {new} --offspring 0".split(), "`offspring` must be"),
        (["report", "{model}"], "{model}` holds no report: `pruning_report.json` is missing"),
        (["report", "{new}"], "{new}` holds no report"),
        (["info", "{folder}"], "config.json"),
        (["bench", "{folder}"], "{folder}` holds no model"),
        (["bench", "{model}", "--repeats", "0"], "`repeats` must be a positive integer, got 0"),
        (["bench", "{model}", "--json", "{new}/speed.json"], "a folder that does not exist"),
        (["bench", "{model}", "--device", "nowhere"], "`device` must be one of"),
    ],
)
def test_what_goes_wrong_is_said_in_one_line_and_nothing_is_written(
    saved, tmp_path, capsys, arguments, message
):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    places = {"model": saved, **{n: str(tmp_path / n) for n in ("new", "file", "folder")}}
    assert main([argument.format(**places) for argument in arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("yopo: error: ")
    assert message.format(**places) in error
    assert not (tmp_path / "new").exists()


def test_info_needs_no_weights(saved, capsys):
    (Path(saved) / "model.safetensors").unlink()
    assert main(["info", saved]) == 0
    assert "intermediate_size" in capsys.readouterr().out


def test_by_default_a_folder_is_pruned_from_disk_and_equals_the_lean_recipe_in_memory(
    saved, tmp_path, monkeypatch
):
    monkeypatch.setattr("yopo.cli.commands.load", None)  # the model is never built
    assert main(["prune", saved, "--output", str(tmp_path / "pruned"), "--ratio", "0.4"]) == 0
    expected = yopo.PolicyPruner.lean().fit(yopo.load(saved)).prune(yopo.load(saved), 0.4)
    found = yopo.load(tmp_path / "pruned").state_dict()
    for name, weight in expected.state_dict().items():
        assert torch.equal(weight, found[name]), name


def test_eval_measures_both_models_and_writes_the_figures_into_the_card(tmp_path, capsys):
    dense, pruned = str(model_path()), tmp_path / "pruned"
    (tmp_path / "text.txt").write_text(write_text(HELD_OUT_SEED, 12_000))
    questions = [{"context": "Tom had a", "choices": [" ball", " ran"], "label": 0}] * 3
    (tmp_path / "piqa.jsonl").write_text("\n".join(map(json.dumps, questions)))
    text, figures = str(tmp_path / "text.txt"), tmp_path / "figures.json"
    assert main(["prune", dense, "--output", str(pruned), "--ratio", "0.5"]) == 0
    asked = ["--text", text, "--tasks", "piqa", "--data-dir", str(tmp_path), "--dtype", "float32"]
    asked += ["--against", dense, "--json", str(figures), "--write-card"]
    assert main(["eval", str(pruned), *asked]) == 0
    tokenizer = AutoTokenizer.from_pretrained(dense)
    expected = [
        yopo.perplexity(yopo.load(source, dtype=torch.float32), Path(text), tokenizer=tokenizer)
        for source in (dense, pruned)
    ]
    found = json.loads(figures.read_text())
    assert found["perplexity"][text] == expected
    assert found["tasks"]["piqa"]["questions"] == 3
    told = capsys.readouterr().out
    card = (pruned / "README.md").read_text()
    for value in expected:
        assert f"{value:.3f}" in told
        assert f"{value:.3f}" in card
    assert re.search(rf"{text}: window 256, tokens \d+, dtype float32\.", card)


def test_eval_shows_each_figure_as_it_comes_and_says_how_it_was_measured(tmp_path, capsys):
    dense, text, figures = str(model_path()), tmp_path / "text.txt", tmp_path / "figures.json"
    text.write_text(write_text(HELD_OUT_SEED, 3000))
    asked = ["eval", dense, "--text", str(text), "--dtype", "float32", "--window", "64"]
    tasks = ["--data-dir", str(tmp_path), "--tasks", "piqa"]
    assert main([*asked, *tasks]) == 2  # there are no questions
    told = capsys.readouterr()
    assert "piqa.jsonl` is missing" in told.err
    value = yopo.perplexity(
        yopo.load(dense, dtype=torch.float32),
        text,
        tokenizer=AutoTokenizer.from_pretrained(dense),
        window=64,
    )
    assert f"{dense}: perplexity {value:.3f} on {text}" in told.out
    assert main([*asked, "--json", str(figures), "--batch", "1"]) == 0
    tokens = len(AutoTokenizer.from_pretrained(dense)(text.read_text()).input_ids)
    expected = {"window": 64, "tokens": tokens, "dtype": "float32"}
    assert json.loads(figures.read_text())["measured"] == {str(text): expected}


def test_eval_batches_windows_as_it_is_told(tmp_path, monkeypatch):
    batches = []
    monkeypatch.setattr(
        "yopo.cli.figures.perplexity", lambda *_, **named: batches.append(named["batch"]) or 3.0
    )
    (tmp_path / "text.txt").write_text(write_text(HELD_OUT_SEED, 300))
    asked = ["eval", str(model_path()), "--text", str(tmp_path / "text.txt"), "--batch", "3"]
    assert main(asked) == 0
    assert batches == [3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to measure: name `--text` or `--tasks`"),
        (["--text", "nowhere.txt"], "'nowhere.txt' is no file"),
        (["--tasks", "piqua", "--data-dir", str(GOLDEN)], "no task 'piqua'"),
    ],
)
def test_eval_looks_at_what_is_asked_for_before_it_loads_a_model(arguments, message, capsys):
    assert main(["eval", "no-such-model", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_eval_refuses_what_it_could_not_write(saved, tmp_path, capsys):
    assert main(["eval", saved, "--text", __file__, "--write-card"]) == 2
    assert "`--against` and `--text`" in capsys.readouterr().err
    assert main(["eval", saved, "--tasks", "paper", "--json", str(tmp_path / "no/a.json")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_recover_writes_a_model_that_is_nearer_to_its_teacher(tmp_path, capsys):
    dense, pruned, better = str(model_path()), tmp_path / "pruned", tmp_path / "better"
    (tmp_path / "text.txt").write_text(write_text(HELD_OUT_SEED, 30_000))
    assert main(["prune", dense, "--output", str(pruned), "--ratio", "0.5"]) == 0
    cut = replace(yopo.PruningReport.load(pruned), metadata={"license": "mit"})
    cut.with_perplexity("text", dense=2.0, pruned=3.0).write_card(pruned)
    asked = ["--teacher", dense, "--data", str(tmp_path / "text.txt"), "--dtype", "float32"]
    assert main(["recover", str(pruned), "--output", str(better), *asked]) == 0
    tokenizer = AutoTokenizer.from_pretrained(better)
    text = write_text(HELD_OUT_SEED + 1, 12_000)
    before, after = (
        yopo.perplexity(yopo.load(folder, dtype=torch.float32), text, tokenizer=tokenizer)
        for folder in (pruned, better)
    )
    assert after < 0.8 * before
    assert sorted(folder.name for folder in tmp_path.iterdir() if folder.is_dir()) == [
        "better",
        "pruned",
    ]
    report = yopo.PruningReport.load(better)
    assert report == replace(cut, recovery=report.recovery)  # without the scores
    assert report.recovery["call"].startswith("yopo recover ")
    assert (report.recovery["data"], report.recovery["rank"]) == ("text.txt", 8)
    card = (better / "README.md").read_text()
    assert "license: mit" in card
    assert report.recovery["call"] in card
    assert main(["recover", str(pruned), "--output", str(better), *asked]) == 2
    assert "not empty" in capsys.readouterr().err
    other = ["--output", str(tmp_path / "other"), "--data", "wikitext2"]
    assert main(["recover", str(pruned), *other]) == 2  # what is measured on is not learned from
    assert "no file" in capsys.readouterr().err


def full_disk(self, folder, **_):
    Path(folder).mkdir(exist_ok=True)
    (Path(folder) / "config.json").write_text("{}")
    raise SafetensorError("Error while serializing: I/O error: No space left on device")


def test_a_full_disk_in_the_end_leaves_nothing_and_the_same_recovery_goes_on(
    tmp_path, capsys, monkeypatch
):
    output, text = tmp_path / "better", tmp_path / "text.txt"
    text.write_text(write_text(HELD_OUT_SEED, 3000))
    asked = ["recover", str(model_path()), "--output", str(output), "--data", str(text)]
    with monkeypatch.context() as patched:
        patched.setattr("transformers.PreTrainedModel.save_pretrained", full_disk)
        assert main(asked) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"yopo: error: cannot write `{output}`")
    assert "No space left" in error
    assert f"the same command goes on from `{output}.checkpoints`" in error
    assert {path.name for path in tmp_path.iterdir()} == {"better.checkpoints", "text.txt"}
    monkeypatch.setattr("yopo.recovery.recovering.train_adapters", None)
    assert main(asked) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"better", "text.txt"}


def test_a_full_disk_in_the_end_of_pruning_leaves_nothing(saved, tmp_path, capsys, monkeypatch):
    output = tmp_path / "pruned"
    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full_disk)
    assert main(["prune", saved, "--output", str(output), "--dtype", "float32"]) == 2
    assert f"cannot write `{output}`: " in capsys.readouterr().err
    assert main(["sparsify", saved, "--output", str(output), "--metric", "magnitude"]) == 2
    assert "No space left" in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(("named", "loads"), [("weights", False), ("self", True)])
def test_the_evidence_named_beside_a_policy_decides_whether_the_model_is_loaded(
    saved, tmp_path, monkeypatch, named, loads
):
    other = {"weights": "self", "self": "weights"}[named]
    policy = tmp_path / "policy"
    yopo.PolicyPruner(evidence=other).fit(yopo.load(saved)).save_policy(policy)
    loaded = []
    monkeypatch.setattr(
        "yopo.cli.commands.load", lambda *a, **k: loaded.append(a) or yopo.load(*a, **k)
    )
    output = tmp_path / "pruned"
    arguments = ["--policy", str(policy), "--evidence", named]
    assert main(["prune", saved, "--output", str(output), *arguments]) == 0
    assert bool(loaded) == loads


def test_an_interrupt_ends_the_command_quietly(saved, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("yopo.cli.commands.find_ffns", interrupted)
    assert main(["info", saved]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "yopo: interrupted"


def test_a_size_on_the_command_line_is_met(saved, tmp_path, capsys):
    spectral = ["--reward", "spectral", "--episodes", "1"]
    total = yopo.load(saved).num_parameters()
    for name, arguments in {
        "parameters": ["--parameters", f"{0.8 * total:e}"],
        "bytes": ["--bytes", f"{3.2 * total}"],
        "share": ["--ratio", "0.2", "--ratio-of", "model"],
    }.items():
        output = tmp_path / name
        assert main(["prune", saved, "--output", str(output), *arguments, *spectral]) == 0
        assert 0.75 * total < yopo.load(output).num_parameters() <= 0.8 * total
        assert "of 160 FFN rows" in capsys.readouterr().out


def test_an_adaptive_cut_on_the_command_line_is_that_of_python(saved, tmp_path):
    output = tmp_path / "pruned"
    adaptive = ["--allocation", "adaptive", "--evidence", "weights"]
    assert main(["prune", saved, "--output", str(output), "--ratio", "0.4", *adaptive]) == 0
    pruner = yopo.PolicyPruner(ratio=0.4, allocation="adaptive", evidence="weights")
    plan = pruner.fit(yopo.load(saved)).plan(yopo.load(saved))
    assert {ffn.name: ffn.rows for ffn in yopo.find_ffns(yopo.load(output))} == plan.widths


def test_a_policy_prunes_at_the_ratio_it_was_trained_at(saved, tmp_path, capsys):
    policy, output = str(tmp_path / "policy"), str(tmp_path / "pruned")
    spectral = ["--reward", "spectral", "--episodes", "1", "--ratio", "0.5"]
    assert main(["fit", saved, "--output", policy, *spectral]) == 0
    assert main(["prune", saved, "--output", output, "--policy", policy]) == 0
    assert "Removed 80 of 160 FFN rows" in capsys.readouterr().out


def test_a_bench_prints_a_table_of_both_models_and_writes_the_figures(
    saved, tiny_model, tmp_path, capsys, monkeypatch
):
    for name in ("PRODUCT_ON_CPU", "READ"):
        monkeypatch.setattr(f"yopo.speed.machine.{name}", (64, 64))
    pruned, figures = tmp_path / "pruned", tmp_path / "speed.json"
    tiny_model("llama", intermediate_size=56).save_pretrained(pruned)
    lengths = ["--batch", "2", "--prompt", "8", "--new-tokens", "3", "--repeats", "2"]
    placed = ["--dtype", "bfloat16", "--device", "cpu", "--json", str(figures)]
    assert main(["bench", str(pruned), "--against", saved, *lengths, *placed]) == 0
    printed = capsys.readouterr().out
    assert "Batch 2, prompt 8, 3 new tokens, 2 repeats." in printed
    assert "prefill, tokens/s" in printed
    found = json.loads(figures.read_text("utf-8"))
    assert (found["model"]["name"], found["against"]["name"]) == (str(pruned), saved)
    assert found["model"]["dtype"] == "bfloat16"
    assert found["against"]["parameters"] == yopo.load(saved).num_parameters()
    assert len(found["model"]["decode"]) == 2
    assert found["speed_up_bound"]["decode"] > 1


@pytest.mark.parametrize("evidence", ["weights", "self"])
def test_card_and_report_tell_the_command_line(saved, tmp_path, evidence):
    (Path(saved) / "README.md").write_text("---\nlicense: mit\n---\n# dense\n")
    output = tmp_path / "a folder"
    arguments = ["prune", saved, "--output", str(output), "--ratio", "0.4", "--evidence", evidence]
    assert main(arguments) == 0
    report = yopo.PruningReport.load(output)
    assert (
        report.call == f"yopo prune {saved} --output '{output}' --ratio 0.4 --evidence {evidence}"
    )
    assert report.recipe["evidence"] == evidence
    assert report.base == "model"
    assert report.plan.ratio == 0.4
    assert report.after.parameters == yopo.load(output).num_parameters()
    assert "seconds" not in (output / "README.md").read_text("utf-8")
    assert "license: mit" in (output / "README.md").read_text("utf-8")
    assert (output / "README.dense.md").exists() == (
        evidence == "weights"
    )  # else only weights come


def test_a_report_is_printed_and_with_the_dense_model_written_with_plots(saved, tmp_path, capsys):
    output = tmp_path / "pruned"
    assert main(["prune", saved, "--output", str(output), "--ratio", "0.4"]) == 0
    before = (output / "pruning_report.json").read_bytes()
    capsys.readouterr()
    assert main(["report", str(output)]) == 0
    assert capsys.readouterr().out == f"{yopo.PruningReport.load(output)}\n"
    assert main(["report", str(output), "--against", saved]) == 0
    printed = capsys.readouterr().out
    found = yopo.PruningReport.load(output / "report")
    assert found == yopo.PruningReport.load(output).with_spectra(saved)
    assert printed.startswith(str(found))
    assert f"Written to {output / 'report'}" in printed
    assert {file.name for file in (output / "report").iterdir()} == {
        *("report.json", "report.md", "report.html", "spectra.png", "kept_rows.png")
    }
    assert (output / "pruning_report.json").read_bytes() == before
    assert main(["report", str(output), "--against", str(output)]) == 2
    assert "the plan does not fit this model" in capsys.readouterr().err


def test_a_metric_on_the_command_line_does_what_it_does_in_python(saved, tmp_path, capsys):
    output = tmp_path / "sparse"
    assert main(["sparsify", saved, "--output", str(output), "--metric", "magnitude"]) == 0
    assert "50.00% to 50.00% zeros in 14 matrices" in capsys.readouterr().out
    expected = yopo.MetricPruner("magnitude").prune(yopo.load(saved), 0.5)
    for name, weight in yopo.load(output).state_dict().items():
        assert torch.equal(weight, expected.state_dict()[name]), name


def test_rows_are_removed_by_a_formula_on_the_command_line(saved, tmp_path, capsys):
    output = tmp_path / "smaller"
    formula = ["--metric", "mul(gate_norm, down_norm)", "--structured", "--sparsity", "0.5"]
    assert main(["sparsify", saved, "--output", str(output), *formula]) == 0
    assert "Removed 80 of 160 FFN rows" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(output).config.intermediate_size == 40


@pytest.mark.usefixtures("_short_texts")
def test_a_search_on_the_command_line_goes_on_where_it_ended(tmp_path, capsys):
    arguments = ["evolve", str(model_path()), "--rows", "--output", str(tmp_path / "search")]
    arguments += ["--population", "3", "--offspring", "2", "--iterations"]
    assert main([*arguments, "1"]) == 0
    first = capsys.readouterr().out
    assert "best: " in first
    assert "at random: " in first
    assert main([*arguments, "2"]) == 0
    found = yopo.symbolic.Evolution.load(tmp_path / "search")
    assert len(found.history) == 5
    assert found.settings.offspring == 2
    assert found.expression.formula() in capsys.readouterr().out


@pytest.mark.usefixtures("_short_texts")
def test_a_search_that_is_interrupted_shows_the_best_so_far(tmp_path, capsys, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr("yopo.symbolic.evolution._Search.go_on", interrupted)
    arguments = ["evolve", str(model_path()), "--rows", "--output", str(tmp_path / "search")]
    assert main([*arguments, "--population", "2", "--iterations", "1"]) == 0
    told = capsys.readouterr().out
    assert "best: " in told
    assert "at random: " not in told


def test_a_formula_that_is_none_is_shown_with_the_place(saved, tmp_path, capsys):
    output = tmp_path / "sparse"
    assert main(["sparsify", saved, "--output", str(output), "--metric", "mul(W; G)"]) == 2
    *_, line, pointer = capsys.readouterr().err.splitlines()
    assert line[len(pointer) - 1] == ";"
    assert not output.exists()
