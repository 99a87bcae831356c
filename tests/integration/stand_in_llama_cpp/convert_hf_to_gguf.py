"""Write a LLaMA as GGUF, with llama.cpp's own package for that format but not its converter.

What it writes is what that converter writes, tensor for tensor; there is no vocabulary in it.
"""

import argparse
import json
from pathlib import Path

import gguf
from safetensors.torch import load_file

parser = argparse.ArgumentParser()
parser.add_argument("model", type=Path)
parser.add_argument("--outfile", required=True)
parser.add_argument("--outtype", choices=["f32"])
arguments = parser.parse_args()

config = json.loads((arguments.model / "config.json").read_text())
layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
writer = gguf.GGUFWriter(arguments.outfile, "llama")
writer.add_block_count(layers)
writer.add_context_length(config["max_position_embeddings"])
writer.add_embedding_length(config["hidden_size"])
writer.add_feed_forward_length(config["intermediate_size"])
writer.add_head_count(heads)
writer.add_head_count_kv(config["num_key_value_heads"])
writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
writer.add_vocab_size(config["vocab_size"])

names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
for name, tensor in load_file(arguments.model / "model.safetensors").items():
    array = tensor.float().numpy()
    if name.endswith(("q_proj.weight", "k_proj.weight")):  # halves of a rotation, side by side
        blocks = heads if "q_proj" in name else config["num_key_value_heads"]
        array = array.reshape(blocks, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
    writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), array)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
