"""The search: its history, what it never does twice, its log, and processes that share the work."""

import json
import logging
import math
import os
from dataclasses import replace

import pytest
import torch

from conftest import run_python
from yopo import InvalidArgumentError, PolicyFileError, YopoError
from yopo.symbolic.evolution import evolve
from yopo.symbolic.expression import Expression
from yopo.symbolic.history import Candidate, Evolution
from yopo.symbolic.search_log import LOG_FILE
from yopo.symbolic.settings import EvolutionSettings
from yopo.symbolic.simplifying import simplify

SMALL = EvolutionSettings(population=12, iterations=25, parents=5)


class Distance:
    """Tell how far the order of scores within rows is from that of a target."""

    def __init__(self, target="mul(sqrt(X), log(add(W, G)))"):
        generator = torch.Generator().manual_seed(0)
        uniform = {"W": (8, 20), "G": (8, 20), "X": (1, 20)}
        self.terminals = {n: 3 * torch.rand(s, generator=generator) for n, s in uniform.items()}
        self.target = self.ranks(Expression.parse(target))
        self.measured = []

    def scores(self, expression):
        return expression.evaluate(self.terminals).expand(8, 20)

    def ranks(self, expression):
        return self.scores(expression).argsort(dim=1, stable=True).argsort(dim=1).float()

    def __call__(self, expression):
        self.measured.append(expression)
        return float((self.ranks(expression) - self.target).abs().mean())


class DistanceOfMasks(Distance):
    """The same, where expressions that rank alike are known to be worth the same."""

    def signature(self, expression):
        scores = self.scores(expression)
        if not scores.isfinite().all() or (scores.amax(1) == scores.amin(1)).any():
            return None
        return self.ranks(expression).to(torch.uint8).numpy().tobytes()


# What a search does.


def test_the_defaults_are_what_is_published():
    settings = EvolutionSettings()
    assert (settings.population, settings.iterations, settings.parents) == (50, 300, 10)
    assert (settings.mutation, settings.selection) == (0.5, "topk")
    assert (settings.min_depth, settings.max_depth) == (2, 4)  # edges: three to five levels


