import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

import yopo
from yopo.report import (
    describe_ffns,
    format_table,
    kept_by_score,
    kept_rows,
    ks_rows,
    perplexity_rows,
    size_rows,
    sizes_of,
    width_rows,
)


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


def test_sizes_are_told_before_and_after(tiny_llama):
    model = tiny_llama()
    ffns = yopo.find_ffns(model)
    before, after = sizes_of(model, ffns), sizes_of(model, ffns, {f.name: 60 for f in ffns})
    rows = {row[0]: row[1:] for row in size_rows(before, after)}
    assert rows["FFN rows"] == ["160", "120", "25.00%"]
    total = sum(p.numel() for p in model.parameters())
    left = total - 2 * 20 * 3 * 32  # layers, rows, matrices, columns
    assert rows["all parameters"] == [f"{total:,}", f"{left:,}", f"{1 - left / total:.2%}"]
    assert rows["bytes of all parameters"][:2] == [f"{4 * total:,}", f"{4 * left:,}"]


def test_equal_widths_share_a_line():
    rows = {f"layers.{n}.mlp": 80 for n in range(40)}
    widths = {name: 56 if n % 2 else 64 for n, name in enumerate(rows)}
    assert width_rows(rows, widths)[1:] == [
        ["20", "layers.0.mlp … layers.38.mlp", "80", "64", "20.00%"],
        ["20", "layers.1.mlp … layers.39.mlp", "80", "56", "30.00%"],
    ]


def test_more_widths_than_anybody_reads_are_summed_up():
    rows = {f"layers.{n}.mlp": 1000 for n in range(300)}
    widths = {name: 400 + n for n, name in enumerate(rows)}
    assert width_rows(rows, widths)[1:] == [
        ["300", "layers.0.mlp … layers.299.mlp", "1,000 to 1,000", "400 to 699", "30.10% to 60.00%"]
    ]


def test_distances_are_listed_up_to_a_hundred_and_summed_up_always():
    for count, lines in ((1, 2), (100, 104), (101, 4)):
        ks = {f"layers.{n}.mlp": n / 1000 for n in range(count)}
        assert len(ks_rows(ks)) == lines
    assert ks_rows(ks)[1:] == [
        ["least", "layers.0.mlp", "0.0000"],
        ["mean", "", "0.0500"],
        ["most", "layers.100.mlp", "0.1000"],
    ]


@given(st.integers(1, 45), st.integers(0, 2**32 - 1))
def test_tenths_of_the_rows_are_those_that_counting_finds(rows, seed):
    """Every row is split into ten, so that the borders of the tenths lie between parts."""
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, 8, rows).astype(np.float32)
    kept = np.sort(generator.permutation(rows)[: generator.integers(1, rows + 1)])
    found = kept_by_score(torch.from_numpy(kept), torch.from_numpy(scores))
    order = sorted(range(rows), key=lambda row: (scores[row], row))
    parts = [row in kept for row in order for _ in range(10)]
    expected = [sum(parts[n * rows : (n + 1) * rows]) / rows for n in range(10)]
    assert np.allclose(found, expected)
    assert math.isclose(sum(found) / 10, len(kept) / rows)


def test_kept_shares_are_averaged_over_ffns():
    kept = {"a": [0.0] * 5 + [1.0] * 5, "b": [0.5] * 10}
    rows = kept_rows(kept)
    assert rows[1] == ["0 to 10 %", "25.0%", "0.0%", "50.0%"]
    assert rows[10] == ["90 to 100 %", "75.0%", "50.0%", "100.0%"]


def test_perplexities_are_told_with_their_ratio():
    assert perplexity_rows({"text": (2.0, 3.0)})[1] == ["text", "2.000", "3.000", "1.500"]
