"""Text that a model writes itself, from token ids alone: no data, no tokenizer, no network.

Three kinds of models write. A decoder goes on from one token. An encoder-decoder does so too, and
then answers what it wrote. A masked language model rewrites noise until it is text.

Shapes: N sequences, W tokens a sequence, B tokens of a block, V vocabulary.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from yopo.errors import UnsupportedModelError, YopoError

Piece = TypeVar("Piece")

SEQUENCES, LENGTH = 128, 256
"""How much text a model writes: sequences, and tokens in each."""

_ROUNDS, _BLOCKS = 2, 6
"""How often a masked language model rewrites every token, and in how many steps each time.

The first tokens are drawn amid noise, hence a second time; a step makes as much noise as a mask.
"""


def positions_of(config: Any) -> int | None:
    """Return how many tokens a model has positions for, None where it knows no limit.

    Args:
        config: Its config.
    """
    longest = int(getattr(config.get_text_config(), "max_position_embeddings", None) or -1)
    return longest if longest > 0 else None  # XLNet says -1


def can_write(model: nn.Module) -> bool:
    """Tell whether `model` can write text: it reads token ids, and a head turns states into them.

    Models without a head, those that classify, and those that see or hear cannot.
    """
    reads_ids = getattr(model, "main_input_name", None) == "input_ids"
    is_here = not any(parameter.is_meta for parameter in model.parameters())
    return reads_ids and is_here and (_generates(model) or _has_head(model))


def write_tokens(
    model: Any, *, sequences: int = SEQUENCES, length: int = LENGTH, seed: int = 0
) -> dict[str, Tensor]:
    """Let `model` write text, and return it as the inputs that make the model read it again.

    Tokens are drawn as the model likes them, at temperature 1. What its config names as a special
    token, such as the end of a text, is never drawn, and its generation config plays no part.

    Args:
        model: A model for which `can_write` holds.
        sequences: How many sequences, N at least 1.
        length: Tokens a sequence, W at least 3; less where the model cannot read as many.
        seed: Seed of the sampling; the global generators are left as they were.

    Returns:
        `input_ids` `(N, W)`, and `decoder_input_ids` for an encoder-decoder.

    Raises:
        UnsupportedModelError: If the model writes NaN or infinity, cannot compute in its dtype or
            generate from token ids alone, or does not say where its decoder begins.
    """
    length = _readable(model, length)
    device = next(model.parameters()).device
    devices = [device] if device.type not in ("cpu", "meta") else []
    write = _generate if _generates(model) else _rewrite
    training = model.training
    written = []
    try:
        model.eval()
        with torch.random.fork_rng(devices=devices), torch.no_grad(), _plain_generation(model):
            torch.manual_seed(seed)
            batches = split_into(sequences, _sequences_at_once(model, length))
            for batch in with_progress(batches, "write"):
                written.append(write(model, _noise(model, (batch, length)).to(device)))
    except RuntimeError as error:
        if "not implemented for 'Half'" not in str(error):
            raise
        raise UnsupportedModelError(
            f"the model cannot be run in float16 on this device ({error}). Load it with "
            "`dtype=torch.float32` or `dtype=torch.bfloat16`."
        ) from error
    finally:
        model.train(training)
    return {key: torch.cat([batch[key] for batch in written]) for key in written[0]}


def _generate(model: Any, noise_NW: Tensor) -> dict[str, Tensor]:
    """Let a model write from left to right, as many tokens as there are in the noise.

    A decoder goes on from the token that begins a text, if the config names one, and one of noise:
    a model that was trained with the former is at a loss without it, one that was not reads on
    from the latter, and by the latter texts differ even where a model has a favourite.
    An encoder reads noise first and then, where it has the decoder's vocabulary, what the decoder
    made of it: text is what encoders are for.
    """
    length = noise_NW.shape[1]
    if not model.config.is_encoder_decoder:
        begin = _named_id(model.config, "bos")
        prompt_NB = noise_NW[:, :1]
        if begin is not None:
            prompt_NB = torch.cat([torch.full_like(prompt_NB, begin), prompt_NB], 1)
        return {"input_ids": _go_on(model, prompt_NB, length - prompt_NB.shape[1])}
    read_NW, written_NW = noise_NW, _go_on(model, noise_NW, length)
    if _words(model.get_encoder()) == _words(model.get_decoder()):
        read_NW = written_NW[:, 1:]
        written_NW = _go_on(model, read_NW, length)
    return {"input_ids": read_NW, "decoder_input_ids": written_NW[:, :-1]}


def _go_on(model: Any, prompt_ids: Tensor, tokens: int) -> Tensor:
    """Write so many tokens after a prompt, or in answer to what an encoder reads."""
    from transformers import LogitsProcessorList

    config = model.generation_config
    config.update(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=tokens)
    config.suppress_tokens = sorted(_special_ids(model.config)) or None
    try:
        written: Tensor = model.generate(
            prompt_ids,
            attention_mask=torch.ones_like(prompt_ids),
            generation_config=config,
            logits_processor=LogitsProcessorList([_checked]),
        )
    except YopoError:
        raise
    except (AttributeError, TypeError, ValueError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot generate from token ids alone ({error}). Use "
            "`evidence='weights'`, or token ids as `evidence`."
        ) from error
    return written


def _rewrite(model: Any, noise_NW: Tensor) -> dict[str, Tensor]:
    """Let a masked language model turn noise into text, by drawing every token anew and anew.

    A block of tokens at random places is replaced by noise and drawn from the model's logits: Gibbs
    sampling. Such models are trained to see through random tokens as well as through masks, and
    the id of the mask is known to the tokenizer alone.
    """
    first = _named_id(model.config, "cls", "bos")
    last = _named_id(model.config, "sep", "eos")
    special = torch.tensor(sorted(_special_ids(model.config)), dtype=torch.int64)
    ids_NW = noise_NW.clone()
    sequences, length = ids_NW.shape
    if first is not None:
        ids_NW[:, 0] = first
    if last is not None:
        ids_NW[:, -1] = last
    inner = length - (first is not None) - (last is not None)
    for _ in range(_ROUNDS):
        places_NW = torch.rand(sequences, inner).argsort(1) + int(first is not None)
        for place_NB in places_NW.to(ids_NW.device).chunk(_BLOCKS, 1):
            ids_NW.scatter_(1, place_NB, _noise(model, place_NB.shape).to(ids_NW.device))
            logits_NWV = model(input_ids=ids_NW)[0]
            at_NBV = place_NB.unsqueeze(-1).expand(-1, -1, logits_NWV.shape[-1])
            logits_NBV = _checked(ids_NW, logits_NWV.gather(1, at_NBV).float())
            logits_NBV[..., special.to(logits_NBV.device)] = -torch.inf
            drawn = torch.multinomial(logits_NBV.softmax(-1).flatten(0, 1), 1)
            ids_NW.scatter_(1, place_NB, drawn.view(place_NB.shape).to(ids_NW.device))
    return {"input_ids": ids_NW}


def _checked(ids: Tensor, logits: Tensor) -> Tensor:
    """Return `logits` if tokens can be drawn from them; an accelerator would not say it so well."""
    if logits.isnan().any() or logits.isposinf().any():
        raise UnsupportedModelError(
            "the model writes NaN or infinite logits, so it cannot serve as its own evidence. Load "
            "it in a wider `dtype`, or use `evidence='weights'`."
        )
    return logits


@contextmanager
def _plain_generation(model: Any) -> Iterator[None]:
    """Lend `model` a generation config that says nothing but where a decoder begins.

    `generate` takes from the model's own whatever it is not told: beams, penalties, endings.
    """
    from transformers import GenerationConfig

    own = getattr(model, "generation_config", None)
    start = getattr(own, "decoder_start_token_id", None)
    if start is None:
        start = _named_id(model.config, "decoder_start", "bos", "pad")
    if start is None and model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            "the config does not name the token with which the decoder begins. Set "
            "`model.config.decoder_start_token_id`."
        )
    try:
        model.generation_config = GenerationConfig(decoder_start_token_id=start)
        yield
    finally:
        model.generation_config = own


def _noise(model: Any, shape: tuple[int, ...]) -> Tensor:
    """Return tokens drawn uniformly from the vocabulary, without those that mean no text."""
    special = _special_ids(model.config)
    words = range(model.config.get_text_config().vocab_size)
    ids = torch.tensor([i for i in words if i not in special])
    return ids[torch.randint(len(ids), shape)]


def _special_ids(config: Any) -> set[int]:
    """Return the ids that the config names, such as those of padding and of images.

    None are where they are the whole vocabulary.
    """
    fields = {**config.to_dict(), **config.get_text_config().to_dict()}
    named = [value for key, value in fields.items() if "_token_i" in key]
    ids = {i for value in named for i in (value if isinstance(value, list) else [value])}
    words = set(range(config.get_text_config().vocab_size))
    return ids & words if words - ids else set()


def _named_id(config: Any, *names: str) -> int | None:
    """Return the id of the first of these tokens that the config names."""
    text = config.get_text_config()
    found = (getattr(text, f"{name}_token_id", None) for name in names)
    return next((i for i in found if isinstance(i, int) and 0 <= i < text.vocab_size), None)


def _has_head(model: Any) -> bool:
    return hasattr(model, "get_output_embeddings") and model.get_output_embeddings() is not None


def _words(model: Any) -> int | None:
    """Return how many tokens `model` has embeddings for, None where it does not say."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    return None if embeddings is None else len(embeddings.weight)