def test_the_same_seed_makes_the_same_history_and_another_another():
    first, again, other = (evolve(Distance(), settings=SMALL, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.history != other.history


def test_the_history_holds_every_evaluation_once_with_where_it_came_from():
    fitness = DistanceOfMasks()
    found = evolve(fitness, settings=SMALL, seed=3)
    assert [candidate.number for candidate in found.history] == list(range(12 + 25))
    assert [c.iteration for c in found.history] == [0] * 12 + list(range(1, 26))
    assert len({candidate.signature for candidate in found.history}) == 37
    assert {c.operation for c in found.history} == {"random", "crossover", "mutation"}
    for candidate in found.history:
        assert simplify(candidate.expression) == candidate.expression
        assert candidate.expression.depth <= 4
        assert "W" in candidate.expression.terminals
        assert candidate.signature == fitness.signature(candidate.expression).hex()
        assert candidate.fitness == fitness(candidate.expression)
        assert len(candidate.parents) == (0 if candidate.operation == "random" else 2)
        assert all(parent < candidate.number for parent in candidate.parents)
    assert found.best.fitness == min(c.fitness for c in found.history)
    assert found.expression == found.best.expression
    assert found.best_so_far()[-1] == found.best.fitness
    assert list(found.best_so_far()) == sorted(found.best_so_far(), reverse=True)


def test_nothing_is_measured_twice_not_even_by_the_random_search():
    fitness = DistanceOfMasks()
    found = evolve(fitness, settings=replace(SMALL, iterations=100), seed=0)
    signatures = [fitness.signature(expression) for expression in fitness.measured]
    assert len(set(signatures)) == len(signatures)
    assert {c.signature for c in (*found.history, *found.random)} == {s.hex() for s in signatures}
    assert len(signatures) < len(found.history) + len(found.random)


def test_without_signatures_expressions_of_one_text_are_the_same():
    fitness = Distance()
    found = evolve(fitness, settings=SMALL, seed=0)
    texts = [str(candidate.expression) for candidate in found.history]
    assert len(set(texts)) == len(texts) == 37
    assert len({str(expression) for expression in fitness.measured}) == len(fitness.measured)


def test_parents_are_two_of_the_best_of_the_population():
    found = evolve(Distance(), settings=SMALL, seed=0)
    population = list(found.history[:12])
    for child in found.history[12:]:
        best = sorted(population, key=lambda c: (c.fitness, c.number))[:5]
        assert set(child.parents) <= {candidate.number for candidate in best}
        population.append(child)
        population.remove(max(population, key=lambda c: (c.fitness, c.number)))


@pytest.mark.parametrize("replacement", ["worst", "append", "oldest"])
@pytest.mark.parametrize("selection", ["topk", "tournament"])
def test_every_way_to_choose_and_replace_is_a_search(selection, replacement):
    settings = replace(SMALL, selection=selection, replacement=replacement)
    found = evolve(Distance(), settings=settings, seed=0)
    assert len(found.history) == 37
    oldest = {child.number: min(child.parents) for child in found.history if child.parents}
    if replacement == "oldest":
        assert all(parent >= number - 12 for number, parent in oldest.items())
    elif selection == "topk":
        assert min(oldest.values()) < 12


def test_worst_and_append_choose_the_same_parents_of_the_best():
    histories = [
        evolve(Distance(), settings=replace(SMALL, replacement=replacement), seed=0).history
        for replacement in ("worst", "append")
    ]
    assert histories[0] == histories[1]


@pytest.mark.parametrize(("mutation", "operations"), [(0, {"crossover"}), (1, {"mutation"})])
def test_children_are_mutated_as_often_as_said(mutation, operations):
    settings = replace(SMALL, mutation=mutation)
    found = evolve(Distance(), settings=settings, seed=0)
    assert {c.operation for c in found.history if c.iteration} - {"random"} == operations


def test_children_of_one_population_do_not_know_each_other():
    found = evolve(Distance(), settings=replace(SMALL, offspring=10), seed=0)
    assert len(found.history) == 37
    for child in found.history[12:]:
        assert all(parent < 12 + (child.iteration - 1) // 10 * 10 for parent in child.parents)
    assert len({candidate.signature for candidate in found.history}) == 37


def test_expressions_of_rows_need_no_weights_of_matrices():
    settings = replace(SMALL, iterations=0, random_search=False)
    found = evolve(lambda e: e.size, settings=settings, terminals=("gate_norm", "up_norm"))
    assert all(c.expression.terminals <= {"gate_norm", "up_norm"} for c in found.history)
    settings = replace(settings, required=("G",))
    found = evolve(lambda e: e.size, settings=settings)
    assert all("G" in candidate.expression.terminals for candidate in found.history)
    assert not all("W" in candidate.expression.terminals for candidate in found.history)


def test_expressions_are_simplified_only_where_asked_for():
    found = evolve(Distance(), settings=replace(SMALL, simplify=False), seed=0)
    assert any(simplify(c.expression) != c.expression for c in found.history)
    assert min(c.expression.depth for c in found.history[:12]) == 2
    found = evolve(Distance(), settings=replace(SMALL, approximate=False, iterations=200), seed=0)
    for candidate in found.history:
        assert simplify(candidate.expression, approximate=False) == candidate.expression


# Random search.


def test_random_search_begins_with_the_same_and_has_as_many_evaluations():
    found = evolve(Distance(), settings=SMALL, seed=0)
    assert found.random[:12] == found.history[:12]
    assert len(found.random) == len(found.history)
    assert [candidate.number for candidate in found.random] == list(range(37))
    assert {candidate.operation for candidate in found.random} == {"random"}
    other = evolve(Distance(), settings=replace(SMALL, mutation=0.1), seed=0)
    assert other.random == found.random
    without = evolve(Distance(), settings=replace(SMALL, random_search=False), seed=0)
    assert (without.history, without.random) == (found.history, ())


def test_evolution_beats_random_search_at_the_same_number_of_evaluations():
    """By the mean over seeds and targets; single searches are lucky or not."""
    settings = EvolutionSettings(population=20, iterations=80)
    evolved, drawn = [], []
    for target in ("mul(add(W, sqrt(X)), sqrt(G))", "add(mul(W, X), G)"):
        for seed in range(3):
            found = evolve(DistanceOfMasks(target), settings=settings, seed=seed)
            assert len(found.history) == len(found.random)
            evolved.append(found.best.fitness)
            drawn.append(min(candidate.fitness for candidate in found.random))
    assert sum(evolved) < 0.8 * sum(drawn)
    assert sum(e < d for e, d in zip(evolved, drawn, strict=True)) > sum(
        e > d for e, d in zip(evolved, drawn, strict=True)
    )


def test_that_random_search_was_better_is_told(caplog):
    def fitness(expression):
        lucky = found and str(expression) == str(found[0].random[-1].expression)
        return -1.0 if lucky else expression.size

    found = []
    found.append(evolve(fitness, settings=SMALL))
    with caplog.at_level(logging.WARNING, "yopo"):
        again = evolve(fitness, settings=SMALL)
    assert "Random search has found a better expression than evolution, of fitness -1" in (
        caplog.text
    )
    assert again.best.fitness > -1


# What fitness may do.


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, InvalidArgumentError("no")])
def test_what_is_not_finite_or_refused_is_the_worst_there_is(bad):
    def fitness(expression):
        if "X" not in expression.terminals:
            return float(expression.size)
        if isinstance(bad, Exception):
            raise bad
        return bad

    found = evolve(fitness, settings=SMALL, seed=0)
    for candidate in found.history:
        assert math.isinf(candidate.fitness) == ("X" in candidate.expression.terminals)
        assert candidate.fitness > 0
    assert "X" not in found.expression.terminals


def test_any_other_error_ends_the_search():
    def fitness(expression):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        evolve(fitness, settings=SMALL)


def test_a_fitness_that_is_no_number_is_told():
    with pytest.raises(InvalidArgumentError, match=r"`fitness` must return a number, .* got None"):
        evolve(lambda expression: None, settings=SMALL)


def test_numbers_of_torch_will_do():
    found = evolve(lambda expression: torch.tensor(expression.size), settings=SMALL)
    assert isinstance(found.best.fitness, float)


def test_a_signature_that_is_no_bytes_is_told():
    fitness = DistanceOfMasks()
    fitness.signature = str
    with pytest.raises(InvalidArgumentError, match=r"`fitness\.signature` must return bytes"):
        evolve(fitness, settings=SMALL)


def test_that_nothing_can_be_measured_is_told():
    with pytest.raises(YopoError, match="none of the first 12 expressions has a finite fitness"):
        evolve(lambda expression: math.nan, settings=SMALL)
    fitness = DistanceOfMasks()
    fitness.signature = lambda expression: None
    with pytest.raises(InvalidArgumentError, match="of 1000 random expressions 0 could be"):
        evolve(fitness, settings=SMALL)


def test_a_search_ends_early_where_there_is_nothing_else_to_try(caplog):
    fitness = DistanceOfMasks()
    fitness.signature = lambda expression: bytes([expression.size % 5])
    with caplog.at_level(logging.WARNING, "yopo"):
        found = evolve(fitness, settings=SMALL)
    assert len(found.history) == len(found.random) == len(fitness.measured) == 5
    assert "hardly more than 5 expressions to begin with" in caplog.text
    assert "ends early" in caplog.text


# Arguments.


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("population", 1, "`population` must be a whole number of at least 2, got 1"),
        ("population", 2.0, "`population` must be a whole number"),
        ("iterations", -1, "`iterations` must be a whole number of at least 0"),
        ("iterations", True, "`iterations` must be a whole number"),
        ("parents", 1, "`parents` must be a whole number of at least 2"),
        ("offspring", 0, "`offspring` must be a whole number of at least 1"),
        ("min_depth", -1, "`min_depth` must be a whole number of at least 0"),
        ("min_depth", 5, r"`max_depth` must be in \[`min_depth`, 17\], which is \[5, 17\], got 4"),
        ("max_depth", 18, r"`max_depth` must be in"),
        ("mutation", 1.5, r"`mutation` must be in \[0, 1\], got 1.5"),
        ("mutation", math.nan, r"`mutation` must be in \[0, 1\]"),
        ("mutation", "half", r"`mutation` must be in \[0, 1\]"),
        ("selection", "best", '`selection` must be "topk" or "tournament", got \'best\''),
        ("replacement", "none", '`replacement` must be "worst", "append" or "oldest"'),
        ("simplify", 1, "`simplify` must be True or False, got 1"),
        ("required", ("V",), "`required` may name W, G, X, .*, got 'V'"),
        ("required", "W", "`required` must be several names of terminals, got 'W'"),
    ],
)
def test_settings_out_of_range_are_refused(name, value, told):
    with pytest.raises(InvalidArgumentError, match=told):
        EvolutionSettings(**{name: value})


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"terminals": ("W", "Y")}, "`terminals` may name W, .*, got 'Y'"),
        ({"terminals": ("W", "W")}, "`terminals` names a terminal twice: W, W"),
        ({"terminals": ()}, "`terminals` is empty"),
        ({"terminals": "WGX"}, "`terminals` must be several names"),
        ({"fitness": 3}, "`fitness` must be a function from an expression to a number, got 3"),
        ({"settings": {"population": 9}}, "`settings` must be `EvolutionSettings`, got {'popul"),
        ({"seed": -1}, "`seed` must be a whole number of at least 0"),
        ({"workers": 0}, "`workers` must be a whole number of at least 1"),
        (
            {"settings": EvolutionSettings(required=("leverage",))},
            "`required` names `leverage`, which is none of the `terminals`: W, G, X",
        ),
    ],
)
def test_arguments_out_of_range_are_refused_before_anything_is_measured(arguments, told, tmp_path):
    fitness = Distance()
    with pytest.raises(InvalidArgumentError, match=told):
        evolve(**{"fitness": fitness, "folder": tmp_path / "search"} | arguments)
    assert fitness.measured == []
    assert not (tmp_path / "search").exists()


