import hashlib
import json
import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from yopo import InvalidArgumentError, PolicyFileError, PruningPlan
from yopo.adapters import Ffn, Slot, WidthField
from yopo.plan import check_ratio, kept_width, plan_widths, selected_layers

RATIOS = st.floats(0.0, 1.0, exclude_max=True)
SIZES = st.integers(1, 20_000)


def ffn(name, rows, key="intermediate_size", per_row=1):
    linear = nn.Linear(rows, 1, device="meta")
    width = WidthField((), key, Fraction(per_row)) if key else None
    return Ffn(name, name, rows, (), Slot(linear, "weight", 1), width=width)


def plan(kept, rows, ratio=0.5):
    return PruningPlan(kept={"mlp": kept}, rows={"mlp": rows}, ratio=ratio)


def test_widths_are_those_of_the_reference(golden):
    for case in golden[0]["kept_width"]:
        assert kept_width(case["n"], case["ratio"]) == case["kept"]


@given(SIZES, RATIOS, st.sampled_from(["auto", 1, 2, 8, 64, 256]))
@example(4304, 0.0, "auto")
@example(10, 0.9, 1)
@example(64, 0.9, 32)
def test_a_width_is_in_range_and_reaches_the_ratio_within_its_rounding(rows, ratio, multiple):
    assume(multiple == "auto" or multiple <= rows)
    try:
        width = kept_width(rows, ratio, multiple_of=multiple)
    except InvalidArgumentError:
        step = 1 if multiple == "auto" else multiple
        assert (1 - ratio) * rows < step
        return
    assert 1 <= width <= rows
    if multiple == "auto":
        assert abs(width / rows - (1 - ratio)) < max(0.01, 1 / rows)
    elif multiple == 1:
        assert width == int((1 - ratio) * rows)
    else:
        assert width % multiple == 0
        assert abs(width - (1 - ratio) * rows) <= max(multiple / 2, rows % multiple) + 1e-6


@given(SIZES, st.sampled_from(["auto", 1]))
@example(4304, "auto")
def test_ratio_zero_keeps_every_row(rows, multiple):
    assert kept_width(rows, 0.0, multiple_of=multiple) == rows


@given(SIZES, st.sampled_from(["auto", 1, 2, 32, 256]))
@example(10, 1)
@example(64, 32)
@example(300, 256)
def test_the_largest_ratio_that_an_error_offers_works(rows, multiple):
    assume(multiple == "auto" or multiple <= rows)
    try:
        kept_width(rows, 0.99999999, multiple_of=multiple)
    except InvalidArgumentError as error:
        offered = float(str(error).rpartition("at most ")[2].rstrip("."))
        assert kept_width(rows, offered, multiple_of=multiple) >= 1
        assert kept_width(rows, max(offered - 0.05, 0.0), multiple_of=multiple) >= 1


def test_a_ratio_that_keeps_nothing_is_told_with_the_way_out():
    with pytest.raises(InvalidArgumentError) as caught:
        kept_width(64, 0.99)
    assert str(caught.value) == "`ratio=0.99` keeps 0 of 64 rows; use at most 0.98."


@pytest.mark.parametrize(
    "ratio",
    [1.0, 1.2, -0.1, math.nan, math.inf, -math.inf, True, False, "0.3", None, [0.3]],
)
def test_a_ratio_outside_its_range_is_refused_by_name_and_value(ratio):
    with pytest.raises(InvalidArgumentError) as caught:
        check_ratio(ratio)
    assert str(caught.value) == f"`ratio` must be in [0, 1), got {ratio!r}."
    with pytest.raises(InvalidArgumentError, match=r"`ratio` must be in"):
        kept_width(64, ratio)


@pytest.mark.parametrize("multiple", [0, -8, True, 2.0, "8", None, "Auto"])
def test_a_multiple_that_is_no_positive_integer_is_refused(multiple):
    with pytest.raises(InvalidArgumentError, match=r'`multiple_of` must be "auto" or a positive'):
        kept_width(64, 0.3, multiple_of=multiple)


def test_a_multiple_above_the_width_is_refused():
    with pytest.raises(
        InvalidArgumentError, match=r"`multiple_of` must be at most the width 64, got 128"
    ):
        kept_width(64, 0.3, multiple_of=128)


@pytest.mark.parametrize(
    ("rows", "ratio", "width"),
    [(11008, 0.3, 7680), (14336, 0.3, 9984), (172, 0.3, 120), (96, 0.3, 68), (10, 0.3, 7)],
)
def test_auto_takes_the_largest_multiple_that_moves_the_ratio_by_less_than_a_point(
    rows, ratio, width
):
    assert kept_width(rows, ratio, multiple_of="auto") == width
    for multiple in (256, 128, 64, 32, 16, 8, 4, 2):
        if width % multiple:
            nearest = multiple * round((1 - ratio) * rows / multiple)
            assert abs(nearest / rows - (1 - ratio)) >= 0.01


