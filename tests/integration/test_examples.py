"""Examples and tutorials run, as scripts and as notebooks, and print what they say."""

import ast
import io
import re
import runpy
import shutil
from contextlib import redirect_stdout, suppress
from pathlib import Path

import nbformat
import pytest
from make import BLOCK, cells_of, notebook_of, sources

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ROOT / "examples" / "notebooks"
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SOURCES = dict(sources())
TUTORIALS = {name: file for name, file in SOURCES.items() if file.suffix == ".md"}
NUMBER = re.compile(r"(?<![\w.])\d+\.\d+\b")

TOLD = {
    "compile": ["width 272, 4 layers, 1 compiled"],
    "convert_to_gguf": ["`intermediate_size` in the config: 256, in the tensors: {256}"],
    "push_to_hub": ["bytes  model.safetensors", "Nothing was uploaded."],
    "quantise": [
        "width 256, weights of type Int8Tensor",
        "width 256, weights of type Int4OpaqueTensor",
        "saved and loaded: equal logits: True",
        "width 272, groups of 32, int4 as above: no error, and down_proj are not quantised",
        "width 268, groups of 32, int4 as above: RuntimeError: ",
        "AssertionError: Expecting input size at 1 dimension: 268 to be divisible by block_size",
    ],
    "sparsify": ["50% zeros in each of 28 matrices"],
}
"""What an example has to print, where that says more than that it came to its end."""

# What the libraries beside yopo that examples show say of themselves:
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:torch.*")


def run_script(path):
    with suppress(SystemExit):
        runpy.run_path(str(path), run_name="__main__")


def run_cells(name):
    """Run the cells of a notebook in one namespace."""
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    names = {"__name__": "__main__"}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, cell.id, "exec"), names)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_runs(path, monkeypatch, capsys):
    """As a notebook, where there is one: its code is that of the script."""
    if path.stem == "compile" and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    monkeypatch.setattr("sys.argv", [str(path)])
    if path.stem in SOURCES:
        run_cells(path.stem)
    else:
        run_script(path)
    told = capsys.readouterr().out
    assert told
    for line in TOLD.get(path.stem, []):
        assert line in told


def test_notebooks_are_made_of_what_they_show():
    """Else run `python examples/notebooks/make.py`."""
    assert {file.stem for file in NOTEBOOKS.glob("*.ipynb")} == SOURCES.keys()
    for name, source in SOURCES.items():
        made = notebook_of(source)
        assert (NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8") == made, name
        nbformat.validate(nbformat.reads(made, as_version=4))


def test_the_code_of_a_notebook_is_that_of_the_script():
    for name in SOURCES.keys() - TUTORIALS.keys():
        _, *statements = ast.parse(SOURCES[name].read_text(encoding="utf-8")).body
        code = "\n".join(text for kind, text in cells_of(SOURCES[name]) if kind == "code")
        found = ast.parse(code).body
        assert [*map(ast.dump, found)] == [*map(ast.dump, statements)], name


@pytest.mark.parametrize("name", TUTORIALS)
def test_the_tutorial_prints_what_it_says(name, tmp_path, monkeypatch):
    """But where it says "for example"; processors round differently, so figures may be 3 % off."""
    monkeypatch.chdir(tmp_path)
    names, printed = {"__name__": "__main__"}, ""
    for kind, told, text in BLOCK.findall(TUTORIALS[name].read_text(encoding="utf-8")):
        if kind == "python":
            with redirect_stdout(io.StringIO()) as stream:
                exec(compile(text, name, "exec"), names)
            printed = stream.getvalue().strip()
        elif kind != "text":
            continue
        elif "for example" in told:
            assert len(printed.splitlines()) == len(text.splitlines())
        else:
            assert NUMBER.sub("#", printed) == NUMBER.sub("#", text)
            figures = [[*map(float, NUMBER.findall(one))] for one in (printed, text)]
            assert figures[0] == pytest.approx(figures[1], rel=0.03)
