import io
import math
import random
import sys
import xml.etree.ElementTree

import pytest

import yopo
from yopo import InvalidArgumentError
from yopo.plots import (
    plot_evolution,
    plot_kept_rows,
    plot_perplexities,
    plot_rewards,
    plot_spectra,
    plot_speed,
)
from yopo.plots.canvas import pattern, short_names, shortened
from yopo.reinforce import Episode
from yopo.speed.result import Speed, SpeedReport
from yopo.symbolic.expression import Expression
from yopo.symbolic.history import Candidate, Evolution
from yopo.symbolic.settings import EvolutionSettings

PNG = b"\x89PNG"
COUNTS = (1, 2, 4, 12, 13, 80)


def names(count):
    return [f"model.layers.{n}.mlp" for n in range(count)]


def spectra(count):
    before = tuple(10 * math.exp(-n / 10) for n in range(30))
    return {name: (before, tuple(0.9 * value for value in before[:20])) for name in names(count)}


def speed(name="pruned", decode=(30.0, 31.0, 33.0)):
    return Speed(
        name=name,
        device="cpu",
        dtype="float32",
        parameters=10,
        bytes=40,
        prefill=(100.0, 110.0, 90.0),
        decode=decode,
        prefill_bound=150.0,
        decode_bound=None if decode is None else 50.0,
        run_peak=None,
        operations_per_second=1e9,
        bytes_per_second=1e9,
    )


def episodes(count, layers, *, ks):
    draw = random.Random(0)

    def values():
        return tuple(draw.uniform(0.05, 0.2) for _ in range(layers))

    return [
        Episode(n, values(), values(), values(), values() if ks else (), values() if ks else ())
        for n in range(count)
    ]


def evolution(values, *, drawn=(), first=50):
    def candidates(values):
        return tuple(
            Candidate(n, Expression("W"), str(n), value, iteration=max(0, n - first + 1))
            for n, value in enumerate(values)
        )

    return Evolution(candidates(values), candidates(drawn), EvolutionSettings(), ("W",), 0)


def perplexities(count):
    draw = random.Random(0)
    return [5 + math.exp(draw.uniform(0, 12)) for _ in range(count)]


def texts_of(draw, *given, **named):
    """Return what is written on a plot: the texts that an SVG drawing has as comments."""
    stream = io.BytesIO()
    draw(stream, *given, **named)
    parser = xml.etree.ElementTree.XMLParser(
        target=xml.etree.ElementTree.TreeBuilder(insert_comments=True)
    )
    tree = xml.etree.ElementTree.fromstring(stream.getvalue(), parser)
    comments = [node.text for node in tree.iter() if not isinstance(node.tag, str)]
    return [text.strip() for text in comments]


def test_perplexities_of_several_methods_are_drawn_with_units_on_the_axes():
    methods = {"yopo": [2, 3], "calibrated: FLAP": [3, 9]}
    texts = texts_of(plot_perplexities, [0.1, 0.2], methods, dense=1.5, title="a title")
    assert {"a title", "perplexity", "ratio (share of FFN rows removed)", "dense", *methods} <= {
        *texts
    }


@pytest.mark.parametrize("count", COUNTS)
def test_spectra_are_drawn_by_layer_or_summed_up(count, tmp_path):
    ks = {name: (n + 1) / 1000 for n, name in enumerate(names(count))}
    plot_spectra(tmp_path / "plot.png", spectra(count), ks, title="title")
    assert (tmp_path / "plot.png").read_bytes().startswith(PNG)
    texts = texts_of(plot_spectra, spectra(count), ks)
    assert {"before", "after", "singular value"} <= set(texts)
    if count <= 12:
        assert sum(text.startswith("KS 0.0") for text in texts) == count
    else:
        assert {"KS distance", "FFN: model.layers.n.mlp", "most KS, " + f"{count / 1000:.3f}"} <= {
            *texts
        }


@pytest.mark.parametrize("count", COUNTS)
def test_kept_rows_are_drawn_by_layer_or_summed_up(count, tmp_path):
    kept = {name: [0.5] * 5 + [1.0] * 5 for name in names(count)}
    plot_kept_rows(tmp_path / "plot.png", kept, score="gate norm", title="title")
    assert (tmp_path / "plot.png").read_bytes().startswith(PNG)
    texts = texts_of(plot_kept_rows, kept, score="gate norm")
    assert "rows in the order of their gate norm, lowest first, %" in texts
    assert texts.count("kept 75.0 % (dashed)") == (count if count <= 12 else 0)


@pytest.mark.parametrize("ks", [True, False])
@pytest.mark.parametrize("layers", [1, 80])
@pytest.mark.parametrize("count", [1, 20])
def test_rewards_are_drawn_by_episode(count, layers, ks, tmp_path):
    history = episodes(count, layers, ks=ks)
    plot_rewards(tmp_path / "plot.png", history, title="title")
    assert (tmp_path / "plot.png").read_bytes().startswith(PNG)
    texts = texts_of(plot_rewards, history)
    assert {"reward", "episode"} <= set(texts)
    assert ("KS distance" in texts) == ks
    assert ("all FFNs" in texts) == (layers > 1)


