"""The default recipe on a GPU: the same decisions as on the CPU, no waiting, in time and memory."""

import time

import pytest
import torch

import yopo
from yopo import find_ffns
from yopo.elimination import _drop_block, eliminate
from yopo.evidence import Evidence
from yopo.memory import memory_left
from yopo.moments import Moments
from yopo.restore import restore_contract

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def moments_of(rows, *, tokens, device):
    generator = torch.Generator(device).manual_seed(0)
    units = torch.randn(tokens, rows, generator=generator, device=device).relu_()
    units = units * torch.linspace(0.1, 2.0, rows, device=device)
    units[:, 1:] += 0.5 * units[:, :-1].clone()
    return Moments((units.T @ units).double() / tokens, units.mean(dim=0).double(), tokens)


def contract_of(rows, columns, *, device, dtype=torch.float32):
    generator = torch.Generator(device).manual_seed(1)
    return torch.randn(rows, columns, generator=generator, device=device).to(dtype)


def test_elimination_is_that_of_the_cpu():
    moments, contract = (
        moments_of(300, tokens=2000, device="cuda"),
        contract_of(300, 64, device="cuda"),
    )
    found = eliminate(moments.second_FF, contract)
    expected = eliminate(moments.second_FF.cpu(), contract.cpu())
    assert found.order_F.is_cuda
    assert found.order_F.tolist() == expected.order_F.tolist()
    torch.testing.assert_close(found.loss_F.cpu(), expected.loss_F, rtol=1e-8, atol=0.0)


def test_the_loop_over_rows_never_waits_for_the_device():
    moments = moments_of(200, tokens=1000, device="cuda")
    both = torch.stack([moments.second_FF.inverse(), moments.second_FF])
    diagonal = both.diagonal(dim1=1, dim2=2).clone()
    _drop_block(both, diagonal.clone(), 4)
    torch.cuda.set_sync_debug_mode("error")
    try:
        _drop_block(both, diagonal, 64)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_restoring_is_that_of_the_cpu():
    moments = moments_of(300, tokens=2000, device="cuda")
    contract, bias = contract_of(300, 64, device="cuda"), contract_of(1, 64, device="cuda")[0]
    kept = torch.arange(0, 300, 2)
    found = restore_contract(moments, contract, bias, kept, dtype=torch.float32)
    on_cpu = Moments(moments.second_FF.cpu(), moments.mean_F.cpu(), moments.tokens)
    expected = restore_contract(on_cpu, contract.cpu(), bias.cpu(), kept, dtype=torch.float32)
    assert found.contract_KD.is_cuda
    torch.testing.assert_close(found.contract_KD.cpu(), expected.contract_KD)
    assert found.error == pytest.approx(expected.error, rel=1e-6)


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2", "qwen2_moe"])
@pytest.mark.parametrize("evidence", ["self", "weights"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_on_the_gpu_is_pruned_there(tiny_model, kind, evidence, dtype):
    model = tiny_model(kind, dtype=dtype).cuda()
    rows = find_ffns(model)[0].rows
    yopo.PolicyPruner(evidence=evidence).fit(model).prune(model, 0.25)
    assert find_ffns(model)[0].rows < rows
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    ids = torch.arange(5, 15, device="cuda")[None]
    assert torch.isfinite(model(input_ids=ids).logits).all()


def test_the_plan_is_that_of_the_cpu(tiny_model):
    ids = torch.randint(3, 60, (16, 32), generator=torch.Generator().manual_seed(0))
    plans = []
    for device in ("cpu", "cuda"):
        model = tiny_model("llama").to(device)
        plans.append(yopo.PolicyPruner(evidence=ids).fit(model).plan(model, 0.25))
    for name, kept in plans[0].kept.items():
        assert kept.tolist() == plans[1].kept[name].tolist()


def test_episodes_run_on_the_gpu(tiny_model):
    model = tiny_model("llama").cuda()
    pruner = yopo.PolicyPruner(episodes=2).fit(model)
    assert len(pruner.history) == 2
    pruner.prune(model, 0.25)


def test_what_torch_has_cached_counts_as_left():
    device = torch.device("cuda", torch.cuda.current_device())
    before = memory_left(device)
    block = torch.empty(2**28, dtype=torch.uint8, device=device)
    assert before - memory_left(device) >= 2**27
    del block
    assert memory_left(device) >= before - 2**26
    assert before <= torch.cuda.get_device_properties(device).total_memory


def test_an_ffn_whose_moments_the_gpu_cannot_hold_is_refused_with_a_way_out(
    tiny_model, monkeypatch
):
    model = tiny_model("llama").cuda()
    monkeypatch.setattr("yopo.evidence.memory_left", lambda device: 1000)
    with pytest.raises(yopo.UnsupportedModelError, match="reward='spectral'"):
        list(Evidence("weights", seed=0).moments(model, find_ffns(model)))


def test_a_layer_of_llama_2_7b_is_eliminated_in_seconds_and_a_few_matrices():
    rows = 11008
    moments = moments_of(rows, tokens=16384, device="cuda")
    contract = contract_of(rows, 4096, device="cuda", dtype=torch.bfloat16)
    eliminate(moments.second_FF[:500, :500], contract[:500])  # loads the solvers
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held, started = torch.cuda.memory_allocated(), time.perf_counter()
    found = eliminate(moments.second_FF, contract)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    matrices = (torch.cuda.max_memory_allocated() - held) / (8 * rows**2)
    assert sorted(found.order_F.tolist()) == list(range(rows))
    assert seconds < 15
    assert matrices < 6
