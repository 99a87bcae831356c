"""A report as a page: sections of text, table and picture, in Markdown or in HTML."""

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from yopo.report import format_table

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; overflow-wrap: anywhere; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.7rem; border-bottom: 1px solid #ddd; text-align: right; }
th { border-bottom-color: #888; }
td:first-child, th:first-child { text-align: left; }
img { max-width: 100%; height: auto; margin: 1rem 0; }
pre { background: #f4f4f4; padding: 0.7rem; overflow-x: auto; }
"""


@dataclass(frozen=True, slots=True)
class Section:
    """Hold a part of a page; what is empty is not shown.

    Attributes:
        title: Its heading.
        text: A paragraph.
        code: Lines of code or of a command.
        rows: A table, the first row of which is the header.
        picture: An SVG drawing, for HTML alone.
    """

    title: str
    text: str = ""
    code: str = ""
    rows: Sequence[Sequence[str]] = ()
    picture: bytes = b""


def to_markdown(title: str, sections: Iterable[Section]) -> str:
    """Return a page in Markdown, a picture's place left out."""
    parts = [f"# {_plain(title)}"]
    for section in sections:
        parts.append(f"## {_plain(section.title)}")
        parts += [_plain(section.text)] if section.text else []
        parts += [_fenced(section.code)] if section.code else []
        if section.rows:
            parts.append(format_table([[_cell(text) for text in row] for row in section.rows]))
    return "\n\n".join(parts) + "\n"


def to_html(title: str, sections: Iterable[Section]) -> str:
    """Return a page of HTML that refers to nothing outside itself."""
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>"
    ]
    for section in sections:
        parts.append(f"<h2>{escape(section.title)}</h2>")
        parts += [f"<p>{escape(section.text)}</p>"] if section.text else []
        parts += [f"<pre>{escape(section.code)}</pre>"] if section.code else []
        parts += [_table(section.rows)] if section.rows else []
        if section.picture:
            data = base64.b64encode(section.picture).decode()
            # As an image, not inline: the names inside two drawings would collide.
            parts.append(
                f'<img alt="{escape(section.title)}" src="data:image/svg+xml;base64,{data}">'
            )
    return "\n".join([*parts, "</body>\n</html>\n"])


def _fenced(code: str) -> str:
    """Return code in a fence that nothing inside it can close."""
    fence = "```"
    while fence in code:
        fence += "`"
    return f"{fence}\n{code}\n{fence}"


def _cell(text: str) -> str:
    """Return text that stays in its cell of a Markdown table."""
    return _plain(" ".join(text.split())).replace("|", "\\|")


def _plain(text: str) -> str:
    """Return text that is no HTML in Markdown."""
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = []
    for number, row in enumerate(rows):
        tag = "td" if number else "th"
        lines.append("<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row) + "</tr>")
    return '<div class="table"><table>\n' + "\n".join(lines) + "\n</table></div>"
