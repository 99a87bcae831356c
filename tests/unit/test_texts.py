import json
import sys

import pytest

import yopo
from yopo.evaluation.texts import NAMED

InvalidArgumentError = yopo.InvalidArgumentError


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "one\ntwo", "one\ntwo"),
        ("a.json", json.dumps(["one", "two"]), "one\n\ntwo"),
        ("a.json", json.dumps([{"text": "one"}, {"text": "two", "n": 3}]), "one\n\ntwo"),
        ("a.jsonl", '{"text": "one"}\n\n{"text": "two"}\n', "one\n\ntwo"),
        ("a.jsonl", '"one"\n"two"\n', "one\n\ntwo"),
    ],
)
def test_text_and_json_files_are_read(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content)
    assert yopo.read_text(tmp_path / name) == expected
    assert yopo.read_text(str(tmp_path / name)) == expected


def test_the_field_of_objects_can_be_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"story": "one"}\n')
    assert yopo.read_text(tmp_path / "a.jsonl", field="story") == "one"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", " \n", "no text"),
        ("a.json", "{", "cannot be read as .json"),
        ("a.json", '{"text": "one"}', "cannot be read as .json"),
        ("a.json", "[1]", "cannot be read as .json"),
        ("a.jsonl", '{"words": "one"}', "'text'"),
        ("a.txt", b"\xff\xfe\x00\xd8", "cannot be read as .txt"),
    ],
)
def test_damaged_files_are_refused(tmp_path, name, content, message):
    raw = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(InvalidArgumentError, match=message):
        yopo.read_text(tmp_path / name)


def test_a_name_that_is_no_file_is_told_which_names_there_are():
    with pytest.raises(InvalidArgumentError, match="wikitext2, ptb, c4, alpaca"):
        yopo.read_text("wikitext")


def test_a_text_in_the_place_of_a_path_is_told_from_one():
    with pytest.raises(InvalidArgumentError, match="is no file") as caught:
        yopo.read_text("Tom had a red ball. " * 300)
    assert len(str(caught.value)) < 300


class Rows:
    """Stand in for what `datasets.load_dataset` returns."""

    def __init__(self, asked):
        self.asked = asked

    def __getitem__(self, field):
        return [f"{field} {number}" for number in range(2)]

    def train_test_split(self, test_size, seed):
        self.asked.append((test_size, seed))
        return {"test": self}


@pytest.mark.parametrize(
    ("name", "first", "text"),
    [
        ("wikitext2", "Salesforce/wikitext", "text 0\n\ntext 1"),
        ("ptb", "ptb-text-only/ptb_text_only", "sentence 0 sentence 1"),
        ("c4", "allenai/c4", "text 0 text 1"),
        ("alpaca", "tatsu-lab/alpaca", "text 0\n\ntext 1"),
    ],
)
def test_named_texts_are_put_together_as_the_papers_do(monkeypatch, name, first, text):
    asked = []

    def load_dataset(path, *_, **__):
        asked.append(path)
        return Rows(asked)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert yopo.read_text(name) == text
    assert asked[0] == first


def test_without_a_network_the_error_names_the_way_out(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for name in NAMED:
        with pytest.raises(OSError, match="path of a file"):
            yopo.read_text(name)


def test_without_datasets_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(yopo.YopoError, match=r"yopo-prune\[eval\]"):
        yopo.read_text("wikitext2")
