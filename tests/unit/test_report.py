import builtins

import pytest

import yopo
from yopo.report import describe_ffns, format_table, plot_perplexities, sizes_of


def test_sizes_after_a_plan_are_those_of_the_model_once_it_is_cut(tiny_model):
    for kind in ("llama", "opt", "gpt2", "qwen2_moe", "gpt_oss"):
        model = tiny_model(kind)
        ffns = yopo.find_ffns(model)
        plan = yopo.plan_by_criterion(model, 0.4, criterion=yopo.criteria.row_norm)
        foretold = sizes_of(model, ffns, plan.widths)
        yopo.apply_plan(model, plan)
        counted = sizes_of(model, yopo.find_ffns(model))
        assert foretold == counted
        assert counted.parameters == sum(p.numel() for p in model.parameters())
        assert counted.bytes == 4 * counted.parameters


def test_the_ffns_are_described_one_kind_a_line(tiny_model):
    text = describe_ffns(yopo.find_ffns(tiny_model("qwen2_moe")))
    assert len(text.splitlines()) == 4
    assert "shared_expert_intermediate_size" in text


def test_a_table_has_even_columns():
    assert format_table([["a", "long"], ["123", "4"]]) == (
        "|   a | long |\n|----:|-----:|\n| 123 |    4 |"
    )


def test_a_plot_is_written(tmp_path):
    path = tmp_path / "plot.png"
    plot_perplexities(path, [0.1, 0.2], {"yopo": [2, 3], "other": [3, 9]}, dense=1.5, title="t")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_plot_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(yopo.YopoError, match=r'pip install "yopo-prune\[plot\]"'):
        plot_perplexities(tmp_path / "plot.png", [0.1], {"yopo": [2]}, dense=1.5, title="t")