def test_a_set_of_terminals_is_taken_in_one_order():
    of_set = evolve(Distance(), settings=SMALL, terminals={"X", "W", "G"})
    assert of_set == evolve(Distance(), settings=SMALL, terminals=("G", "W", "X"))


# What was found, on disk and as text.


def test_an_evolution_is_read_as_it_was_written(tmp_path):
    found = evolve(Distance(), settings=replace(SMALL, required=("W",)), seed=4)
    found = replace(found, history=(*found.history, replace(found.best, fitness=math.inf)))
    found.save(tmp_path)
    assert Evolution.load(tmp_path) == found
    assert "Infinity" not in (tmp_path / "evolution_config.json").read_text()


def test_a_damaged_evolution_is_told(tmp_path):
    evolve(Distance(), settings=SMALL).save(tmp_path)
    file = tmp_path / "evolution_config.json"
    file.write_text(file.read_text().replace('"fitness"', '"worth"'))
    with pytest.raises(PolicyFileError, match="holds a damaged evolution"):
        Evolution.load(tmp_path)
    with pytest.raises(PolicyFileError, match="holds no evolution"):
        Evolution.load(tmp_path / "nowhere")


def candidate(number, text, fitness, **named):
    return Candidate(number, Expression.parse(text), f"{number:02}", fitness, **named)


