import math

import pytest
import torch

from yopo import InvalidArgumentError
from yopo.evaluation import perplexity


def test_perplexity_is_the_exponential_of_the_mean_surprise_of_each_predicted_token(tiny_model):
    model = tiny_model("llama")
    tokens = torch.randint(0, 64, (53,), generator=torch.Generator().manual_seed(0))
    surprises = []
    for start in range(0, 48, 8):  # the last five tokens do not fill a window
        window = tokens[start : start + 8]
        with torch.no_grad():
            chances = model(input_ids=window[None]).logits[0].double().softmax(dim=-1)
        surprises += [-math.log(chances[i, window[i + 1]]) for i in range(7)]
    expected = math.exp(sum(surprises) / len(surprises))
    assert perplexity(model, tokens, window=8, batch=4) == pytest.approx(expected, rel=1e-5)


def test_the_mode_of_the_model_is_left_as_it_was(tiny_model):
    model = tiny_model("llama").train()
    perplexity(model, torch.arange(20), window=10)
    assert model.training


@pytest.mark.parametrize(
    ("tokens", "window"), [(torch.arange(5), 8), (torch.zeros(2, 9), 8), (torch.arange(9), 1)]
)
def test_too_few_tokens_are_refused(tiny_model, tokens, window):
    with pytest.raises(InvalidArgumentError, match="window"):
        perplexity(tiny_model("llama"), tokens, window=window)