def test_a_reward_without_a_bound_is_drawn_on_a_logarithmic_axis():
    """The published reward is 99999 where two spectra do not differ."""
    history = [Episode(n, (0.0,) * 3, (10.0, 12.0, 99999.0), (0.0,) * 3) for n in range(3)]
    assert "1,000" in texts_of(plot_rewards, history)


def test_speed_is_drawn_beside_its_bound(tmp_path):
    report = SpeedReport(speed(), speed("a/dense"), 1, 8, 4)
    plot_speed(tmp_path / "plot.png", report, title="title")
    assert (tmp_path / "plot.png").read_bytes().startswith(PNG)
    texts = set(texts_of(plot_speed, report))
    assert {"pruned", "a/dense", "bound", "tokens per second", "31.0", "100"} <= texts
    assert {"prefill: 1.00 times as fast", "decode: 1.00 times as fast"} <= texts
    alone = set(texts_of(plot_speed, SpeedReport(speed(decode=None), None, 1, 8, 4)))
    assert "prefill" in alone
    assert "a/dense" not in alone


@pytest.mark.parametrize("count", [1, 2, 12, 350])
def test_a_search_is_drawn_beside_the_random_search(count, tmp_path):
    found = evolution(perplexities(count), drawn=perplexities(count)[::-1])
    plot_evolution(tmp_path / "plot.png", found, title="title")
    assert (tmp_path / "plot.png").read_bytes().startswith(PNG)
    texts = set(texts_of(plot_evolution, found))
    assert {"evolution, best so far", "random search, best so far", "one expression"} <= texts
    assert {"expressions evaluated", "fitness (lower is better)"} <= texts
    assert "random search, best so far" not in texts_of(plot_evolution, evolution([2.0, 1.0]))


def test_expressions_that_are_far_too_bad_do_not_stretch_the_axis():
    values = [90.0, 2.0, math.inf, 1e9, 1.5]
    texts = texts_of(plot_evolution, evolution(values, drawn=[90.0, 3.0]))
    assert "more than 15, or infinite" in texts
    assert {"2", "10"} <= set(texts)
    assert "100" not in texts
    assert not any("infinite" in text for text in texts_of(plot_evolution, evolution([2.0, 1.0])))


@pytest.mark.parametrize("values", [[0.0, 1.0], [-5.0, 1000.0], [3.0, 3.0], [math.inf, -2.0]])
def test_fitness_may_be_any_number(values, tmp_path):
    plot_evolution(tmp_path / "plot.png", evolution(values, drawn=values))
    assert (tmp_path / "plot.png").read_bytes().startswith(PNG)


def test_a_search_without_a_finite_fitness_is_not_drawn(tmp_path):
    with pytest.raises(InvalidArgumentError, match="`evolution` has no finite fitness"):
        plot_evolution(tmp_path / "plot.png", evolution([math.inf]))
    assert not (tmp_path / "plot.png").exists()


@pytest.mark.parametrize(
    ("draw", "given", "name"),
    [
        (plot_spectra, ({}, {}), "spectra"),
        (plot_kept_rows, ({},), "kept"),
        (plot_rewards, ([],), "history"),
    ],
)
def test_nothing_to_draw_is_told(draw, given, name, tmp_path):
    with pytest.raises(InvalidArgumentError, match=f"`{name}` is empty"):
        draw(tmp_path / "plot.png", *given)
    assert not (tmp_path / "plot.png").exists()


def test_the_same_is_drawn_as_the_same_file():
    streams = [io.BytesIO(), io.BytesIO()]
    for stream in streams:
        plot_spectra(stream, spectra(2), dict.fromkeys(names(2), 0.1))
    assert streams[0].getvalue() == streams[1].getvalue()


def test_names_with_dollars_are_written_as_they_are():
    name = r"a $\broken{ name$"
    texts = texts_of(plot_perplexities, [0.1], {name: [2]}, dense=1.5, title=name)
    assert texts.count(name) == 2


def test_singular_values_of_zero_have_no_place_on_a_logarithmic_axis(tmp_path):
    pairs = dict.fromkeys(names(2), ((2.0, 1.0, 0.0), (1.5, 0.0)))
    plot_spectra(tmp_path / "plot.png", pairs, dict.fromkeys(pairs, 0.1))
    pairs = dict.fromkeys(names(13), ((2.0, 0.0, 0.0), (0.0, 0.0)))
    plot_spectra(tmp_path / "plot.png", pairs, dict.fromkeys(pairs, 0.1))


def test_a_plot_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(yopo.YopoError, match=r'pip install "yopo-prune\[plot\]"'):
        plot_perplexities(tmp_path / "plot.png", [0.1], {"yopo": [2]}, dense=1.5, title="t")


def test_names_are_told_by_what_is_not_the_same_in_all():
    assert short_names(names(2)) == ["layers.0", "layers.1"]
    assert short_names(["encoder.0.mlp", "decoder.0.mlp"]) == ["encoder", "decoder"]
    assert short_names(["a", "b"]) == ["a", "b"]
    experts = ["layers.0.mlp.experts.1", "layers.0.mlp"]
    assert short_names(experts) == ["0.mlp.experts.1", "0.mlp"]
    assert pattern(names(3)) == "FFN: model.layers.n.mlp"


def test_what_is_too_long_loses_its_middle():
    assert shortened("abcdefghij", 10) == "abcdefghij"
    assert shortened("abcdefghijk", 7) == "abc…ijk"