def test_the_family_tree_shows_each_ancestor_once():
    history = (
        candidate(0, "W", 8.0),
        candidate(1, "mul(W, G)", 7.25),
        candidate(2, "sqr(G)", 9.0),
        candidate(3, "mul(G, G)", 7.0, operation="crossover", parents=(1, 0), iteration=1),
        candidate(4, "add(G, W)", 6.5, operation="mutation", parents=(3, 1), iteration=2),
        candidate(5, "sub(G, W)", 6.75, operation="random", iteration=3),
    )
    found = Evolution(history, (), SMALL, ("W", "G"), 0)
    assert found.family_tree().splitlines() == [
        "#4 6.5: add(G, W), by mutation in iteration 2",
        "  #3 7: mul(G, G), by crossover in iteration 1",
        "    #1 7.25: mul(W, G), at random",
        "    #0 8: W, at random",
        "  #1, as above",
    ]
    assert found.best_so_far() == (8.0, 7.25, 7.25, 7.0, 6.5, 6.5)
    deep = [history[0], history[1]]
    for number in range(2, 3000):
        parents = (number - 1, number - 2)
        deep.append(candidate(number, "W", -number, operation="crossover", parents=parents))
    assert "#0 8: W" in replace(found, history=tuple(deep)).family_tree()


# Going on.


def kill_after(evaluations, fitness):
    """Return the fitness, which raises what nobody expects after so many evaluations."""

    def killed(expression):
        if len(fitness.measured) == evaluations:
            raise MemoryError
        return fitness(expression)

    return killed


@pytest.mark.parametrize("evaluations", [0, 5, 20, 45])
def test_a_search_that_was_cut_off_goes_on_to_the_same_end(evaluations, tmp_path):
    whole = evolve(Distance(), settings=SMALL, seed=6)
    with pytest.raises(MemoryError):
        evolve(kill_after(evaluations, Distance()), settings=SMALL, seed=6, folder=tmp_path / "a")
    with (tmp_path / "a" / LOG_FILE).open("ab") as stream:
        stream.write(b'{"search": "evolution", "number": 5, "expr')
    fitness = Distance()
    again = evolve(fitness, settings=SMALL, seed=6, folder=tmp_path / "a")
    assert again == whole == Evolution.load(tmp_path / "a")
    evaluated = {c.signature for c in (*whole.history, *whole.random)}
    assert len(fitness.measured) == len(evaluated) - evaluations
    lines = (tmp_path / "a" / LOG_FILE).read_text().splitlines()
    assert len(lines) == 1 + len(evaluated)
    entries = [json.loads(line) for line in lines]
    assert {entry["signature"] for entry in entries[1:]} == evaluated
    assert {entry["search"] for entry in entries[1:]} == {"evolution", "random"}
    fitness = Distance()
    assert evolve(fitness, settings=SMALL, seed=6, folder=tmp_path / "a") == whole
    assert fitness.measured == []


def test_more_iterations_go_on_where_fewer_have_ended(tmp_path):
    settings = replace(SMALL, iterations=60)
    evolve(Distance(), settings=SMALL, folder=tmp_path / "a")
    found = evolve(Distance(), settings=settings, folder=tmp_path / "a")
    assert found == evolve(Distance(), settings=settings)


def test_infinite_fitness_is_known_too(tmp_path):
    def fitness(expression):
        measured.append(expression)
        return math.inf if "X" in expression.terminals else expression.size

    measured = []
    found = evolve(fitness, settings=SMALL, folder=tmp_path / "a")
    count = len(measured)
    assert evolve(fitness, settings=SMALL, folder=tmp_path / "a") == found
    assert len(measured) == count
    assert "Infinity" not in (tmp_path / "a" / LOG_FILE).read_text()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": 1}, "another `seed`: 0 instead of 1"),
        ({"terminals": ("W", "G")}, "another `terminals`"),
        ({"settings": replace(SMALL, parents=4)}, "another `parents`: 5 instead of 4"),
        ({"settings": replace(SMALL, population=13)}, "another `population`: 12 instead of 13"),
    ],
)
def test_the_log_of_another_search_is_refused(changes, told, tmp_path):
    evolve(Distance(), settings=SMALL, folder=tmp_path / "a")
    before = (tmp_path / "a" / LOG_FILE).read_bytes()
    with pytest.raises(InvalidArgumentError, match=f"holds a search with {told}"):
        evolve(Distance(), **{"settings": SMALL, "folder": tmp_path / "a"} | changes)
    assert (tmp_path / "a" / LOG_FILE).read_bytes() == before


def test_the_log_of_another_fitness_is_refused_where_it_can_be_told_apart(tmp_path):
    one, other = Distance(), Distance()
    one.fingerprint, other.fingerprint = "opt-125m at 0.5", "opt-125m at 0.6"
    evolve(one, settings=SMALL, folder=tmp_path / "a")
    with pytest.raises(InvalidArgumentError, match=r"another `fingerprint`: 'opt-125m at 0\.5'"):
        evolve(other, settings=SMALL, folder=tmp_path / "a")


def test_folders_of_something_else_and_damaged_logs_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path, tmp_path / "file"):
        with pytest.raises(InvalidArgumentError, match="exists and holds no search"):
            evolve(Distance(), settings=SMALL, folder=folder)
    evolve(Distance(), settings=SMALL, folder=tmp_path / "a")
    log = tmp_path / "a" / LOG_FILE
    lines = log.read_text().splitlines()
    for number, line, told in (
        (0, '{"kind": "diary"}', "was not written by yopo as the log of a search"),
        (0, lines[0].replace('"format": 1', '"format": 99'), "has format 99"),
        (3, "{", "line 4 of .* is damaged"),
        (3, "[]", "line 4 of .* is damaged"),
        (3, '{"fitness": 1}', "line 4 of .* is damaged: KeyError"),
    ):
        log.write_text("\n".join([*lines[:number], line, *lines[number + 1 :]]) + "\n")
        with pytest.raises(PolicyFileError, match=told):
            evolve(Distance(), settings=SMALL, folder=tmp_path / "a")


