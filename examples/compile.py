"""Prune a model and compile its layers: the same logits, from one compiled layer for all.

All layers of a pruned model have one width, so what is compiled for the first serves the others.
"""

import sys

import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

import yopo
from yopo.embedded import model_path

source = sys.argv[1] if len(sys.argv) > 1 else str(model_path())
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
yopo.PolicyPruner.lean().fit(model).prune(model, 0.3)

ids = torch.arange(3, 67)[None]
with torch.no_grad():
    expected = model(ids, use_cache=False).logits

counters.clear()
layers = model.get_decoder().layers
for layer in layers:
    layer.compile(fullgraph=True)
try:
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
except RuntimeError as error:
    if "Compiler" not in str(error) and "CppCompileError" not in str(error):
        raise
    print(
        "Skipped: torch.compile needs a C++ compiler that works. Install g++, or name one in CXX."
    )
    sys.exit()

torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
graphs = counters["stats"]["unique_graphs"]
print(f"width {model.config.intermediate_size}, {len(layers)} layers, {graphs} compiled")
print(f"logits differ by at most {float((logits - expected).abs().max()):.1e}")