@given(st.lists(st.integers(1, 400), min_size=1, max_size=4), RATIOS)
@example([24, 48], 0.3)
@example([24, 36, 60], 0.5)
def test_ffns_of_one_field_keep_their_proportions(sizes, ratio):
    ffns = [ffn(f"layers.{i}", rows) for i, rows in enumerate(sizes)]
    try:
        widths = plan_widths(ffns, ratio, multiple_of=1)
    except InvalidArgumentError:
        assert int((1 - ratio) * min(sizes)) < 1
        return
    shares = {Fraction(widths[f"layers.{i}"], rows) for i, rows in enumerate(sizes)}
    assert len(shares) == 1
    assert 0 < shares.pop() <= 1


@given(st.integers(1, 500), st.integers(1, 4), RATIOS)
@example(48, 2, 0.3)
def test_a_shared_expert_twice_as_wide_as_its_field_says_gets_a_whole_field(half, times, ratio):
    ffns = [ffn("expert", half), ffn("shared", times * half, per_row=Fraction(1, times))]
    try:
        widths = plan_widths(ffns, ratio)
    except InvalidArgumentError:
        return
    assert widths["shared"] == times * widths["expert"]


def test_ffns_of_different_fields_and_of_none_are_rounded_each_for_itself():
    ffns = [
        ffn("a", 1024, "ffn_dim"),
        ffn("b", 100, "other_dim"),
        ffn("c", 30, None),
        ffn("d", 10, None),
    ]
    assert plan_widths(ffns, 0.5) == {"a": 512, "b": 50, "c": 15, "d": 5}


@given(st.integers(1, 2000), RATIOS)
@example(48, 0.3)
@example(8, 0.9)
def test_experts_in_one_tensor_keep_widths_that_grouped_products_can_run(rows, ratio):
    tensor = nn.Module()
    tensor.weight = nn.Parameter(torch.empty(2, rows, 1, device="meta"))
    ffns = [Ffn(f"{i}", "", rows, (), Slot(tensor, "weight", 0, expert=i)) for i in range(2)]
    ffns = [replace(ffn, width=WidthField((), "moe_intermediate_size")) for ffn in ffns]
    try:
        widths = plan_widths(ffns, ratio, multiple_of=1)
    except InvalidArgumentError:
        return
    assert widths["0"] == widths["1"]
    assert rows % 8 or widths["0"] % 8 == 0
    assert abs(widths["0"] - (1 - ratio) * rows) < 8


def test_the_narrowest_ffn_sets_what_a_ratio_may_be():
    with pytest.raises(InvalidArgumentError, match=r"`ratio=0\.95` keeps 0 of 8 rows"):
        plan_widths([ffn("wide", 800), ffn("narrow", 8)], 0.95)


@st.composite
def plans(draw):
    names = draw(
        st.lists(st.text("abc.019", min_size=1, max_size=9), min_size=1, max_size=12, unique=True)
    )
    kept, rows = {}, {}
    for name in names:
        rows[name] = draw(st.integers(1, 60))
        chosen = draw(st.sets(st.integers(0, rows[name] - 1), min_size=1))
        kept[name] = torch.tensor(sorted(chosen))
    return PruningPlan(kept=kept, rows=rows, ratio=draw(RATIOS))


@given(plan=plans())
def test_saving_and_loading_a_plan_is_the_identity(tmp_path_factory, plan):
    folder = tmp_path_factory.mktemp("plan")
    plan.save(folder)
    loaded = PruningPlan.load(folder)
    assert loaded == plan
    assert loaded.ratio == plan.ratio
    assert list(loaded.kept) == list(loaded.rows) == list(plan.kept)
    assert str(loaded) == str(plan)
    assert loaded.widths == plan.widths
    assert loaded.ratio_reached == plan.ratio_reached


@pytest.mark.parametrize("kept", [torch.arange(10), torch.arange(20)[:10], torch.arange(20)[::2]])
def test_a_plan_whose_layers_share_one_tensor_can_be_saved(tmp_path, kept):
    names = ["layers.0", "layers.1", "layers.2"]
    plan = PruningPlan(kept=dict.fromkeys(names, kept), rows=dict.fromkeys(names, 20), ratio=0.5)
    plan.save(tmp_path)
    assert PruningPlan.load(tmp_path) == plan


@given(plans(), plans())
def test_plans_are_equal_where_they_keep_the_same_rows_of_the_same_ffns(one, other):
    assert one == PruningPlan(
        kept={name: kept.clone() for name, kept in one.kept.items()}, rows=one.rows, ratio=0.0
    )
    same = {name: (one.rows[name], kept.tolist()) for name, kept in one.kept.items()} == {
        name: (other.rows[name], kept.tolist()) for name, kept in other.kept.items()
    }
    assert (one == other) is same


def test_a_plan_is_no_key_and_equals_nothing_else():
    one = plan(torch.tensor([0, 1]), 4)
    assert one != "plan"
    with pytest.raises(TypeError, match=r"unhashable"):
        hash(one)


@given(plans())
def test_the_ratio_reached_counts_rows(plan):
    removed = sum(plan.rows[name] - len(kept) for name, kept in plan.kept.items())
    assert plan.ratio_reached == pytest.approx(removed / sum(plan.rows.values()))