def test_a_log_that_was_cut_off_in_its_first_line_begins_anew(tmp_path):
    (tmp_path / LOG_FILE).write_text('{"kind": "yopo-eval')
    found = evolve(Distance(), settings=SMALL, folder=tmp_path)
    assert evolve(Distance(), settings=SMALL, folder=tmp_path) == found
    assert json.loads((tmp_path / LOG_FILE).read_text().splitlines()[0])["seed"] == 0


def test_each_evaluation_is_on_the_disk_before_the_next_begins(tmp_path):
    def fitness(expression):
        lines = (tmp_path / "a" / LOG_FILE).read_bytes().splitlines()
        assert len(lines) == 1 + len(measured)
        measured.append(expression)
        return expression.size

    measured = []
    evolve(fitness, settings=SMALL, folder=tmp_path / "a")


def test_a_folder_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PolicyFileError, match=r"cannot write .*No space left on device"):
        evolve(Distance(), settings=SMALL, folder=tmp_path / "a")


# Ctrl-C.


def interrupted_after(evaluations):
    fitness = Distance()

    def interrupted(expression):
        if len(fitness.measured) == evaluations:
            raise KeyboardInterrupt
        return fitness(expression)

    return interrupted


def test_ctrl_c_keeps_the_best_so_far_and_says_so(caplog, tmp_path):
    whole = evolve(Distance(), settings=SMALL)
    with caplog.at_level(logging.WARNING, "yopo"):
        found = evolve(interrupted_after(20), settings=SMALL, folder=tmp_path / "a")
    assert "Interrupted after 8 of 25 iterations" in caplog.text
    assert found.history == whole.history[:20]
    assert found.random == ()
    assert Evolution.load(tmp_path / "a") == found
    assert evolve(Distance(), settings=SMALL, folder=tmp_path / "a") == whole
    found = evolve(interrupted_after(45), settings=SMALL)
    assert found.history == whole.history
    assert found.random == whole.random[: len(found.random)] != ()


def test_ctrl_c_before_there_is_a_population_ends_everything():
    with pytest.raises(KeyboardInterrupt):
        evolve(interrupted_after(5), settings=SMALL)


# Other processes.

