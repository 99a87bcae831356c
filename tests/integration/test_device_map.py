"""Models with the hooks that a `device_map` over several devices attaches, here all the CPU."""

from functools import partial

import pytest
import torch

import yopo
from conftest import assert_same, build
from yopo.writing import write_tokens

accelerate = pytest.importorskip("accelerate")

TOKENS = torch.arange(256).view(8, 32) * 7 % 60 + 3


def spread(model):
    """Put the layers where a device map says, as `from_pretrained` does for several devices."""
    parts = ["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"]
    parts += [f"model.layers.{number}" for number in range(len(model.model.layers))]
    accelerate.dispatch_model(model, device_map=dict.fromkeys(parts, "cpu"), force_hooks=True)
    assert hasattr(model.model.layers[0], "_hf_hook")
    return model


def pruned_by(pruner, ratio=0.3):
    return lambda model: pruner().fit(model).prune(model, ratio)


JOBS = {
    "own text": pruned_by(yopo.PolicyPruner),
    "text, output": pruned_by(
        lambda: yopo.PolicyPruner(evidence=TOKENS, reward="output", episodes=2, samples=2)
    ),
    "text, divergence": pruned_by(
        lambda: yopo.PolicyPruner(evidence=TOKENS, reward="divergence", episodes=2, samples=2)
    ),
    "adaptive": pruned_by(lambda: yopo.PolicyPruner(evidence=TOKENS, allocation="adaptive")),
    "lean": pruned_by(yopo.PolicyPruner.lean),
    "prunenet": pruned_by(lambda: yopo.PolicyPruner.prunenet(episodes=2)),
    "pruner-zero": lambda model: yopo.MetricPruner(data=TOKENS).prune(model, 0.5),
    "sparsegpt": lambda model: yopo.MetricPruner("sparsegpt", data=TOKENS).prune(model, 0.5),
}


@pytest.mark.parametrize("job", JOBS)
def test_a_model_that_is_spread_over_devices_is_pruned_as_any_other(job, logits, monkeypatch):
    few = partial(write_tokens, sequences=4, length=12)
    monkeypatch.setattr("yopo.evidence.write_tokens", few)
    monkeypatch.setattr("yopo.divergence._SEQUENCES", 4)
    monkeypatch.setattr("yopo.divergence._LENGTH", 12)
    plain, other = build("llama"), spread(build("llama"))
    JOBS[job](plain)
    JOBS[job](other)
    assert_same(other.state_dict(), plain.state_dict())
    assert torch.equal(logits(other), logits(plain))


def test_a_model_that_is_spread_over_devices_is_measured_as_any_other():
    plain, other = build("llama"), spread(build("llama"))
    text = TOKENS.flatten()
    assert yopo.perplexity(other, text, window=32) == yopo.perplexity(plain, text, window=32)
