"""The story grammar and the small trained model that travels with the library."""

from __future__ import annotations

import re
import socket
from itertools import islice

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from yopo.embedded import model_path
from yopo.embedded.stories import HELD_OUT_SEED, STORY_SEPARATOR, stories, write_text
from yopo.embedded.train import token_windows
from yopo.evaluation import perplexity

TRAINING_SEED = 1
DENSE_PERPLEXITY_BOUND = 1.65  # measured: 1.51


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    loaded = AutoTokenizer.from_pretrained(model_path(), local_files_only=True)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    loaded = AutoModelForCausalLM.from_pretrained(
        model_path(), local_files_only=True, dtype=torch.float32
    )
    assert isinstance(loaded, LlamaForCausalLM)
    return loaded


def words(text: str) -> set[str]:
    return set(re.findall(r"[A-Za-z-]+", text))


def test_the_same_seed_writes_the_same_text() -> None:
    assert write_text(3, 5_000) == write_text(3, 5_000)


def test_another_seed_writes_another_text() -> None:
    assert not set(islice(stories(3), 50)) & set(islice(stories(4), 50))


def test_a_text_is_whole_stories_up_to_the_wanted_length() -> None:
    text = write_text(3, 5_000)
    parts = text.split(STORY_SEPARATOR)
    assert parts == list(islice(stories(3), len(parts)))
    assert len(text) >= 5_000 > len(STORY_SEPARATOR.join(parts[:-1]))


def test_every_story_has_five_to_twelve_sentences() -> None:
    for story in islice(stories(3), 500):
        sentences = re.split(r'[.!?]"? (?=["A-Z])', story)
        assert 5 <= len(sentences) <= 12, story


def test_held_out_text_shares_the_vocabulary_of_the_training_text() -> None:
    assert words(write_text(HELD_OUT_SEED, 50_000)) <= words(write_text(TRAINING_SEED, 500_000))


def test_held_out_text_is_made_of_stories_that_training_text_does_not_have() -> None:
    held_out = set(islice(stories(HELD_OUT_SEED), 500))
    assert not held_out & set(islice(stories(TRAINING_SEED), 5_000))


def test_training_refuses_the_held_out_seed(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="reserved for the held-out text"):
        next(token_windows(tokenizer, HELD_OUT_SEED))


def test_training_windows_repeat_for_a_seed_and_start_with_the_begin_token(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    first, again = (next(token_windows(tokenizer, 3)) for _ in range(2))
    assert torch.equal(first, again)
    assert int(first[0, 0]) == tokenizer.bos_token_id


def test_text_survives_a_round_trip_through_the_tokenizer(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    text = write_text(HELD_OUT_SEED, 2_000)
    tokens = tokenizer.encode(text)
    assert tokens[0] == tokenizer.bos_token_id
    assert tokenizer.decode(tokens, skip_special_tokens=True) == text


def test_the_checkpoint_loads_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("loading the embedded checkpoint opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    AutoTokenizer.from_pretrained(model_path())
    assert AutoModelForCausalLM.from_pretrained(model_path()).dtype == torch.float16


def test_the_checkpoint_takes_at_most_three_megabytes() -> None:
    assert sum(file.stat().st_size for file in model_path().iterdir()) <= 3_000_000


def test_the_model_has_learned_the_stories(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    text = write_text(HELD_OUT_SEED, 20_000)
    measured = perplexity(model, torch.tensor(tokenizer.encode(text)))
    assert measured < DENSE_PERPLEXITY_BOUND < len(tokenizer) / 100


def test_the_model_writes_readable_text_from_the_begin_token(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    start = torch.tensor([[tokenizer.bos_token_id]])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokens = model.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=120)
    text = tokenizer.decode(tokens[0], skip_special_tokens=True)
    # The last word may have been cut short.
    written = re.findall(r"[A-Za-z-]+", text)[:-1]
    known = words(write_text(TRAINING_SEED, 500_000))
    assert len(written) > 40
    assert sum(word in known for word in written) >= 0.95 * len(written)
