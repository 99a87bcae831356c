"""Several GPUs, which tell one another by NCCL, end with what one finds."""

import pytest
import torch
from safetensors.torch import load_file

from conftest import assert_same, build, run_python, save, tensors_in

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two CUDA devices"),
]

WORK = """
import os, sys
import torch, yopo
from conftest import build
from safetensors.torch import save_file
from torch import distributed

name, backend, device = sys.argv[1:]
rank = int(os.environ.get("LOCAL_RANK", 0))
if "LOCAL_RANK" in os.environ:
    if device == "cuda":
        torch.cuda.set_device(rank)
    distributed.init_process_group(backend)
tokens = torch.arange(256).view(8, 32) * 7 % 60 + 3
found = {}
for kind in ("llama", "opt"):
    model = build(kind, num_hidden_layers=3).to(device)
    pruner = yopo.PolicyPruner.prunenet(ratio=0.4, episodes=3).fit(model)
    rows = [e.reward + e.loss + e.gradient_norm + e.ks for e in pruner.history]
    found[f"{kind} history"] = torch.tensor(rows)
    pruner = yopo.PolicyPruner(evidence=tokens).fit(model)
    pruned = pruner.prune(model, 0.4).state_dict()
    found |= {f"{kind} {key}": tensor.cpu().clone() for key, tensor in pruned.items()}
save_file(found, f"{name}-{rank}.safetensors")
yopo.prune_checkpoint("source", name, 0.4)
if "LOCAL_RANK" in os.environ:
    distributed.destroy_process_group()
"""

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@pytest.mark.parametrize("backend", ["nccl", "cpu:gloo,cuda:nccl"])
def test_two_gpus_end_with_what_one_finds(tmp_path, backend):
    save(build("llama"), tmp_path / "source")
    (tmp_path / "work.py").write_text(WORK)
    for name, start in (("alone", ()), ("both", TORCHRUN)):
        done = run_python(*start, "work.py", name, backend, "cuda", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    expected = load_file(tmp_path / "alone-0.safetensors")
    for rank in range(2):
        found = load_file(tmp_path / f"both-{rank}.safetensors")
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    assert_same(tensors_in(tmp_path / "both"), tensors_in(tmp_path / "alone"))
