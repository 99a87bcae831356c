"""Prune a model and convert it to GGUF with the converter of llama.cpp.

python examples/convert_to_gguf.py LLAMA_CPP SOURCE

LLAMA_CPP is a checkout of llama.cpp, SOURCE a model whose tokenizer its converter knows. Without
them the model that travels with yopo is pruned and saved, and what the converter reads is checked.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import yopo
from yopo.embedded import model_path

llama_cpp = sys.argv[1] if len(sys.argv) > 1 else None
source = sys.argv[2] if len(sys.argv) > 2 else str(model_path())

model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
# Blocks of 32 numbers share a scale in Q8_0 and Q4_0, blocks of 256 in the K-quants.
yopo.PolicyPruner.lean(multiple_of=256).fit(model).prune(model, 0.3)

with tempfile.TemporaryDirectory() as folder:
    pruned, target = Path(folder, "pruned"), Path(folder, "pruned.gguf")
    model.save_pretrained(pruned)
    AutoTokenizer.from_pretrained(source).save_pretrained(pruned)
    print("files:", ", ".join(sorted(file.name for file in pruned.iterdir())))

    widths = set()
    for shard in pruned.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        widths |= {shape[0] for name, shape in shapes.items() if name.endswith("up_proj.weight")}
        widths |= {shape[1] for name, shape in shapes.items() if name.endswith("down_proj.weight")}
    told = yopo.find_ffns(model)[0].width
    print(f"`{told}` in the config: {model.config.intermediate_size}, in the tensors: {widths}")

    command = ["convert_hf_to_gguf.py", str(pruned), "--outfile", str(target), "--outtype", "f32"]
    if llama_cpp is None:
        print("Not converted, as no llama.cpp was named. The command: python", *command)
        sys.exit()
    subprocess.run([sys.executable, Path(llama_cpp, command[0]), *command[1:]], check=True)

    # transformers reads GGUF files too, with `pip install gguf`.
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=target.name).eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        furthest = float((loaded(ids).logits - model(ids).logits).abs().max())
    print(f"GGUF of {target.stat().st_size:,} bytes: {loaded.config.intermediate_size} rows,")
    print(f"logits differ by at most {furthest:.1e}")
