"""Every block of code in README and docs runs, and prints what the page says."""

import ast
import doctest
import inspect
import io
import json
import re
import shlex
import shutil
from contextlib import redirect_stdout
from copy import deepcopy
from itertools import chain
from pathlib import Path

import pytest
import torch
from make import BLOCK
from transformers import AutoModelForCausalLM, AutoTokenizer

import command_line
import yopo
from yopo.adapters.layouts import LAYOUTS
from yopo.cli import main
from yopo.embedded import model_path
from yopo.embedded.stories import write_text

ROOT = Path(__file__).parents[2]
PAGES = {
    str(file.relative_to(ROOT).with_suffix("")): file
    for file in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if "results" not in file.parts
}
ELSEWHERE = "cd git hf llama-quantize make pip python torchrun transformers vllm".split()
"""Commands that pages name and this test does not run: other tools, and what has its own tests."""
TO_DENSE = ("MODEL", "llama", "meta-llama/Llama-2-7b-hf")
"""Names of models on pages; a small one lies there."""


def blocks_of(text, *kinds):
    """Yield kind, code and line of each block; files that a page includes are written otherwise."""
    for found in BLOCK.finditer(text):
        kind, _, code = found.groups()
        if kind in kinds:
            yield kind, code, text.count("\n", 0, found.start()) + 1


