"""Make half of the weights zero by symbolic metrics, with no data, and compare perplexities.

Gradients and inputs are collected on text that the model writes itself. They are collected once
for all metrics, on the dense model; without `statistics` each would collect its own.
"""

import copy

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import yopo
from yopo.embedded import model_path
from yopo.embedded.stories import HELD_OUT_SEED, write_text

source = model_path()  # or another folder, or a name on the hub
tokenizer = AutoTokenizer.from_pretrained(source)
text = tokenizer(write_text(HELD_OUT_SEED, 8_000), return_tensors="pt").input_ids[0, :1024]
dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
print(f"{'dense':>50}: perplexity {yopo.perplexity(dense, text):.3f}")

statistics = yopo.symbolic.collect_statistics(dense, sequences=16, length=64)
formula = yopo.symbolic.Expression.parse("mul(W, sqrt(mul(X, G)))")
for metric in ("magnitude", "wanda", "gblm", "pruner-zero", formula):
    for pattern in ("unstructured", "2:4"):
        pruner = yopo.MetricPruner(metric, statistics=statistics)
        model = pruner.prune(copy.deepcopy(dense), 0.5, pattern=pattern)
        name = metric if isinstance(metric, str) else metric.formula()
        print(f"{name + ', ' + pattern:>50}: perplexity {yopo.perplexity(model, text):.3f}")

# SparseGPT changes the weights that stay, too, so it looks at inputs layer by layer.
pruner = yopo.MetricPruner("sparsegpt", sequences=16, length=64)
model = pruner.prune(copy.deepcopy(dense), pattern="2:4")
shares = yopo.symbolic.sparsity_of(model).values()
print(f"{'sparsegpt, 2:4':>50}: perplexity {yopo.perplexity(model, text):.3f}", end=", ")
print(f"{min(shares):.0%} zeros in each of {len(shares)} matrices")
