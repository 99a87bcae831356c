"""Text that a model writes itself, from token ids alone: no data, no tokenizer, no network.

Shapes: N sequences, W tokens a sequence.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from yopo.errors import InvalidArgumentError, UnsupportedModelError

SEQUENCES, LENGTH = 128, 256
"""How much text a model writes: sequences, and tokens in each."""


def can_write(model: nn.Module) -> bool:
    """Tell whether `model` can write text: it generates, from token ids alone."""
    generates: Callable[[], bool] = getattr(model, "can_generate", lambda: False)
    reads_ids = getattr(model, "main_input_name", "input_ids") == "input_ids"
    return generates() and reads_ids and not any(p.is_meta for p in model.parameters())


def write_tokens(
    model: Any, *, sequences: int = SEQUENCES, length: int = LENGTH, seed: int = 0
) -> dict[str, Tensor]:
    """Let `model` write text, and return it as the inputs that make the model read it again.

    Every sequence starts with one token drawn uniformly from the vocabulary and goes on as the
    model likes, at temperature 1 with no token left out but the end of the text. An
    encoder-decoder reads such tokens and writes an answer.

    Args:
        model: A model for which `can_write` holds.
        sequences: How many sequences, N at least 1.
        length: Tokens a sequence, W at least 2; less where the model cannot read as many.
        seed: Seed of the sampling; the global generators are left as they were.

    Returns:
        `input_ids` `(N, W)`, and `decoder_input_ids` for an encoder-decoder.

    Raises:
        UnsupportedModelError: If the model writes NaN.
    """
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or length
    length = max(min(length, int(longest)), 2)
    device = next(model.parameters()).device
    devices = [device] if device.type not in ("cpu", "meta") else []
    training = model.training
    written = []
    try:
        model.eval()
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(seed)
            batches = split_into(sequences, _sequences_at_once(model, length))
            for batch in with_progress(batches, "write"):
                prompt_ids = _prompt(config, batch, length, model.config.is_encoder_decoder)
                written.append(_write(model, prompt_ids.to(device), length))
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise UnsupportedModelError(
            "the model writes NaN or infinite logits, so it cannot serve as its own evidence. Load "
            "it in a wider `dtype`, or use `evidence='weights'`."
        ) from error
    finally:
        model.train(training)
    return {key: torch.cat([batch[key] for batch in written]) for key in written[0]}


def _write(model: Any, prompt_ids: Tensor, length: int) -> dict[str, Tensor]:
    """Write one batch."""
    config = model.config.get_text_config()
    ends = getattr(model.generation_config, "eos_token_id", None)
    padding = ends[0] if isinstance(ends, list) else ends
    output = model.generate(
        prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_new_tokens=length - 1,
        max_new_tokens=length - 1,
        pad_token_id=getattr(config, "pad_token_id", None) or padding or 0,
    )
    if model.config.is_encoder_decoder:
        return {"input_ids": prompt_ids, "decoder_input_ids": output}
    return {"input_ids": output}


def _prompt(config: Any, batch: int, length: int, is_encoder_decoder: bool) -> Tensor:
    """Return token ids to start from: one a sequence, or a text for an encoder to read."""
    special = {
        getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad", "decoder_start")
    }
    ids = torch.tensor([i for i in range(int(config.vocab_size)) if i not in special])
    if len(ids) == 0:
        raise InvalidArgumentError("the model's vocabulary holds nothing but special tokens.")
    return ids[torch.randint(len(ids), (batch, length if is_encoder_decoder else 1))]


def _sequences_at_once(model: nn.Module, length: int) -> int:
    """Return how many sequences can be written side by side with at most 4 GB of cached states."""
    config: Any = model.config
    text = config.get_text_config()
    layers = getattr(text, "num_hidden_layers", None) or 12
    width = getattr(text, "hidden_size", None) or 1024
    element = next(model.parameters()).element_size()
    return max(1, min(SEQUENCES, 4 * 2**30 // (2 * layers * width * element * length)))


def split_into(total: int, size: int) -> list[int]:
    """Split `total` into batches of at most `size`."""
    return [min(size, total - start) for start in range(0, total, size)]


def with_progress(batches: Iterable[int], verb: str) -> Iterable[int]:
    """Return `batches` under the progress bar of transformers, which users can switch off."""
    from transformers.utils.logging import tqdm

    shown: Iterable[int] = tqdm(batches, desc=verb, unit="batch")
    return shown
