"""Speed on a GPU: where models run, that the clock waits, and what the peak counts."""

import pytest
import torch

from yopo.speed import benchmark
from yopo.speed.machine import forget_peak, measure_rates, peak

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2", "phi", "qwen2_moe"])
def test_a_model_on_the_gpu_is_timed_there(tiny_model, kind):
    model = tiny_model(kind, dtype=torch.bfloat16).cuda()
    speed = benchmark(model, batch=2, prompt=16, new_tokens=4, repeats=2).model
    assert speed.device.startswith("cuda")
    assert 0 < max(speed.prefill) < speed.prefill_bound
    assert 0 < max(speed.decode) < speed.decode_bound
    assert speed.run_peak > 2 * 16 * 64 * 2  # at least the logits of the prompts


def test_checkpoints_are_loaded_to_the_gpu_by_default(tiny_model, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    report = benchmark(tmp_path, tmp_path, prompt=16, new_tokens=4, repeats=2)
    assert report.model.device.startswith("cuda")
    assert report.model.load_peak >= report.model.bytes
    assert report.speed_up("decode") > 0


def test_the_rates_are_those_of_a_gpu_that_has_done_its_work():
    operations, read = measure_rates(torch.device("cuda"), torch.bfloat16)
    assert 1e12 < operations < 1e16
    assert 5e10 < read < 2e13


def test_the_peak_is_what_was_held_and_given_back_in_between():
    device, size = torch.device("cuda"), 64 * 2**20
    held = forget_peak(device)
    block = torch.ones(size, dtype=torch.uint8, device=device)
    del block
    assert peak(device) - held == size