def _readable(model: Any, length: int) -> int:
    """Return `length`, or less where the model cannot read as many tokens.

    RoBERTa and its kin count positions from the padding on.
    """
    longest = positions_of(model.config) or length
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None):
            longest = min(longest, int(module.num_embeddings - module.padding_idx - 1))
    return max(3, min(length, longest))


def _sequences_at_once(model: Any, length: int) -> int:
    """Return how many sequences can be written side by side with at most 4 GB beside the model.

    What is kept of each is states of all layers, or logits and what is drawn from them.
    """
    text = model.config.get_text_config()
    size: int
    if _generates(model):
        layers = getattr(text, "num_hidden_layers", None) or 12
        width = getattr(text, "hidden_size", None) or 1024
        size = 2 * layers * width * next(model.parameters()).element_size()
    else:
        size = 8 * text.vocab_size
    return max(1, min(SEQUENCES, 4 * 2**30 // (size * length)))


def split_into(total: int, size: int) -> list[int]:
    """Split `total` into batches of at most `size`."""
    return [min(size, total - start) for start in range(0, total, size)]


def with_progress(
    pieces: Iterable[Piece], verb: str, *, total: int | None = None, unit: str = "batch"
) -> Iterable[Piece]:
    """Return `pieces` under the progress bar of transformers, which users can switch off."""
    from transformers.utils.logging import tqdm

    shown: Iterable[Piece] = tqdm(pieces, desc=verb, total=total, unit=unit)
    return shown


def _generates(model: Any) -> bool:
    return hasattr(model, "can_generate") and bool(model.can_generate())
