import math
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import yopo
from conftest import build
from yopo.embedded import model_path
from yopo.evaluation.texts import check_tokenizer

InvalidArgumentError = yopo.InvalidArgumentError


def surprises_of(model, window, first=0):
    """Return -log of the chance that a model gives each token of a window from `first` + 1 on."""
    with torch.no_grad():
        chances = model(input_ids=window[None]).logits[0].double().softmax(dim=-1)
    return [-math.log(chances[i, window[i + 1]]) for i in range(first, len(window) - 1)]


@pytest.fixture
def tokens():
    return torch.randint(0, 64, (53,), generator=torch.Generator().manual_seed(0))


def test_perplexity_is_the_exponential_of_the_mean_surprise_of_each_predicted_token(
    tiny_model, tokens
):
    model = tiny_model("llama")
    surprises = []
    for start in range(0, 48, 8):  # the last five tokens do not fill a window
        surprises += surprises_of(model, tokens[start : start + 8])
    expected = math.exp(sum(surprises) / len(surprises))
    found = yopo.perplexity(model, tokens, window=8, batch=4)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("stride", [1, 3, 7, 8])
def test_with_a_stride_each_token_counts_once_with_what_the_first_window_knows(
    tiny_model, tokens, stride
):
    model = tiny_model("llama")
    surprises, seen = [], set()
    for start in range(0, 53 - 8 + 1, stride):
        for i, value in enumerate(surprises_of(model, tokens[start : start + 8])):
            if start + i + 1 not in seen:
                seen.add(start + i + 1)
                surprises.append(value)
    expected = math.exp(sum(surprises) / len(surprises))
    found = yopo.perplexity(model, tokens, window=8, stride=stride, batch=4)
    assert found == pytest.approx(expected, rel=1e-5)


def test_text_is_turned_into_one_row_of_tokens_and_windows_are_as_long_as_the_model_reads():
    model, tokenizer = yopo.load(model_path()), AutoTokenizer.from_pretrained(model_path())
    text = "Tom had a red ball. He gave the ball to Anna.\n" * 200
    ids = torch.tensor(tokenizer.encode(text))
    window = model.config.max_position_embeddings
    found = yopo.perplexity(model, text, tokenizer=tokenizer)
    assert found == yopo.perplexity(model, ids, window=window)
    assert found == yopo.perplexity(model, ids[None])


def test_a_path_is_read_and_a_string_is_the_text_itself(tmp_path):
    model, tokenizer = yopo.load(model_path()), AutoTokenizer.from_pretrained(model_path())
    text = "Tom had a red ball. He gave the ball to Anna.\n" * 20
    file = tmp_path / "text.txt"
    file.write_text(text)
    found = yopo.perplexity(model, file, tokenizer=tokenizer, window=32)
    assert found == yopo.perplexity(model, text, tokenizer=tokenizer, window=32)
    with pytest.raises(InvalidArgumentError, match=r"pass a `Path`"):
        yopo.perplexity(model, str(file), tokenizer=tokenizer)


def test_the_mode_of_the_model_is_left_as_it_was(tiny_model):
    model = tiny_model("llama").train()
    yopo.perplexity(model, torch.arange(20), window=10)
    assert model.training


def test_a_model_that_is_sure_of_wrong_tokens_has_an_infinite_perplexity(tiny_model, tokens):
    model = tiny_model("llama")
    model.lm_head.weight.data *= 1e6
    assert yopo.perplexity(model, tokens, window=8) == math.inf


@pytest.mark.parametrize(
    ("tokens", "window", "message"),
    [
        (torch.arange(5), 8, "5 tokens, fewer than a window of 8"),
        (torch.zeros(2, 9, dtype=torch.int64), 8, "one row"),
        (torch.zeros(9), 8, "int64"),
        (torch.arange(9), 1, "`window` must be at least 2"),
        (torch.arange(9), 10_000, "at most 2048"),
        ("", 8, "empty"),
        ("some words", 8, "`tokenizer` is needed"),
        (Path("nowhere.txt"), 8, "no file"),
        (None, 8, "must be a string, a `Path` or token ids, got NoneType"),
        (["some", "words"], 8, "got list"),
        (torch.arange(60, 69), 8, r"`text` ids must lie in \[0, 64\)"),
    ],
)
def test_what_cannot_be_measured_is_refused(tiny_model, tokens, window, message):
    with pytest.raises(InvalidArgumentError, match=message):
        yopo.perplexity(tiny_model("llama"), tokens, window=window)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("some/model", "`model` must be a model in memory, got 'some/model'. Load it"),
        (build("llama").model, "causal language models, got LlamaModel"),
        (build("t5"), "causal language models, got T5ForConditionalGeneration"),
    ],
)
def test_a_model_that_has_no_perplexity_is_refused(model, message):
    with pytest.raises(ValueError, match=message) as caught:
        yopo.perplexity(model, torch.arange(9), window=8)
    assert isinstance(caught.value, yopo.YopoError)


def test_strides_and_batches_outside_their_ranges_are_refused(tiny_model, tokens):
    for wrong in ({"stride": 9}, {"stride": 0}, {"batch": 0}):
        with pytest.raises(InvalidArgumentError, match=f"`{next(iter(wrong))}`"):
            yopo.perplexity(tiny_model("llama"), tokens, window=8, **wrong)


def test_logits_that_are_not_finite_are_an_error_and_no_number(tiny_model, tokens):
    model = tiny_model("llama")
    model.lm_head.weight.data[3] = math.nan
    with pytest.raises(InvalidArgumentError, match="not finite"):
        yopo.perplexity(model, tokens, window=8)


def test_a_tokenizer_of_another_model_is_refused(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    with pytest.raises(InvalidArgumentError, match=r"not\s+the model's own"):
        yopo.perplexity(tiny_model("llama"), "some words", tokenizer=tokenizer)


def test_a_tokenizer_with_far_fewer_tokens_than_embeddings_is_warned_of(tiny_model, caplog):
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    check_tokenizer(tiny_model("llama", vocab_size=len(tokenizer) * 10 // 9), tokenizer)
    assert not caplog.records
    check_tokenizer(tiny_model("llama", vocab_size=len(tokenizer) * 10 // 8), tokenizer)
    (record,) = caplog.records
    assert record.message == (
        "`tokenizer` has 1280 tokens, but the model has embeddings for 1600. Is it the model's own?"
    )


class Shifted:
    """A tokenizer of another vocabulary that is no larger."""

    def __init__(self, own):
        self._own = own

    def __len__(self):
        return 1000

    def __call__(self, text, **options):
        return {"input_ids": [(i + 500) % 1000 for i in self._own(text, **options)["input_ids"]]}


def test_a_tokenizer_by_which_the_model_is_worse_than_chance_is_told(caplog):
    model, tokenizer = yopo.load(model_path()), AutoTokenizer.from_pretrained(model_path())
    text = "Tom had a red ball. He gave the ball to Anna.\n" * 4
    yopo.perplexity(model, text, tokenizer=tokenizer, window=32)
    assert not caplog.records
    yopo.perplexity(model, text, tokenizer=Shifted(tokenizer), window=32)
    assert "worse than chance, 1280. Is `tokenizer` the model's own?" in caplog.text
