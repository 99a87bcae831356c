"""Which weights become zero: exact counts, ties, patterns, and the reference's own masks."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from yopo import InvalidArgumentError
from yopo.symbolic import Expression
from yopo.symbolic.masks import Pattern, dropped

GOLDEN = Path(__file__).parents[1] / "golden"
TENSORS = load_file(GOLDEN / "pruner_zero.safetensors")
CASES = json.loads((GOLDEN / "pruner_zero.json").read_text())["trees"]


def golden_scores():
    """Yield names and scores of all expressions, spread over the rows."""
    terminals = {name: TENSORS[name] for name in ("W", "G", "X")}
    for case in CASES:
        if case["finite"]:
            scores = Expression.from_json(case["tree"]).evaluate(terminals, primitives="compat")
            yield case["name"], scores.expand(12, 32)


def test_masks_of_rows_are_those_of_the_reference():
    for name, scores in golden_scores():
        found = dropped(scores, Pattern.of("unstructured", None))
        assert torch.equal(found, TENSORS[f"{name}.pruned_unstructured_0.5"]), name


def test_masks_of_groups_are_those_of_the_reference_but_for_ties():
    """The reference leaves it to `topk` which of equal scores go."""
    same = 0
    for name, scores in golden_scores():
        found, expected = dropped(scores, Pattern.of("2:4", None)), TENSORS[f"{name}.pruned_2_4"]
        gone = [
            scores.masked_fill(~mask, torch.inf).view(-1, 4).sort(dim=1).values
            for mask in (found, expected)
        ]
        assert torch.equal(*gone), name
        same += torch.equal(found, expected)
    assert same > 200


def brute_force(scores, count):
    """Return where the lowest of one group are, by Python's stable sort."""
    order = sorted(range(len(scores)), key=lambda column: scores[column])
    return [column in order[:count] for column in range(len(scores))]


levels = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=24, max_size=24)


@given(levels, st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 0.99]))
def test_each_row_loses_its_lowest_and_the_leftmost_of_equal_ones(values, sparsity):
    scores = torch.tensor(values).view(3, 8)
    expected = [brute_force(row, int(sparsity * 8 + 1e-9)) for row in scores.tolist()]
    assert dropped(scores, Pattern.of("unstructured", sparsity)).tolist() == expected


@given(levels, st.sampled_from(["1:2", "2:4", "4:8", "1:4", "3:4"]))
def test_each_group_keeps_as_many_as_its_pattern_says(values, pattern):
    scores = torch.tensor(values).view(3, 8)
    kept, group = map(int, pattern.split(":"))
    parts = scores.view(-1, group).tolist()
    expected = torch.tensor([brute_force(part, group - kept) for part in parts]).view(3, 8)
    assert torch.equal(dropped(scores, Pattern.of(pattern, None)), expected)


@given(levels)
def test_all_weights_of_a_matrix_can_compete(values):
    scores = torch.tensor(values).view(3, 8)
    found = dropped(scores, Pattern.of("unstructured", 0.5), whole=True)
    assert found.flatten().tolist() == brute_force(values, 12)


def test_the_share_is_rounded_down_but_not_by_the_error_of_floats():
    scores = torch.rand(2, 10)
    for sparsity, count in ((0.7, 7), (0.29, 2), (0.3, 3), (1 - 0.7, 3)):
        found = dropped(scores, Pattern.of("unstructured", sparsity))
        assert found.sum(dim=1).tolist() == [count, count]


def test_many_rows_are_ranked_in_portions(monkeypatch):
    scores = torch.rand(7, 12)
    whole = dropped(scores, Pattern.of("2:4", None))
    monkeypatch.setattr("yopo.symbolic.masks._NUMBERS", 8)
    assert torch.equal(dropped(scores, Pattern.of("2:4", None)), whole)


@pytest.mark.parametrize(
    ("pattern", "sparsity", "told"),
    [
        ("unstructured", 1.0, r"`sparsity` must be in \[0, 1\), got 1.0"),
        ("unstructured", -0.1, r"`sparsity` must be in \[0, 1\), got -0.1"),
        ("4:4", None, '"N:M" with 1 ≤ N < M'),
        ("0:4", None, '"N:M" with 1 ≤ N < M'),
        ("dense", None, "got 'dense'"),
        (None, None, "got None"),
        ((2, 4), None, r"got \(2, 4\)"),
        ("unstructured", "0.5", r"`sparsity` must be in \[0, 1\), got '0.5'"),
        ("unstructured", torch.tensor(0.5), r"`sparsity` must be in \[0, 1\), got tensor"),
        ("1:4", 0.5, "`pattern='1:4'` makes a sparsity of 0.75, got `sparsity=0.5`"),
    ],
)
def test_patterns_that_make_no_sense_are_refused(pattern, sparsity, told):
    with pytest.raises(InvalidArgumentError, match=told):
        Pattern.of(pattern, sparsity)


def test_a_width_that_groups_do_not_divide_is_refused():
    with pytest.raises(InvalidArgumentError, match="`w` has 6 inputs, which groups of 4"):
        Pattern.of("2:4", None).check_width("w", 6)
    Pattern.of("unstructured", 0.5).check_width("w", 6)
