"""The benchmark of the paper's tables runs from end to end, on a small model and local files."""

import json
from unittest.mock import MagicMock

import pytest
from datasets import Dataset

import common
import llama2
import llama2_page
from yopo.embedded import model_path
from yopo.embedded.stories import HELD_OUT_SEED, write_text

METHODS = ("prunenet", "random rows")


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
        *("--device", "cpu", "--methods"),
    ]
    text = Dataset.from_dict({"text": [(tmp_path / "text.txt").read_text()]})
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: text)
    monkeypatch.setitem(llama2_page.REPORTED_RECOVERED, model_path().name, {0.5: 57.08})
    llama2.main([*arguments, "random rows"])
    recovery = ["--recover", "wikitext2-train"]
    llama2.main([*arguments, "random rows", *recovery])  # what is there is not measured again
    llama2.main([*arguments, "prunenet", *recovery])
    name = f"paper-{model_path().name}"
    rows = json.loads((tmp_path / "results" / f"{name}.json").read_text())["rows"]
    ways = [(method, way) for method in METHODS for way in (None, "wikitext2-train")]
    assert [(row["method"], row["recovered"]) for row in rows] == [("dense", None), *ways]
    dense, _, _, cut, recovered = [row["perplexity"] for row in rows]
    assert dense < recovered < cut
    page = (tmp_path / "results" / f"{name}.md").read_text()
    (line,) = [line for line in page.splitlines() if "prunenet + recovery on wiki" in line]
    assert "| 57.08 |" in line
    told = "Perplexity on text.txt in windows of 256 tokens. Weights in float32."
    assert f"hellaswag, all questions each. {told} Policies were trained at 0.5." in page
    assert "Recovery on wikitext2-train: rank 32, alpha 10.0" in page
    assert page.strip() in capsys.readouterr().out
    with pytest.raises(SystemExit, match="was measured with limit None"):
        llama2.main([*arguments, "prunenet", "--limit", "2"])


def test_a_policy_is_trained_at_the_first_of_the_ratios_whichever_are_done(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "yopo.PolicyPruner.prunenet", lambda ratio: seen.append(ratio) or MagicMock()
    )
    llama2.prune(None, "prunenet", 0.3, {}, train_at=0.2)
    assert seen == [0.2]
