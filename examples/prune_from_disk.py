"""Prune a checkpoint on disk without loading it, and load the result with transformers alone."""

import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import yopo
from yopo.embedded import model_path

source = model_path()  # or another folder

with tempfile.TemporaryDirectory() as folder:
    dense, target = Path(folder, "dense"), Path(folder, "pruned")
    AutoModelForCausalLM.from_pretrained(source, dtype="auto").save_pretrained(dense)

    plan = yopo.prune_checkpoint(dense, target, 0.3)
    print(plan)

    for name in (dense, target):
        size = sum(file.stat().st_size for file in name.glob("*.safetensors"))
        print(f"{name.name}: {size:,} bytes of weights")

    loaded = AutoModelForCausalLM.from_pretrained(target, dtype="auto").eval()

with torch.no_grad():
    logits = loaded(torch.arange(3, 40)[None]).logits
print(f"{loaded.config.intermediate_size} rows, finite: {bool(logits.isfinite().all())}")