def test_a_plan_prints_one_line_for_each_run_of_equal_widths():
    names = [f"layers.{i}" for i in range(12)]
    text = str(
        PruningPlan(
            kept={n: torch.arange(3 if n != "layers.11" else 2) for n in names},
            rows=dict.fromkeys(names, 4),
            ratio=0.25,
        )
    )
    assert text.splitlines() == [
        "PruningPlan: ratio 0.25 asked, 0.2708 reached, 12 FFNs",
        "  layers.0 … layers.10 (11): 4 → 3 rows",
        "  layers.11: 4 → 2 rows",
    ]


@pytest.mark.parametrize(
    "kept",
    [
        torch.tensor([], dtype=torch.int64),
        torch.tensor([1, 0]),
        torch.tensor([1, 1]),
        torch.tensor([[0, 1]]),
        torch.tensor(1),
        torch.tensor([0, 1], dtype=torch.int32),
        torch.tensor([0.0, 1.0]),
        torch.tensor([True, False]),
        [0, 1],
        None,
    ],
    ids=str,
)
def test_kept_rows_that_are_no_sorted_unique_int64_are_refused(kept):
    with pytest.raises(InvalidArgumentError, match=r"`kept\['mlp'\]` must hold at least one row"):
        plan(kept, 4)


@pytest.mark.parametrize("kept", [[-1, 0], [0, 4], [7]])
def test_kept_rows_out_of_range_are_refused(kept):
    with pytest.raises(InvalidArgumentError, match=r"`kept\['mlp'\]` must lie in \[0, 4\), got"):
        plan(torch.tensor(kept), 4)


def test_a_plan_must_name_the_same_ffns_twice_and_at_least_one():
    with pytest.raises(InvalidArgumentError, match=r"`kept` and `rows` must name the same FFNs"):
        PruningPlan(kept={"a": torch.tensor([0])}, rows={"b": 4}, ratio=0.5)
    with pytest.raises(InvalidArgumentError, match=r"`kept` must name at least one FFN"):
        PruningPlan(kept={}, rows={}, ratio=0.5)


@pytest.mark.parametrize("ratio", [1.0, math.nan, "0.5"])
def test_a_plan_refuses_a_ratio_outside_its_range(ratio):
    with pytest.raises(InvalidArgumentError, match=r"`ratio` must be in"):
        plan(torch.tensor([0]), 4, ratio)


def rewritten(folder, **changes):
    file = folder / "plan_config.json"
    document = json.loads(file.read_text())
    document.update(changes)
    file.write_text(json.dumps({key: value for key, value in document.items() if value != "gone"}))


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": "gone"},
        {"ratio": "gone"},
        {"rows": []},
        {"rows": {"mlp": "four"}},
        {"rows": {"mlp": 2}},
        {"rows": {"other": 4}},
        {"rows": {}},
        {"ratio": "a third"},
        {"ratio": 7},
    ],
    ids=str,
)
def test_a_plan_file_that_contradicts_itself_is_damaged(tmp_path, changes):
    plan(torch.tensor([0, 3]), 4).save(tmp_path)
    rewritten(tmp_path, **changes)
    with pytest.raises(PolicyFileError, match=r"holds a damaged plan") as caught:
        PruningPlan.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_plan_file_with_rows_that_are_no_integers_is_damaged(tmp_path):
    plan(torch.tensor([0, 3]), 4).save(tmp_path)
    save_file({"mlp": torch.tensor([0.0, 3.0])}, tmp_path / "plan.safetensors")
    digest = hashlib.sha256((tmp_path / "plan.safetensors").read_bytes()).hexdigest()
    rewritten(tmp_path, sha256=digest)
    with pytest.raises(PolicyFileError, match=r"holds a damaged plan"):
        PruningPlan.load(tmp_path)


FFNS = [ffn(f"model.layers.{i}.mlp", 8) for i in range(12)] + [ffn("lm.mlp", 8)]


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [
        (None, {*range(12), "lm"}),
        ([], set()),
        ([0], {0}),
        (3, {3}),
        ([1, 11], {1, 11}),
        (range(2, 5), {2, 3, 4}),
        ("model.layers.1?.mlp", {10, 11}),
        (["model.layers.1.*", 3], {1, 3}),
        (["lm.*"], {"lm"}),
        ((number for number in [5]), {5}),
    ],
    ids=range(10),
)
def test_layers_are_chosen_by_number_and_by_pattern(layers, chosen):
    selected = selected_layers(FFNS, layers)
    assert list(selected) == [ffn.name for ffn in FFNS]
    names = {"lm.mlp" if key == "lm" else f"model.layers.{key}.mlp" for key in chosen}
    assert {name for name, is_chosen in selected.items() if is_chosen} == names


@pytest.mark.parametrize("layers", [[12], -1, "mlp", ["model.layers.1.mlp", "nothing.*"]])
def test_a_layer_that_selects_nothing_is_refused_with_the_names_there_are(layers):
    with pytest.raises(
        InvalidArgumentError, match=r"`layers` entry .* selects no FFN; the names run from `model"
    ):
        selected_layers(FFNS, layers)
