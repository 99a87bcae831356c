"""Measure what a cut cost: perplexity on a text, and accuracy on questions in local files."""

import json
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer

import yopo
from yopo.embedded import model_path
from yopo.embedded.stories import HELD_OUT_SEED, write_text

tokenizer = AutoTokenizer.from_pretrained(model_path())
dense, pruned = (yopo.load(model_path(), dtype=torch.float32) for _ in range(2))
yopo.PolicyPruner(seed=0).fit(pruned).prune(pruned, ratio=0.5)

text = write_text(HELD_OUT_SEED, 40_000)
for name, model in (("dense", dense), ("pruned", pruned)):
    print(f"{name}: perplexity {yopo.perplexity(model, text, tokenizer=tokenizer):.3f}")

# Which of two words ends a sentence of the text? The other one is the end of the next sentence.
sentences = [line.rstrip(".") for line in text.split(". ") if len(line.split()) > 3][:200]
ends = [sentence.rpartition(" ")[2] for sentence in sentences]
questions = [
    {"context": sentence.rpartition(" ")[0], "choices": [f" {end}", f" {other}"], "label": 0}
    for sentence, end, other in zip(sentences, ends, [*ends[1:], ends[0]], strict=True)
    if end != other
]
with tempfile.TemporaryDirectory() as folder:
    (Path(folder) / "hellaswag.jsonl").write_text("\n".join(map(json.dumps, questions)))
    report = yopo.evaluate(pruned, tokenizer, tasks="hellaswag", data_dir=folder, against=dense)
print(f"\n{report}")
