import pytest

import yopo
from yopo.calls import Verbatim, changed_arguments, lasting, written_call


def test_a_call_is_written_as_python_reads_it():
    call = written_call("f", "a'b", Verbatim("model"), None, 0.3, x=None, y=[1, "z"], seed=0)
    assert call == """f("a'b", model, 0.3, y=[1, 'z'], seed=0)"""
    assert eval(call, {"f": lambda *a, **k: (a, k), "model": 7}) == (
        ("a'b", 7, 0.3),
        {"y": [1, "z"], "seed": 0},
    )


def test_defaults_are_left_out():
    def function(*, a=1, b=2, c=3):
        return a, b, c

    assert changed_arguments(function, {"a": 1, "b": 5, "other": 7}) == {"b": 5}


@pytest.mark.parametrize("given", [None, 3, "model.*"])
def test_what_lasts_stays(given):
    assert lasting(given) is given


def test_what_is_gone_through_once_becomes_a_list():
    assert lasting(iter([1, 2])) == [1, 2]
    assert lasting(range(2)) == [0, 1]


@pytest.mark.parametrize(
    "call",
    [
        "yopo.PolicyPruner(seed=0)",
        "yopo.PolicyPruner(ratio=0.4, episodes=3, allocation='adaptive', seed=2)",
        "yopo.PolicyPruner(reward='spectral', restore=False, seed=0)",
        "yopo.PolicyPruner(samples=4, reward='spectral', multiple_of=8, seed=0)",
        "yopo.PolicyPruner.lean(restore=False, seed=1)",
        "yopo.PolicyPruner.prunenet(ratio=0.2, episodes=2, kl=True, seed=0)",
    ],
)
def test_a_pruner_is_written_as_the_call_that_makes_it(call):
    pruner = eval(call, {"yopo": yopo})
    assert repr(pruner) == call
    assert eval(repr(pruner), {"yopo": yopo})._recipe == pruner._recipe
