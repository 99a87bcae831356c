"""Several processes, started by torchrun, recover the same model together."""

import re

import pytest
import torch
from safetensors.torch import load_file

from conftest import run_python

WORK = """
import logging, os, sys
import torch, yopo
from yopo.recovery.adapter import Trained
from conftest import build
from safetensors.torch import save_file
from dataclasses import replace

logging.basicConfig(level=logging.WARNING)
tokens = torch.arange(640).view(20, 32) * 7 % 60 + 3
settings = yopo.RecoverySettings(window=32, batch=4, epochs=2, written=36, learning_rate=5e-3)
found = {}
for kind in ("llama", "qwen2_moe"):
    model = yopo.recover(build(kind), tokens, settings=settings)
    found |= {f"{kind} {n}": t for n, t in model.state_dict().items()}
model = build("gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
for parameter in model.transformer.h.parameters():
    parameter.detach()[parameter.abs() < 0.1] = 0.0
yopo.recover(model, tokens, settings=settings)
found |= {f"sparse {n}": t for n, t in model.state_dict().items()}
model, dense = build("opt", dropout=0.0), build("opt", seed=1)
yopo.recover(model, teacher=dense, settings=settings, output=f"{sys.argv[1]}-run")
found |= {f"opt {n}": t for n, t in model.state_dict().items()}
try:
    yopo.recover(build("llama"), tokens, settings=replace(settings, batch=3))
except yopo.InvalidArgumentError as error:
    print(error)
def full(self, file):
    raise OSError(28, "No space left on device")

Trained.save = full
try:
    yopo.recover(build("llama"), tokens, settings=settings, output=f"{sys.argv[1]}-full")
except yopo.YopoError as error:
    print("told", error)
rank = os.environ.get("RANK", "0")
found = {n: t.detach().clone() for n, t in found.items()}
save_file(found, f"{sys.argv[1]}-{rank}.safetensors")
"""

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, run_forked):
    folder = tmp_path_factory.mktemp("recovery-ranks")
    (folder / "work.py").write_text(WORK)
    done = run_forked(folder / "work.py", "alone", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, load_file(folder / "alone-0.safetensors")


def test_all_ranks_end_with_the_weights_that_one_process_finds(alone):
    folder, expected = alone
    done = run_python(*TORCHRUN, folder / "work.py", "two", cwd=folder)
    assert done.returncode == 0, done.stderr
    full = re.findall(
        r"^told cannot write the checkpoint .*No space left", done.stdout, re.MULTILINE
    )
    assert len(full) == 2
    assert "`batch=3` cannot be shared evenly by 2 ranks" in done.stdout
    first, second = (load_file(folder / f"two-{rank}.safetensors") for rank in range(2))
    for name, tensor in expected.items():
        assert torch.equal(first[name], second[name]), name
        assert torch.allclose(first[name], tensor, atol=1e-4), name
        if name.startswith("sparse"):
            assert torch.equal(first[name] == 0, tensor == 0), name
    assert (folder / "two-run" / "adapter" / "adapter_model.safetensors").exists()
