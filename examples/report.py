"""Prune a checkpoint on disk, and report what became of its layers, its perplexity and its size."""

import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import yopo
from yopo.embedded import model_path
from yopo.embedded.stories import HELD_OUT_SEED, write_text

source = model_path()  # or another folder
text = AutoTokenizer.from_pretrained(source)(write_text(HELD_OUT_SEED, 20_000), verbose=False)

with tempfile.TemporaryDirectory() as folder:
    pruned = Path(folder, "pruned")
    yopo.prune_checkpoint(source, pruned, 0.3)
    report = yopo.PruningReport.load(pruned).with_spectra(source)

    models = [AutoModelForCausalLM.from_pretrained(place) for place in (source, pruned)]
    dense, smaller = (yopo.perplexity(model, torch.tensor(text.input_ids)) for model in models)
    report = report.with_perplexity("stories that no model has seen", dense=dense, pruned=smaller)

    report.save(Path(folder, "report"))  # report.html, with plots
    report.write_card(pruned)  # README.md, with the perplexities
    print(sorted(file.name for file in Path(folder, "report").iterdir()))

print(report)
