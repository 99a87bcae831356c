"""Several processes, started by torchrun, end with what one process finds, bit for bit."""

import re

import pytest
import torch
from safetensors.torch import load_file

import yopo
from conftest import build, files_in, run_python, save
from yopo import YopoError
from yopo.ranks import failing_together

WORK = """
import sys
import torch, yopo
from torch import distributed
from conftest import build

def published(model):
    pruner = yopo.PolicyPruner.prunenet(ratio=0.4, episodes=3, seed=3).fit(model)
    return {name: t for name, t in pruner._policy.tensors.items()} | history(pruner)

def spectral(model):
    pruner = yopo.PolicyPruner(reward="spectral", episodes=3, samples=4).fit(model)
    return dict(pruner._policy.tensors) | history(pruner)

def output(model):
    pruner = yopo.PolicyPruner(episodes=2, samples=4, evidence=TOKENS).fit(model)
    return dict(pruner._policy.tensors) | history(pruner)

def default(model):
    pruner = yopo.PolicyPruner(evidence=TOKENS, allocation="adaptive").fit(model)
    return pruner.prune(model, 0.4).state_dict()

def drawn(model):
    pruner = yopo.PolicyPruner.prunenet(episodes=1).fit(model)
    return pruner.prune(model, 0.4).state_dict()

def lean(model):
    return yopo.PolicyPruner.lean().fit(model).prune(model, 0.4).state_dict()

def history(pruner):
    rows = [e.reward + e.loss + e.gradient_norm + e.ks + e.best_ks for e in pruner.history]
    return {"history": torch.tensor(rows, dtype=torch.float64)}

TOKENS = torch.arange(256).view(8, 32) * 7 % 60 + 3
found = {}
for kind in ("llama", "opt", "qwen2_moe"):
    for job in (published, spectral, output, default, drawn, lean):
        if kind == "qwen2_moe" and job in (published, drawn):
            continue  # experts of two widths
        tensors = job(build(kind, num_hidden_layers=3))
        found |= {f"{kind} {job.__name__} {n}": t.detach().clone() for n, t in tensors.items()}
wide = published(build("opt", ffn_dim=1100))  # the scorer's hidden units are in three blocks
found |= {f"wide {n}": t.detach().clone() for n, t in wide.items()}
for kind, pruner in (
    ("llama", yopo.PolicyPruner.lean()),
    ("qwen2_moe", yopo.PolicyPruner.lean(seed=1)),
    ("gpt2", yopo.PolicyPruner.prunenet(episodes=1)),
    ("opt", yopo.PolicyPruner(reward="spectral", episodes=1, samples=2, evidence="weights")),
):
    yopo.prune_checkpoint(f"source-{kind}", f"{sys.argv[1]}-{kind}", 0.4, pruner=pruner)
plan = yopo.plan_by_criterion(build("llama"), 0.4, criterion=yopo.criteria.row_norm)
yopo.prune_checkpoint("source-llama", f"{sys.argv[1]}-plan", plan=plan)
rank = distributed.get_rank() if distributed.is_initialized() else 0
from safetensors.torch import save_file
save_file(found, f"{sys.argv[1]}-{rank}.safetensors")
"""


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, run_forked):
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "work.py").write_text(WORK)
    for kind in ("llama", "qwen2_moe", "gpt2", "opt"):
        save(build(kind), folder / f"source-{kind}")
    done = run_forked("work.py", folder / "alone", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, load_file(folder / "alone-0.safetensors")


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_rank_ends_with_what_one_process_finds_bit_for_bit(alone, run_forked, ranks):
    folder, expected = alone
    if ranks == 2:  # started one by one, so that what depends on the seed of hashes would differ
        done = run_python(*TORCHRUN, "work.py", folder / "of-2", cwd=folder)
    else:
        done = run_forked("work.py", folder / f"of-{ranks}", ranks=ranks, cwd=folder)
    assert done.returncode == 0, done.stderr
    for rank in range(ranks):
        found = load_file(folder / f"of-{ranks}-{rank}.safetensors")
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            pair = [t.reshape(-1).view(torch.uint8) for t in (found[name], tensor)]
            assert torch.equal(*pair), name
    for job in ("llama", "qwen2_moe", "gpt2", "opt", "plan"):
        assert files_in(folder / f"of-{ranks}-{job}") == files_in(folder / f"alone-{job}"), job
    assert [file.name for file in folder.iterdir() if file.name.startswith(".")] == []


def test_ranks_that_do_different_things_are_told_so(tmp_path, run_forked):
    code = "import yopo, os; from conftest import build; r = int(os.environ['RANK'])\n"
    code += "yopo.PolicyPruner.prunenet(episodes=1, ratio=0.2 + 0.1 * r).fit(build('llama'))"
    (tmp_path / "work.py").write_text(code)
    done = run_forked(tmp_path / "work.py", ranks=2)
    assert done.returncode != 0
    assert "of this run do different things: `fit` shares its work out" in done.stderr


def test_an_error_of_another_rank_is_told_even_if_it_says_nothing(monkeypatch):
    monkeypatch.setattr("yopo.ranks.gather", lambda found: [*found, ""])
    with pytest.raises(YopoError, match="another rank of this run failed"), failing_together():
        pass


def test_a_rank_that_dies_ends_the_run_with_an_error(tmp_path, run_forked):
    code = "import yopo, os, signal; from conftest import build; from yopo import published\n"
    code += "draw, r = published._draw, int(os.environ['RANK'])\n"
    code += "published._draw = lambda *a: os.kill(os.getpid(), signal.SIGKILL) if r else draw(*a)\n"
    code += "yopo.PolicyPruner.prunenet(episodes=2).fit(build('llama')); print('done')"
    (tmp_path / "work.py").write_text(code)
    done = run_forked(tmp_path / "work.py", ranks=2)
    assert done.returncode != 0
    assert "done" not in done.stdout
    assert "SIGKILL" in done.stderr


STEPS = {
    "staged": 0,
    "open_checkpoint": 1,
    "save_file": 1,
    "write_shard": 1,
    "write_other_files": 0,
    "_write_card": 0,
}
"""Steps of a cut, and which of two ranks fails in each."""

FAILING = """
import errno, os, signal, sys
import yopo
from yopo import on_disk

rank, write = int(os.environ["RANK"]), on_disk.write_shard

def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")

def dies(file, *rest):
    write(file, *rest)
    if rank:
        os.truncate(file, 100)
        os.kill(os.getpid(), signal.SIGKILL)

for step, failing in STEPS.items():
    works = getattr(on_disk, step)
    setattr(on_disk, step, full if rank == failing else works)
    try:
        yopo.prune_checkpoint("source", "target", 0.4)
    except (OSError, yopo.YopoError) as error:
        print(f"{step}, rank {rank}: {type(error).__name__}: {error}", flush=True)
    setattr(on_disk, step, works)
yopo.ranks.gather([None])
if not rank:
    print("left:", sorted(os.listdir(".")), flush=True)
on_disk.write_shard = dies
yopo.prune_checkpoint("source", "target", 0.4)
print("done")
"""


def test_a_rank_that_fails_or_dies_ends_the_run_on_all_ranks_with_no_target(tmp_path, run_forked):
    source = save(build("llama"), tmp_path / "source")
    before = files_in(source)
    (tmp_path / "work.py").write_text(FAILING.replace("STEPS", repr(STEPS)))
    done = run_forked("work.py", ranks=2, cwd=tmp_path)
    for step, failing in STEPS.items():
        assert re.search(rf"{step}, rank {failing}: OSError: .*No space left", done.stdout), step
        told = f"{step}, rank {1 - failing}: YopoError: another rank of this run failed: "
        assert told in done.stdout
    assert "left: ['source', 'work.py']" in done.stdout
    assert done.returncode != 0
    assert "done" not in done.stdout
    assert "SIGKILL" in done.stderr
    assert not (tmp_path / "target").exists()
    assert files_in(source) == before
    yopo.prune_checkpoint(source, tmp_path / "target", 0.4)
    yopo.prune_checkpoint(source, tmp_path / "expected", 0.4)
    assert files_in(tmp_path / "target") == files_in(tmp_path / "expected")
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []
