"""Prune a model without data, save it, and load it with transformers alone."""

import tempfile

import torch
from transformers import AutoModelForCausalLM

import yopo
from yopo.embedded import model_path

source = model_path()  # or another folder, or a name on the hub
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)

pruner = yopo.PolicyPruner(ratio=0.3, seed=0).fit(model)
print(pruner.plan(model))

pruner.prune(model)
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)

ids = torch.arange(3, 40)[None]
with torch.no_grad():
    print("equal logits:", torch.equal(loaded(ids).logits, model.eval()(ids).logits))