WORK = """
import json, multiprocessing, os, signal, sys, time
from pathlib import Path
import torch
from yopo import YopoError
from yopo.symbolic.evolution import evolve
from yopo.symbolic.history import Evolution
from yopo.symbolic.settings import EvolutionSettings

SETTINGS = EvolutionSettings(population=10, iterations=20, parents=5, offspring=3)


class Changing:
    \"\"\"Measure by what is changed and put back, as a model that is pruned.\"\"\"

    def __init__(self, trap=None, what=None, meeting=None):
        self.weight = torch.linspace(0.1, 2, 40).view(4, 10)
        self.trap, self.what, self.meeting, self.count = trap, what, meeting, 0

    def meet(self):
        \"\"\"Wait until two processes are at work.\"\"\"
        (self.meeting / str(os.getpid())).touch()
        while len(list(self.meeting.iterdir())) < 2:
            time.sleep(0.01)

    def __call__(self, expression):
        if self.meeting is not None and self.count == 0:
            self.meet()
        if str(expression) == self.trap or (self.count and self.count == self.trap):
            self.what()
        self.count += 1
        dense = self.weight.clone()
        self.weight *= expression.evaluate({"W": dense, "G": dense.flip(1), "X": dense[:1]}) > 0.3
        time.sleep(0.004)
        found = float(self.weight.sum())
        self.weight.copy_(dense)
        return found


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt():
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(600)


def child(work):
    if (process := os.fork()) == 0:
        try:
            work()
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return process


def ended(process):
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def as_rank(rank, root):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = f"file://{root}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    fitness = Changing()
    found = evolve(fitness, settings=SETTINGS, folder=root / "ranks")
    found.save(root / f"rank-{rank}")
    (root / f"rank-{rank}" / "count").write_text(str(fitness.count))
    torch.distributed.destroy_process_group()


def main(root):
    whole = evolve(Changing(), settings=SETTINGS)
    told = {"evaluations": len({c.signature for c in (*whole.history, *whole.random)})}

    work = lambda: evolve(Changing(17, die), settings=SETTINGS, folder=root / "killed")
    told["killed"] = ended(child(work))
    fitness = Changing()
    told["killed again"] = evolve(fitness, settings=SETTINGS, folder=root / "killed") == whole
    told["killed count"] = fitness.count

    (root / "ranks").mkdir()
    (root / "ranks" / "evaluations.jsonl").write_bytes(
        b"".join((root / "killed" / "evaluations.jsonl").open("rb").readlines()[:8])
    )
    told["ranks"] = [ended(p) for p in [child(lambda r=r: as_rank(r, root)) for r in (0, 1)]]
    told["ranks same"] = [Evolution.load(root / f"rank-{r}") == whole for r in (0, 1)]
    told["ranks counts"] = [int((root / f"rank-{r}" / "count").read_text()) for r in (0, 1)]
    told["ranks lines"] = len((root / "ranks" / "evaluations.jsonl").read_bytes().splitlines())

    trap = str(whole.history[23].expression)
    (root / "meeting").mkdir()
    fitness = Changing(trap, interrupt, root / "meeting")
    started = time.perf_counter()
    found = evolve(fitness, settings=SETTINGS, workers=2, folder=root / "workers")
    told["workers seconds"] = time.perf_counter() - started
    told["workers same"] = found.history == whole.history[:22]
    told["workers left"] = len(multiprocessing.active_children())
    told["workers again"] = evolve(Changing(), settings=SETTINGS, folder=root / "workers") == whole

    # A worker that dies is told by the pool, whatever started it: forked ones start at once.
    started_by = multiprocessing.get_context
    multiprocessing.get_context = lambda kind: started_by("fork")
    try:
        evolve(Changing(trap, die), settings=SETTINGS, workers=2, folder=root / "died")
    except YopoError as error:
        told["died"] = str(error)
    told["died left"] = len(multiprocessing.active_children())
    fitness = Changing()
    told["died again"] = evolve(fitness, settings=SETTINGS, folder=root / "died") == whole
    told["died known"] = told["evaluations"] - fitness.count
    print(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Return what became of searches that were killed, shared, interrupted."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "work.py").write_text(WORK)
    done = run_python(folder / "work.py", folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) | {"stderr": done.stderr}


def test_a_search_that_was_killed_goes_on_to_the_same_end(processes):
    assert processes["killed"] == -9
    assert processes["killed again"]
    assert processes["killed count"] == processes["evaluations"] - 17


def test_ranks_share_the_work_and_end_with_what_one_process_finds(processes):
    assert processes["ranks"] == [0, 0]
    assert processes["ranks same"] == [True, True]
    known = 7  # which are in the log, and which both ranks know of
    assert sum(processes["ranks counts"]) == processes["evaluations"] - known
    assert min(processes["ranks counts"]) > 0.3 * processes["evaluations"]
    assert processes["ranks lines"] == 1 + processes["evaluations"]


def test_workers_find_what_one_process_finds_and_end_with_ctrl_c_at_once(processes):
    """They measure by what each of them changes: they must not share it."""
    assert processes["workers same"]
    assert processes["workers seconds"] < 200
    assert processes["workers left"] == 0
    assert processes["workers again"]
    assert "Interrupted after 12 of 20 iterations" in processes["stderr"]
    assert "Traceback" not in processes["stderr"]


def test_a_worker_that_dies_ends_the_search_with_an_error(processes):
    assert "one of 2 worker processes has died" in processes["died"]
    assert "the same call goes on from there" in processes["died"]
    assert processes["died left"] == 0
    assert processes["died again"]
    assert processes["died known"] >= 22


def test_a_fitness_that_cannot_be_sent_to_workers_is_told():
    with pytest.raises(InvalidArgumentError, match=r"`workers=2` sends `fitness` to .* pickled"):
        evolve(lambda expression: 1.0, settings=SMALL, workers=2)
