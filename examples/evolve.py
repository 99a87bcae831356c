"""Evolve a formula of FFN rows with no data, as short as an example may be, and apply it.

A formula is judged by how far the pruned model's predictions are from the dense one's, on text that
the dense model writes itself. Run again with the same folder, the search goes on where it ended.
"""

import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import yopo
from yopo import symbolic
from yopo.embedded import model_path
from yopo.embedded.stories import HELD_OUT_SEED, write_text

source = model_path()  # or another folder, or a name on the hub
folder = Path(tempfile.mkdtemp(), "search")  # name one that lasts, to go on from it later
tokenizer = AutoTokenizer.from_pretrained(source)
text = tokenizer(write_text(HELD_OUT_SEED, 8_000), return_tensors="pt").input_ids[0, :1024]
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
print(f"dense: perplexity {yopo.perplexity(model, text):.3f}")

found = symbolic.evolve(
    symbolic.DivergenceFitness(model, 0.3),
    settings=symbolic.EvolutionSettings(population=6, iterations=6),  # published: 50 and 300
    terminals=symbolic.ROW_TERMINALS,
    folder=folder,
)
print(found.family_tree())
at_random = min(found.random, key=lambda candidate: candidate.fitness)
print(f"best:      {found.best.fitness:.3f} nats, {found.expression.formula()}")
print(f"at random: {at_random.fitness:.3f} nats, {at_random.expression.formula()}")

pruner = yopo.MetricPruner(found.expression)
pruner.prune(model, 0.3, structured=True)
print(f"pruned by it at 0.3: perplexity {yopo.perplexity(model, text):.3f}")
