"""Fit one policy with the paper's reward, save it, and prune at several ratios and models."""

import copy
import tempfile

import torch
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

import yopo
from yopo.embedded import model_path

llama = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
pruner = yopo.PolicyPruner(ratio=0.3, reward="spectral", episodes=10, restore=False).fit(llama)
for episode in pruner.history[::3]:
    print(f"episode {episode.number}: mean KS {sum(episode.ks) / len(episode.ks):.4f}")

with tempfile.TemporaryDirectory() as folder:
    pruner.save_policy(folder)
    policy = yopo.PolicyPruner.from_policy(folder)

for ratio in (0.1, 0.3, 0.5):
    print(policy.prune(copy.deepcopy(llama), ratio).config.intermediate_size, "rows at", ratio)

opt = OPTForCausalLM(OPTConfig(hidden_size=96, ffn_dim=256, word_embed_proj_dim=96, vocab_size=512))
print("the same policy on OPT:", policy.prune(opt, 0.5).config.ffn_dim, "rows")
