"""The benchmark of the paper's tables runs from end to end, on a small model and local files."""

import json

import common
import llama2
from yopo.embedded import model_path
from yopo.embedded.stories import HELD_OUT_SEED, write_text


def test_the_papers_tables_are_measured_line_by_line_and_gone_on_with(
    tmp_path, monkeypatch, capsys
):
    for module in (common, llama2):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    questions = [{"context": "Tom had a", "choices": [" ball", " ran"], "label": 0}] * 4
    (tmp_path / "hellaswag.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (tmp_path / "text.txt").write_text(write_text(HELD_OUT_SEED, 12_000))
    arguments = [
        *(str(model_path()), "--ratios", "0.5", "--tasks", "hellaswag", "--dtype", "float32"),
        *("--data-dir", str(tmp_path), "--text", str(tmp_path / "text.txt")),
        *("--recover", str(tmp_path / "text.txt"), "--device", "cpu", "--methods"),
    ]
    llama2.main([*arguments, "random rows"])
    llama2.main([*arguments, "prunenet"])  # the lines that are there are not measured again
    name = f"paper-{model_path().name}"
    rows = json.loads((tmp_path / "results" / f"{name}.json").read_text())["rows"]
    found = [(row["method"], row["recovered"]) for row in rows]
    lines = [("random rows", False), ("random rows", True), ("prunenet", False), ("prunenet", True)]
    assert found == [("dense", False), *lines]
    dense, cut, recovered, *_ = [row["perplexity"] for row in rows]
    assert dense < recovered < cut
    page = (tmp_path / "results" / f"{name}.md").read_text()
    assert "prunenet + recovery" in page
    assert page.strip() in capsys.readouterr().out
