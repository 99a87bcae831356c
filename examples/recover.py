"""Win back part of what pruning lost, with the dense model as the teacher and no data."""

import tempfile

import torch
from transformers import AutoTokenizer

import yopo
from yopo.embedded import model_path
from yopo.embedded.stories import HELD_OUT_SEED, write_text

dense, model = (yopo.load(model_path(), dtype=torch.float32) for _ in range(2))
tokenizer = AutoTokenizer.from_pretrained(model_path())
text = write_text(HELD_OUT_SEED, 20_000)


def tell(name, measured):
    """Print the perplexity of a model on text that neither it nor its teacher has seen."""
    print(f"{name}: perplexity {yopo.perplexity(measured, text, tokenizer=tokenizer):.3f}")


tell("dense", dense)
yopo.PolicyPruner(seed=0).fit(model).prune(model, ratio=0.6)
tell("pruned", model)

# So little text that this takes seconds; the defaults write four times as many, longer windows.
settings = yopo.RecoverySettings(written=128, window=64)
with tempfile.TemporaryDirectory() as folder:
    yopo.recover(model, teacher=dense, settings=settings, output=f"{folder}/recovery")
    tell("recovered", model)

    model.save_pretrained(f"{folder}/model")
    loaded = yopo.load(f"{folder}/model", dtype=torch.float32)
tell("saved and loaded", loaded)
