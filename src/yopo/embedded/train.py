"""Make the embedded checkpoint: ``python -m yopo.embedded.train [--output DIR] [--steps N]``.

The same seed and number of steps give the same weights on the same machine.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from yopo.embedded import model_path
from yopo.embedded.stories import HELD_OUT_SEED, STORY_SEPARATOR, stories, write_text
from yopo.evaluation import perplexity

__all__ = [
    "build_model",
    "build_tokenizer",
    "save_checkpoint",
    "token_windows",
    "train_model",
]

BEGIN, END, PADDING = "<s>", "</s>", "<pad>"
VOCABULARY_SIZE = 1280
SEQUENCE_LENGTH = 256
BATCH_SIZE = 16
PEAK_LEARNING_RATE = 3e-3
WARM_UP_STEPS = 100
DEFAULT_STEPS = 3000
DEFAULT_SEED = 1


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on stories.

    Args:
        seed: Which stories to count pairs in.

    Returns:
        A tokenizer that puts the begin token before each text and can encode any text at all.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[BEGIN, END, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(islice(stories(seed), 20_000), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A",
        pair=f"{BEGIN} $A {BEGIN} $B",
        special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PADDING,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Create the untrained LLaMA.

    Args:
        tokenizer: The tokenizer whose vocabulary the model reads and writes.
        seed: Seed of the initial weights; the global random state is left as it was.

    Returns:
        The model, in float32 on the CPU.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=SEQUENCE_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def token_windows(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[torch.Tensor]:
    """Pack an endless stream of stories into batches of full windows.

    Args:
        tokenizer: Encodes the stories and puts the begin token before each document.
        seed: Which stories to take; must not be ``HELD_OUT_SEED``.

    Yields:
        Token ids of shape (batch, sequence); no story comes twice on purpose.

    Raises:
        ValueError: The seed is that of the held-out text.
    """
    if seed == HELD_OUT_SEED:
        raise ValueError(f"seed {seed} is reserved for the held-out text; train on another one")
    random = Random(seed)
    source = stories(seed)
    size = BATCH_SIZE * SEQUENCE_LENGTH
    tokens: list[int] = []
    while True:
        while len(tokens) < size:
            # Several stories to a document, so that the model knows both a story after the begin
            # token and a story after a blank line, as in the text of ``write_text``.
            document = STORY_SEPARATOR.join(islice(source, random.randint(1, 5)))
            tokens += [*tokenizer.encode(document), tokenizer.eos_token_id]
        yield torch.tensor(tokens[:size]).view(BATCH_SIZE, SEQUENCE_LENGTH)
        tokens = tokens[size:]


def train_model(
    model: LlamaForCausalLM, windows: Iterator[torch.Tensor], steps: int
) -> Iterator[float]:
    """Train a model in place with AdamW, a warm-up and a cosine decay.

    Args:
        model: The model to train.
        windows: Batches of token ids, one for each step.
        steps: How many steps to take.

    Yields:
        The training loss of each step.
    """
    # Norm weights are left out: decay would pull them to zero, not to one.
    decayed = [weight for weight in model.parameters() if weight.dim() > 1]
    others = [weight for weight in model.parameters() if weight.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=PEAK_LEARNING_RATE,
        betas=(0.9, 0.95),
    )
    model.train()
    for step, batch in enumerate(islice(windows, steps)):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LEARNING_RATE * _learning_rate_factor(step, steps)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield float(loss.detach())
    model.train(False)


def _learning_rate_factor(step: int, steps: int) -> float:
    warm_up = min(1.0, (step + 1) / WARM_UP_STEPS)
    return warm_up * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * step / steps)))


def save_checkpoint(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path
) -> None:
    """Save a model in float16, and its tokenizer, in the standard layout.

    Args:
        model: The model; it is converted to float16 in place.
        tokenizer: Its tokenizer.
        output: The folder to write to.
    """
    model.generation_config.do_sample = True
    model.generation_config.temperature = 0.7
    model.generation_config.max_new_tokens = SEQUENCE_LENGTH - 1
    model.half()
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the model, save it and print its perplexities.

    Args:
        arguments: The command line, or None for that of the process.
    """
    parser = argparse.ArgumentParser(description="Train the embedded story model.")
    parser.add_argument("--output", type=Path, default=model_path())
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS)
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED)
    options = parser.parse_args(arguments)
    # So small a model gains little from a second thread, and with one the sums keep one order.
    torch.set_num_threads(1)
    tokenizer = build_tokenizer(options.seed)
    model = build_model(tokenizer, options.seed)
    windows = token_windows(tokenizer, options.seed)
    held_out = write_text(HELD_OUT_SEED, 60_000)

    def measure(judged: LlamaForCausalLM, text: str) -> float:
        return perplexity(judged, torch.tensor(tokenizer.encode(text)), window=SEQUENCE_LENGTH)

    for step, loss in enumerate(train_model(model, windows, options.steps), start=1):
        if step % 100 == 0:
            measured = measure(model, held_out[:15_000])
            print(f"step {step}: loss {loss:.4f}, held-out perplexity {measured:.4f}", flush=True)
    save_checkpoint(model, tokenizer, options.output)
    saved = LlamaForCausalLM.from_pretrained(options.output, dtype=torch.float32)
    seen = write_text(options.seed, 60_000)
    print(f"train perplexity {measure(saved, seen):.4f}")
    print(f"held-out perplexity {measure(saved, held_out):.4f}")


if __name__ == "__main__":
    main()
