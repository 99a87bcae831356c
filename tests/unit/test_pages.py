from html.parser import HTMLParser

from yopo.pages import Section, to_html, to_markdown

EVIL = '<script>alert("1")</script> & | `x`'


class Reader(HTMLParser):
    """Reads a page: its tags, and the text outside of the style."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.texts = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.texts.append(data)


def read(page):
    reader = Reader()
    reader.feed(page)
    return reader


def test_a_page_has_its_sections_in_order():
    rows = [["a", "b"], ["1", "2"]]
    sections = [Section("One", "text", code="x = 1", rows=rows), Section("Two")]
    assert to_markdown("Title", sections) == (
        "# Title\n\n## One\n\ntext\n\n```\nx = 1\n```\n\n"
        "| a | b |\n|--:|--:|\n| 1 | 2 |\n\n## Two\n"
    )
    page = read(to_html("Title", sections))
    shown = [text for text in map(str.strip, page.texts) if text and not text.startswith("body")]
    assert shown == ["Title", "Title", "One", "text", "x = 1", "a", "b", "1", "2", "Two"]


def test_whatever_comes_in_is_text_and_no_html():
    section = Section(EVIL, EVIL, code=EVIL, rows=[[EVIL], [EVIL]], picture=b"<svg/>")
    page = read(to_html(EVIL, [section]))
    assert "script" not in page.tags
    assert page.texts.count(EVIL) == 7  # title, h1, h2, p, pre, th, td
    assert ("alt", EVIL) in page.attributes
    lines = to_markdown(EVIL, [section]).splitlines()
    in_code = lines.index("```") + 1
    assert not any("<script" in line for n, line in enumerate(lines) if n != in_code)
    assert lines[-1].replace("\\|", "").count("|") == 2


def test_a_picture_is_inside_the_page_as_an_image():
    page = to_html("t", [Section("Plot", picture=b"<svg></svg>")])
    assert 'src="data:image/svg+xml;base64,PHN2Zz48L3N2Zz4="' in page
    assert "http" not in page


def test_code_cannot_close_its_fence():
    text = to_markdown("t", [Section("s", code="```\nx\n````")])
    assert "\n`````\n```\nx\n````\n`````\n" in text
