import pytest

from yopo import demo
from yopo.cli import main


def test_the_demo_prints_a_table_draws_it_and_proves_the_reload(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "RATIOS", (0.3,))
    monkeypatch.setattr(demo, "_SEEDS", (0,))
    assert main(["demo", "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    for word in ("random rows", "row norm", "PruneNet as published", "before:", "after, ratio 0.3"):
        assert word in printed
    assert "logits are equal" in printed
    assert (tmp_path / "out" / "perplexity.png").stat().st_size > 10_000
    row = (tmp_path / "out" / "table.md").read_text(encoding="utf-8").splitlines()[-1]
    *_, random, norm, published, ours = (cell.strip() for cell in row.strip("| ").split("|"))
    assert float(ours) < min(float(random), float(norm), float(published))


def test_a_text_that_cannot_be_read_is_an_error(tmp_path, capsys):
    missing = tmp_path / "missing.txt"
    assert main(["demo", "--text", str(missing), "--output", str(tmp_path / "out")]) == 2
    assert "`text` cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "Too short."])
def test_a_text_shorter_than_a_window_is_an_error(tmp_path, capsys, content):
    text = tmp_path / "text.txt"
    text.write_text(content, encoding="utf-8")
    assert main(["demo", "--text", str(text), "--output", str(tmp_path / "out")]) == 2
    assert "window" in capsys.readouterr().err
