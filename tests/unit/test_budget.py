import logging
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from yopo import InvalidArgumentError, find_ffns
from yopo.adapters import Ffn, Slot, WidthField
from yopo.budget import Budget
from yopo.plan import plan_widths
from yopo.report import sizes_of


def model_of(sizes, *, columns=4, rest=100):
    """Return a model on the meta device with FFNs of these sizes, and the FFNs."""
    model = nn.Module()
    model.rest = nn.Parameter(torch.empty(rest, device="meta"))
    ffns = []
    for i, rows in enumerate(sizes):
        linear = nn.Linear(rows, columns, bias=False, device="meta", dtype=torch.float16)
        model.add_module(f"{i}", linear)
        width = WidthField((), f"width_{i}", Fraction(1))
        ffns.append(Ffn(f"{i}", f"{i}", rows, (), Slot(linear, "weight", 1), width=width))
    return model, ffns


def left_of(model, ffns, widths):
    parameters = sum(p.numel() for p in model.parameters())
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    for ffn in ffns:
        gone = (ffn.rows - widths[ffn.name]) * ffn.contract.parameter.shape[0]
        parameters, size = parameters - gone, size - 2 * gone
    return {"parameters": parameters, "bytes": size}


@given(
    st.lists(st.integers(1, 3000), min_size=1, max_size=5),
    st.floats(0.01, 1.2),
    st.sampled_from(["parameters", "bytes"]),
    st.sampled_from(["auto", 1, 8]),
)
@example([11008] * 3, 0.7, "parameters", "auto")
@example([8], 0.2, "bytes", 1)
def test_a_size_is_met_by_the_smallest_ratio_that_does(sizes, share, kind, multiple_of):
    sizes = [max(size, 8) for size in sizes]
    model, ffns = model_of(sizes)
    widths_of = partial(plan_widths, ffns, multiple_of=multiple_of)
    limit = share * left_of(model, ffns, {ffn.name: ffn.rows for ffn in ffns})[kind]
    try:
        ratio, widths = Budget(**{kind: limit}).meet(model, ffns, widths_of)
    except InvalidArgumentError as error:
        least = int(str(error).rpartition("at least ")[2].split()[0].replace(",", ""))
        assert least > limit
        if len(sizes) == 1 and multiple_of != "auto":
            assert least == left_of(model, ffns, {"0": multiple_of})[kind]
        return
    assert widths == widths_of(ratio)
    assert left_of(model, ffns, widths)[kind] <= limit
    if ratio > 0:
        assert left_of(model, ffns, widths_of(ratio - 1e-6))[kind] > limit


@given(
    st.integers(8, 20_000), st.sampled_from(["auto", 1, 8]), st.floats(0, 0.9), st.floats(0, 0.9)
)
@example(4304, "auto", 0.0, 1e-6)
@example(11008, "auto", 0.2924, 0.2925)
def test_widths_fall_as_the_ratio_grows(rows, multiple_of, one, other):
    _, ffns = model_of([rows])
    try:
        narrow, wide = (
            plan_widths(ffns, ratio, multiple_of=multiple_of)["0"]
            for ratio in (max(one, other), min(one, other))
        )
    except InvalidArgumentError:
        return
    assert narrow <= wide


@given(st.floats(0, 0.6))
def test_a_share_of_the_model_takes_at_least_that_share_of_all_parameters(share):
    model, ffns = model_of([4096, 4096], rest=4096)
    widths_of = partial(plan_widths, ffns, multiple_of=1)
    _, widths = Budget(ratio=share, ratio_of="model").meet(model, ffns, widths_of)
    total = 9 * 4096
    left = left_of(model, ffns, widths)["parameters"]
    assert left <= (1 - share) * total + 1e-6
    assert left + 2 * 4 >= int((1 - share) * total)


def test_a_ratio_of_rows_goes_through_as_it_is():
    model, ffns = model_of([100])
    widths_of = partial(plan_widths, ffns, multiple_of=1)
    for ratio in (0.25, np.float32(0.25), Fraction(1, 4), 0, np.int64(0)):
        found, widths = Budget(ratio=ratio).meet(model, ffns, widths_of)
        assert type(found) is float
        assert (found, widths["0"]) == (float(ratio), round(100 * (1 - float(ratio))))


@pytest.mark.parametrize("kind", ["parameters", "bytes"])
def test_a_model_that_is_small_enough_is_left_whole_and_a_warning_says_so(kind, caplog):
    model, ffns = model_of([100])
    widths_of = partial(plan_widths, ffns, multiple_of="auto")
    total = left_of(model, ffns, {"0": 100})[kind]
    assert Budget(**{kind: total}).meet(model, ffns, widths_of) == (0.0, {"0": 100})
    assert caplog.messages == [f"The model has {total:,} {kind} already; `{kind}={total}` is met."]


def test_the_log_tells_which_share_of_the_rows_a_size_took(caplog):
    model, ffns = model_of([100, 100])
    with caplog.at_level(logging.INFO, "yopo"):
        Budget(parameters=500).meet(model, ffns, partial(plan_widths, ffns, multiple_of=1))
    assert caplog.messages == [
        "`parameters=500` takes 50.00% of the FFN rows: 900 → 500 parameters."
    ]


def test_a_size_that_cannot_be_reached_is_told_with_the_least_that_can():
    model, ffns = model_of([100, 100])
    for multiple_of, least in ((1, 108), (10, 180)):
        widths_of = partial(plan_widths, ffns, multiple_of=multiple_of)
        with pytest.raises(InvalidArgumentError) as caught:
            Budget(parameters=90).meet(model, ffns, widths_of)
        assert str(caught.value) == (
            "`parameters=90` cannot be met by removing FFN rows: of 900 parameters, at least "
            f"{least} stay."
        )


def test_what_is_wrong_at_any_ratio_is_told_as_such():
    model, ffns = model_of([4])
    with pytest.raises(InvalidArgumentError, match=r"`multiple_of` must be at most the width 4"):
        Budget(bytes=90).meet(model, ffns, partial(plan_widths, ffns, multiple_of=8))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of `ratio`, `parameters` and `bytes` .* got none"),
        ({"ratio": 0.3, "bytes": 5}, "got `ratio` and `bytes`"),
        ({"parameters": 3, "bytes": 5}, "got `parameters` and `bytes`"),
        ({"ratio": 1.0}, r"`ratio` must be in \[0, 1\), got 1.0"),
        ({"ratio": 0.3, "ratio_of": "rows"}, '`ratio_of` must be "ffn" or "model", got \'rows\''),
        ({"bytes": 5, "ratio_of": "model"}, '`ratio_of="model"` goes with `ratio`, not with'),
        *(
            ({name: value}, f"`{name}` must be a positive number, got {value!r}")
            for name in ("parameters", "bytes")
            for value in (0, -1, True, float("nan"), float("inf"), "5e9")
        ),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused_by_name(fields, message):
    with pytest.raises(InvalidArgumentError, match=message):
        Budget(**fields)


def test_sizes_are_counted_as_reports_count_them(tiny_model):
    model = tiny_model("qwen2_moe", tie_word_embeddings=True)
    ffns = find_ffns(model)
    before = sizes_of(model, ffns)
    for kind in ("parameters", "bytes"):
        limit = round(0.9 * getattr(before, kind))
        _, widths = Budget(**{kind: limit}).meet(
            model, ffns, partial(plan_widths, ffns, multiple_of=1)
        )
        gone = sum((f.rows - widths[f.name]) * f.parameters_per_row for f in ffns)
        assert before.parameters - gone <= 0.9 * before.parameters + 1
