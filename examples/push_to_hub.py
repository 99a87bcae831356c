"""Prune a model, publish it, and load it from there: `python examples/push_to_hub.py USER/NAME`.

It needs a token that may write, as `hf auth login` stores one. Without a name nothing leaves the
machine, and the files that would are listed.
"""

import sys
import tempfile
from pathlib import Path

import torch
from huggingface_hub import create_repo, upload_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

import yopo
from yopo.embedded import model_path

name = sys.argv[1] if len(sys.argv) > 1 else None
source = sys.argv[2] if len(sys.argv) > 2 else str(model_path())

model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(source)
pruner = yopo.PolicyPruner.lean().fit(model)
pruner.prune(model, 0.3)

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    pruner.report.write_card(folder)
    if name is None:
        for file in sorted(Path(folder).iterdir()):
            print(f"{file.stat().st_size:>10,} bytes  {file.name}")
        print("Nothing was uploaded. Name a place: python examples/push_to_hub.py USER/NAME")
        sys.exit()
    create_repo(name, exist_ok=True)
    upload_folder(repo_id=name, folder_path=folder)

loaded = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
ids = torch.arange(3, 40)[None]
with torch.no_grad():
    equal = torch.equal(loaded(ids).logits, model.eval()(ids).logits)
print(f"{name}: {loaded.config.intermediate_size} rows, equal logits: {equal}")
print("as many tokens:", len(AutoTokenizer.from_pretrained(name)) == len(tokenizer))
