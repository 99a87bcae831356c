"""Make a notebook of each tutorial and of each example that takes no arguments.

    python examples/notebooks/make.py

A tutorial's text and code become cells one by one; what it says is printed is left out, for the
notebook prints it. An example's docstring becomes text, each paragraph of its code a cell.
"""

import ast
import re
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)\n```\n", re.MULTILINE | re.DOTALL)
"""A block of a page: its language, what stands behind that, and its text."""
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


def sources():
    """Yield the name and the file of everything that becomes a notebook."""
    for page in sorted((ROOT / "docs" / "tutorials").glob("*.md")):
        if page.stem != "index":
            yield page.stem.replace("-", "_"), page
    for script in sorted((ROOT / "examples").glob("*.py")):
        if "sys.argv" not in script.read_text(encoding="utf-8"):
            yield script.stem, script


def cells_of(source):
    """Return the cells of a page or of a script, as pairs of kind and text."""
    text = source.read_text(encoding="utf-8")
    return _cells_of_page(source, text) if source.suffix == ".md" else _cells_of_script(text)


def notebook_of(source):
    """Return the notebook of a page or of a script, as text."""
    made = {"markdown": new_markdown_cell, "code": new_code_cell}
    cells = [
        made[kind](text, id=f"cell-{number}")
        for number, (kind, text) in enumerate(cells_of(source))
    ]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook = new_notebook(cells=cells, metadata={"kernelspec": kernel})
    return nbformat.writes(notebook) + "\n"


def _cells_of_page(page, text):
    def from_here(link):
        target = (page.parent / link[1]).resolve().relative_to(ROOT)
        return f"](../../{target}"

    cells, prose, start = [], "", 0
    for block in [*BLOCK.finditer(text), None]:
        prose += text[start : block.start() if block else len(text)]
        if block and block[1] == "bash":
            prose += block[0]
        if prose.strip() and (block is None or block[1] == "python"):
            cells.append(("markdown", LINK.sub(from_here, prose.strip())))
            prose = ""
        if block:
            start = block.end()
            if block[1] == "python":
                cells.append(("code", block[3]))
    return cells


def _cells_of_script(text):
    told, *rest = ast.parse(text).body
    lines = text.splitlines()
    cells = [("markdown", ast.literal_eval(told.value))]
    start = told.end_lineno
    for node, following in zip(rest, [*rest[1:], None], strict=True):
        end = node.end_lineno
        if all(isinstance(one, ast.Import | ast.ImportFrom) for one in (node, following)):
            continue
        if following is None or lines[end : following.lineno - 1][:1] == [""]:
            cells.append(("code", "\n".join(lines[start:end]).strip("\n")))
            start = end
    return cells


if __name__ == "__main__":
    for name, source in sources():
        (HERE / f"{name}.ipynb").write_text(notebook_of(source), encoding="utf-8")