@pytest.fixture(scope="module")
def trained():
    """Return a trained model and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(model_path())


@pytest.fixture(scope="module")
def folders(trained, tmp_path_factory):
    """Return a folder with what pages take for granted: a model, one that was pruned, and texts."""
    folder = tmp_path_factory.mktemp("reader")
    model, tokenizer = trained
    model.save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    yopo.prune_checkpoint(folder / "dense", folder / "pruned", 0.3)
    for name in ("text.txt", "stories.txt"):
        (folder / name).write_text(write_text(5, 6000), encoding="utf-8")
    question = {"context": "The", "choices": [" cat", " dog"], "label": 0}
    fill_in = {"contexts": ["The cat", "The dog"], "continuation": " ran.", "label": 0}
    questions = folder / "questions"
    questions.mkdir()
    for task in "piqa hellaswag arc_easy arc_challenge winogrande".split():
        line = fill_in if task == "winogrande" else question
        (questions / f"{task}.jsonl").write_text(f"{json.dumps(line)}\n" * 4, encoding="utf-8")
    return folder


@pytest.fixture
def reader(trained):
    """Return the function that makes the names which pages take for granted."""

    def make():
        model, tokenizer = trained
        models = {name: deepcopy(model) for name in ("model", "dense", "other_model")}
        ids = torch.arange(8 * 64).view(8, 64) % 500 + 3
        return models | {"tokenizer": tokenizer, "ids": ids, "__name__": "__main__"}

    return make


@pytest.fixture
def place(folders, tmp_path, monkeypatch):
    """Return the function that makes a folder for a page to run in, and goes there."""

    def make(text):
        target = tmp_path / "reader"
        shutil.copytree(folders, target)
        for link in TO_DENSE:
            (target / link).parent.mkdir(exist_ok=True)
            shutil.copytree(folders / "dense", target / link)
        if re.search(r'--output pruned\b|"dense", "pruned"|save_pretrained\("pruned"\)', text):
            shutil.rmtree(target / "pruned")
        monkeypatch.chdir(target)

    return make


@pytest.fixture(autouse=True)
def _little_work(monkeypatch):
    """Let every size stand for a small one: a page shows how to ask, and a test need not wait."""

    def default(function, **values):
        for name, value in values.items():
            monkeypatch.setitem(function.__kwdefaults__, name, value)

    def at_most(settings, **values):
        checked = settings.__post_init__

        def check(self):
            checked(self)
            for name, value in values.items():
                object.__setattr__(self, name, min(getattr(self, name), value))

        monkeypatch.setattr(settings, "__post_init__", check)

    at_most(yopo.symbolic.EvolutionSettings, population=4, iterations=2, parents=2)
    at_most(yopo.RecoverySettings, samples=16, written=16, window=32, epochs=1)
    for function in (
        yopo.writing.write_tokens,
        yopo.symbolic.collect_statistics,
        yopo.symbolic.PerplexityFitness.__init__,
        yopo.MetricPruner.__init__,
    ):
        default(function, sequences=4, length=32)
    default(yopo.evaluate, data_dir="questions")
    default(yopo.benchmark, prompt=4, new_tokens=2, repeats=1)
    monkeypatch.setattr(yopo.evidence, "SEQUENCES", 4)
    monkeypatch.setattr(yopo.divergence, "_SEQUENCES", 1)


@pytest.fixture(autouse=True)
def _layouts_as_they_were():
    """Forget the architectures that pages register."""
    before = [*LAYOUTS]
    yield
    LAYOUTS[:] = before


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """Let data sets of the hub be a few stories."""
    datasets = pytest.importorskip("datasets")

    def load_dataset(*_, **__):
        return datasets.Dataset.from_dict({"text": [write_text(seed, 2000) for seed in range(4)]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def pages_with(kind):
    """Return the pages that have blocks of a kind."""
    return [page for page, file in PAGES.items() if [*blocks_of(file.read_text("utf-8"), kind)]]


@pytest.mark.parametrize("page", [p for p in pages_with("python") if "tutorials" not in p])
# What the libraries beside yopo that pages show say of themselves:
@pytest.mark.filterwarnings("ignore::FutureWarning:torch.*")
@pytest.mark.filterwarnings("ignore::UserWarning:yopo.*")
def test_the_python_of_the_page_runs(page, reader, place):
    text = PAGES[page].read_text(encoding="utf-8")
    place(text)
    names, printed = reader(), ""
    for kind, code, line in blocks_of(text, "python", "text"):
        if kind == "text" and printed:
            assert code.strip() == printed.strip(), f"{page}:{line}"
        elif kind == "python":
            with redirect_stdout(io.StringIO()) as stream:
                exec(compile("\n" * line + code, str(PAGES[page]), "exec"), names)
            printed = stream.getvalue()


@pytest.mark.parametrize("page", pages_with("bash"))
@pytest.mark.filterwarnings("ignore::UserWarning:yopo.*")
def test_the_commands_of_the_page_run(page, place, capsys):
    text = PAGES[page].read_text(encoding="utf-8")
    place(text)
    for _, code, line in blocks_of(text, "bash"):
        for command in code.replace("\\\n", " ").splitlines():
            program, *arguments = shlex.split(command, comments=True) or ["cd"]
            if program in ELSEWHERE:
                for argument in arguments:
                    assert (
                        not argument.startswith(("examples/", "benchmarks/"))
                        or (ROOT / argument).is_file()
                    )
                continue
            assert program == "yopo", f"{page}:{line}"
            if "--output" in arguments and arguments[0] != "recover":  # lines may be alternatives
                shutil.rmtree(arguments[arguments.index("--output") + 1], ignore_errors=True)
            if "--tasks" in arguments and "--data-dir" not in arguments:
                arguments += ["--data-dir", "questions"]
            if arguments[0] == "bench":
                arguments += "--prompt 4 --new-tokens 2 --repeats 1".split()
            assert main(arguments) == 0, f"{page}:{line}: {command}\n{capsys.readouterr().err}"


def public_names():
    """Yield every public name with what it stands for, as the reference writes it."""
    for place, module in {
        "yopo": yopo,
        "yopo.criteria": yopo.criteria,
        "yopo.plots": yopo.plots,
        "yopo.symbolic": yopo.symbolic,
    }.items():
        names = getattr(module, "__all__", ("row_norm", "norm_product", "random_rows"))
        for name in names:
            thing = getattr(module, name)
            if not inspect.ismodule(thing) and name not in ("MetricPruner", "Target"):
                yield f"{place}.{name}", thing
    yield "yopo.MetricPruner", yopo.MetricPruner


def documented():
    """Yield every public name and method whose docstring has an example, with that docstring."""
    for name, thing in public_names():
        members = vars(thing).items() if inspect.isclass(thing) else ()
        for key, member in [("", thing), *members]:
            text = inspect.getdoc(getattr(member, "__func__", member)) or ""
            if ">>>" in text and not key.startswith("_"):
                yield f"{name}.{key}".removesuffix("."), text


class Checker(doctest.OutputChecker):
    """Compares with what an example says it prints, if it says so."""

    def check_output(self, want, got, optionflags):
        """Tell whether an example has printed what it says."""
        return not want or super().check_output(want, got, optionflags)


@pytest.mark.parametrize("name", dict(documented()))
def test_the_example_of_the_docstring_runs(name, reader, place):
    place("")
    shutil.move("pruned", "llama-pruned")
    names = {full.rpartition(".")[2]: thing for full, thing in public_names()}
    names |= reader() | {"yopo": yopo, "torch": torch}
    names["pruner"] = yopo.PolicyPruner.lean().fit(names["model"])
    test = doctest.DocTestParser().get_doctest(dict(documented())[name], names, name, None, None)
    told = io.StringIO()
    runner = doctest.DocTestRunner(Checker(), verbose=False)
    runner.run(test, out=told.write)
    assert not runner.failures, told.getvalue()


def test_every_public_name_has_one_place_in_the_reference():
    pages = (ROOT / "docs" / "reference").glob("*.md")
    told = re.findall(r"^::: (\S+)$", "\n".join(p.read_text("utf-8") for p in pages), re.MULTILINE)
    assert sorted(told) == sorted(dict(public_names()))


def test_the_page_of_the_command_line_is_up_to_date():
    """Else run `python benchmarks/command_line.py`."""
    assert command_line.PAGE.read_text(encoding="utf-8") == command_line.page()


def test_every_page_has_an_example():
    for page, file in PAGES.items():
        kinds = ("python", "bash") if "how-to" in page else ("python",)
        text = file.read_text(encoding="utf-8")
        if "how-to" in page or "\n::: " in text:
            assert [*blocks_of(text, *kinds)] or "\n--8<-- " in text, page


def texts_of(tree):
    """Yield the texts that code is made of, with … where a value is put in."""
    for node in ast.walk(tree):
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        yield "".join(str(getattr(part, "value", "")) if is_text(part) else "…" for part in parts)


def is_text(node):
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def test_every_error_that_a_page_explains_is_a_real_one():
    """The first cells of tables that are headed "error"; what differs from case to case is …"""
    sources = Path(yopo.__file__).parent.rglob("*.py")
    real = [*chain.from_iterable(texts_of(ast.parse(file.read_text("utf-8"))) for file in sources)]
    explained = 0
    for page, file in PAGES.items():
        for table in file.read_text(encoding="utf-8").split("\n| error |")[1:]:
            for quoted in re.findall(r'^\| "(.+?)" \|', table.partition("\n\n")[0], re.MULTILINE):
                parts = [part.strip(" .,") for part in quoted.split("…") if part.strip(" .,")]
                found = any(all(part in text for part in parts) for text in real)
                assert found, f"{page}: {quoted}"
                explained += 1
    assert explained > 10
