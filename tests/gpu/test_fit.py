"""PruneNet's training on a GPU: the same distances as on the CPU, in time, and within memory."""

import time

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import yopo
from yopo import find_ffns
from yopo.reward import spectral_rewards

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

LAYERS = 32
"""Of LLaMA-2-7B; the tests build fewer."""


def llama(layers, *, rows=11008, width=4096):
    """Return a model with random bfloat16 weights and FFNs of LLaMA-2-7B's shape, on the GPU."""
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=rows,
        num_hidden_layers=layers,
        num_attention_heads=width // 128,
        vocab_size=64,
    )
    with torch.random.fork_rng(), torch.device("cuda"):
        torch.manual_seed(0)
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


def drawn_rows(ffns, *, draws, ratio=0.3):
    generator = torch.Generator().manual_seed(0)
    kept = {}
    for ffn in ffns:
        keep = int((1 - ratio) * ffn.rows)
        orders = [torch.randperm(ffn.rows, generator=generator)[:keep] for _ in range(draws)]
        kept[ffn.name] = torch.stack(orders).sort().values
    return kept


def seconds_of_fit(model, episodes):
    torch.cuda.synchronize()
    started = time.perf_counter()
    yopo.PolicyPruner.prunenet(episodes=episodes).fit(model)
    torch.cuda.synchronize()
    return time.perf_counter() - started


@pytest.mark.parametrize("ratio", [0.3, 0.7, 0.9])
def test_distances_are_those_of_the_cpu(ratio):
    model = llama(2, rows=2048, width=512)
    ffns = find_ffns(model)
    kept = drawn_rows(ffns, draws=4, ratio=ratio)
    on_gpu = spectral_rewards(ffns)({name: rows.cuda() for name, rows in kept.items()})
    on_cpu = spectral_rewards(find_ffns(model.cpu()))(kept)
    difference = 1 / on_gpu.cpu().double() - 1 / on_cpu.double()
    assert difference.abs().max() < 1e-3


def test_training_gives_the_episodes_of_the_cpu(tiny_model):
    histories = []
    for device in ("cpu", "cuda"):
        pruner = yopo.PolicyPruner.prunenet(episodes=2).fit(tiny_model("llama").to(device))
        histories.append(pruner.history)
    for on_cpu, on_gpu in zip(*histories, strict=True):
        assert on_gpu.ks == pytest.approx(on_cpu.ks, abs=1e-3)
        assert on_gpu.reward == pytest.approx(on_cpu.reward, rel=1e-2)
        assert on_gpu.loss == pytest.approx(on_cpu.loss, rel=1e-3)


def test_a_model_spread_over_devices_is_trained_as_on_one(tiny_model):
    expected = yopo.PolicyPruner.prunenet(episodes=2).fit(tiny_model("llama")).history
    model = tiny_model("llama")
    model.model.layers[1].to("cuda")
    for found, episode in zip(
        yopo.PolicyPruner.prunenet(episodes=2).fit(model).history, expected, strict=True
    ):
        assert found.ks == pytest.approx(episode.ks, abs=1e-3)
        assert found.gradient_norm == pytest.approx(episode.gradient_norm, rel=1e-3)


def test_twenty_episodes_of_llama_2_7b_take_less_than_a_minute():
    layers = 4
    model = llama(layers)
    seconds_of_fit(model, 1)  # loads the solvers
    once, thrice = seconds_of_fit(model, 1), seconds_of_fit(model, 3)
    episode = (thrice - once) / 2
    whole = LAYERS / layers * (once + 19 * episode)
    assert whole < 60


@pytest.mark.parametrize(
    "pruner",
    [
        yopo.PolicyPruner.prunenet(episodes=1),
        yopo.PolicyPruner(reward="spectral", episodes=1, samples=64),
    ],
    ids=["one draw a layer", "64 draws a layer"],
)
def test_batches_do_not_exceed_the_memory_that_is_left(pruner):
    """64 draws at once would take 4 GiB and more for their Gram matrices in float32 alone."""
    model = llama(4)
    torch.cuda.empty_cache()
    ballast = []
    try:
        free, _ = torch.cuda.mem_get_info()
        ballast.append(torch.empty(max(free - 4 * 2**30, 0), dtype=torch.uint8, device="cuda"))
        pruner.fit(model)
    finally:
        ballast.clear()
        torch.cuda.empty_cache()
    assert len(pruner.history) == 1
