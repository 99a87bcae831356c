"""Prune a model, recover it, quantise its weights to int8 and int4 with torchao, let it write.

The groups of 32 numbers that share a scale have to divide the width, so the width is rounded to a
multiple of 32. What happens with a width that they do not divide comes last.
"""

import copy
import tempfile
from pathlib import Path

import torch
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_
from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

import yopo
from yopo.embedded import model_path
from yopo.embedded.stories import HELD_OUT_SEED, write_text

GROUP = 32
# The settings of torch that torchao would change hold for the whole process.
INT8 = Int8WeightOnlyConfig(set_inductor_config=False)
# The one int4 format of torchao 0.18 that a CPU can run packed.
INT4 = PrototypeInt4WeightOnlyConfig(group_size=GROUP, set_inductor_config=False)

source = model_path()  # or another folder, or a name on the hub
tokenizer = AutoTokenizer.from_pretrained(source)
text = tokenizer(write_text(HELD_OUT_SEED, 8_000), return_tensors="pt").input_ids[0, :2048]
prompt = tokenizer("Once there was", return_tensors="pt", return_token_type_ids=False)


def weight_bytes(model):
    """Return the bytes of all weights; packed ones consist of several tensors."""
    total = 0
    for weight in model.parameters():
        parts = getattr(weight, "__tensor_flatten__", lambda: ([], None))()[0]
        total += sum(getattr(weight, part).nbytes for part in parts) or weight.nbytes
    return total


def left_alone(model):
    """Return the names of the matrices in linear layers that are plain tensors still."""
    found = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and type(module.weight.data) is torch.Tensor
    }
    return " and ".join(sorted(found))


def show(name, model):
    """Print the perplexity, the size and what the model writes."""
    ids = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0]
    surprise, size = yopo.perplexity(model, text), weight_bytes(model)
    written = tokenizer.decode(ids, skip_special_tokens=True)
    print(f"{name:>15}: perplexity {surprise:.3f}, {size:>9,} bytes, {written!r}")


dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
show("dense, float32", dense)
model = copy.deepcopy(dense)
yopo.PolicyPruner.lean(multiple_of=GROUP).fit(model).prune(model, 0.3)
show("pruned", model)
# What pruning lost is won back before the weights are packed; this is a short training.
few = yopo.RecoverySettings(written=128, window=128)
yopo.recover(model, teacher=dense, settings=few)
model.to(torch.bfloat16)
show("recovered, bf16", model)

with tempfile.TemporaryDirectory() as folder:
    pruned, saved = Path(folder, "pruned"), Path(folder, "int8")
    model.save_pretrained(pruned)
    for name, config in {"int8": INT8, "int4": INT4}.items():
        quantised = AutoModelForCausalLM.from_pretrained(
            pruned, dtype=torch.bfloat16, quantization_config=TorchAoConfig(config)
        )
        kind = type(quantised.model.layers[0].mlp.down_proj.weight).__name__
        show(f"recovered, {name}", quantised)
        print(f"{'':>15}  width {quantised.config.intermediate_size}, weights of type {kind}")
        if name == "int8":
            quantised.save_pretrained(saved)
            loaded = AutoModelForCausalLM.from_pretrained(saved)
            with torch.no_grad():
                equal = torch.equal(loaded(**prompt).logits, quantised(**prompt).logits)
            print(f"{'':>15}  saved and loaded: equal logits: {equal}")

print()
for width_of in (16, 1):  # what "auto" gives for a model as small as this, and the published width
    odd = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    plan = yopo.plan_by_criterion(odd, 0.3, criterion=yopo.criteria.row_norm, multiple_of=width_of)
    for name, config in {
        "IntxWeightOnlyConfig": IntxWeightOnlyConfig(torch.int4, PerGroup(GROUP)),
        "int4 as above": INT4,
    }.items():
        cut = copy.deepcopy(odd)
        yopo.apply_plan(cut, plan)
        try:
            quantize_(cut.model, config)
            told = f"no error, and {left_alone(cut.model)} are not quantised"
        except (AssertionError, RuntimeError) as error:
            told = f"{type(error).__name__}: {error}"
        print(f"width {cut.config.intermediate_size}, groups of {GROUP}, {name}: {told}")
