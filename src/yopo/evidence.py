"""Second moments of hidden units, from text that the model writes itself: no data needed.

Shapes: F rows of an FFN, D model width, T tokens, N sequences, W tokens a sequence.

A hidden unit is an input of the contract matrix. All that selection and restoring need of the units
are means and second moments over tokens, so states are summed up as they come and never stored.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from yopo.adapters import Ffn, norm_gain_and_bias
from yopo.errors import InvalidArgumentError, UnsupportedModelError

SEQUENCES, LENGTH = 128, 256
"""How much text a model writes: sequences, and tokens in each."""

_ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation", "intermediate_act_fn")
_BATCH = 16


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Hold what is known of the hidden units of one FFN.

    Attributes:
        second_FF: Mean of hᵀh over tokens, float64.
        mean_F: Mean of h over tokens, float64.
        tokens: How many tokens were seen.
    """

    second_FF: Tensor
    mean_F: Tensor
    tokens: int

    def covariance(self) -> Tensor:
        """Return the covariance of h, `(F, F)` in float64."""
        return self.second_FF - torch.outer(self.mean_F, self.mean_F)


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
            batches = _batches(sequences, _sequences_at_once(model, length))
            for batch in _with_progress(batches, "write"):
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


def read_moments(
    model: nn.Module, ffns: Sequence[Ffn], inputs: dict[str, Tensor]
) -> dict[str, Moments]:
    """Run `model` on `inputs` and return the moments of the hidden units of `ffns`, by name.

    Args:
        model: The model that holds `ffns`.
        ffns: FFNs whose moments fit into memory together: F² numbers each.
        inputs: Keyword arguments of the model, batch first.
    """
    sums = {ffn.name: _Sums.zeros(ffn) for ffn in ffns}
    prefix = getattr(model, "base_model_prefix", "")
    if prefix and all(ffn.path.startswith(f"{prefix}.") for ffn in ffns):
        model = model.get_submodule(prefix)  # the head costs most of a pass and holds no FFN
    device = next(model.parameters()).device
    rows = len(next(iter(inputs.values())))
    training = model.training
    try:
        model.eval()
        with _eager_experts(model), torch.no_grad(), _Watch(ffns, sums):
            for start in _with_progress(range(0, rows, _BATCH), "read"):
                batch = {key: value[start : start + _BATCH] for key, value in inputs.items()}
                model(**{key: value.to(device) for key, value in batch.items()}, use_cache=False)
    finally:
        model.train(training)
    return {name: total.moments() for name, total in sums.items()}


def imagine_moments(model: nn.Module, ffn: Ffn, *, tokens: int, seed: int) -> Moments:
    """Return the moments that the hidden units of `ffn` would have for Gaussian inputs.

    Nothing of the model is run but the activation: inputs are normalised Gaussian vectors times
    the gain, plus the bias, of the norm that feeds the FFN.

    Raises:
        UnsupportedModelError: If the activation of the FFN is not found.
    """
    total = _Sums.zeros(ffn)
    width = ffn.expand_weights()[0].shape[1]
    gain_D, bias_D = norm_gain_and_bias(ffn, width)
    generator = torch.Generator().manual_seed(seed)
    for batch in _batches(tokens, 4096):
        noise_TD = torch.randn(batch, width, generator=generator)
        noise_TD /= noise_TD.square().mean(dim=1, keepdim=True).sqrt()
        states_TD = noise_TD * gain_D.cpu() + bias_D.cpu()
        total.add(_hidden_units(model, ffn, states_TD.to(ffn.contract.parameter.device)))
    return total.moments()


class Evidence:
    """Give the moments of the hidden units of any model, by one of three ways.

    Args:
        kind: "self" for text that the model writes itself, "weights" for Gaussian inputs, "auto"
            for the first where the model can write and the second elsewhere; or token ids
            `(N, W)`, which is calibration on data.
        seed: Seed of the text or the inputs.

    Raises:
        InvalidArgumentError: If `kind` is none of these.
    """

    def __init__(self, kind: str | Tensor, *, seed: int) -> None:
        """Check the arguments; nothing is written before it is needed."""
        if isinstance(kind, Tensor):
            if kind.dim() != 2 or kind.dtype != torch.int64 or kind.numel() == 0:
                raise InvalidArgumentError(
                    "`evidence` tokens must be int64 ids of shape (sequences, length), got "
                    f"{kind.dtype} of shape {tuple(kind.shape)}."
                )
        elif kind not in ("auto", "self", "weights"):
            raise InvalidArgumentError(
                f'`evidence` must be "auto", "self", "weights" or token ids, got {kind!r}.'
            )
        self._kind, self._seed = kind, seed
        self._seen: tuple[bytes, dict[str, Moments]] | None = None

    def moments(self, model: nn.Module, ffns: Sequence[Ffn]) -> Iterator[tuple[Ffn, Moments]]:
        """Yield each FFN with its moments, holding no more at once than memory allows.

        Moments that fit into memory together are remembered for models with the same weights.

        Raises:
            UnsupportedModelError: If the model writes NaN, or cannot serve as asked.
        """
        groups = list(_groups(ffns))
        checksum = _checksum(model) if len(groups) == 1 else b""
        if self._seen is not None and self._seen[0] == checksum:
            yield from ((ffn, self._seen[1][ffn.name]) for ffn in ffns)
            return
        for group, found in self._by_group(model, groups):
            if len(groups) == 1:
                self._seen = (checksum, found)
            yield from ((ffn, found[ffn.name]) for ffn in group)

    def _by_group(
        self, model: nn.Module, groups: list[list[Ffn]]
    ) -> Iterator[tuple[list[Ffn], dict[str, Moments]]]:
        kind = self._kind
        if isinstance(kind, str) and kind == "auto":
            kind = "self" if can_write(model) else "weights"
        if isinstance(kind, Tensor):
            inputs = {"input_ids": kind}
        elif kind == "self":
            if not can_write(model):
                raise UnsupportedModelError(
                    f"{type(model).__name__} does not generate text, so it cannot write its own "
                    "evidence. Use the model with its language-model head, or "
                    "`evidence='weights'`."
                )
            inputs = write_tokens(model, seed=self._seed)
        else:
            inputs = {}
        for group in groups:
            if inputs:
                yield group, read_moments(model, group, inputs)
            else:
                tokens = SEQUENCES * LENGTH
                yield (
                    group,
                    {
                        f.name: imagine_moments(model, f, tokens=tokens, seed=self._seed)
                        for f in group
                    },
                )


def _checksum(model: nn.Module) -> bytes:
    """Return a checksum of the class and all weights of `model`."""
    digest = hashlib.blake2b(repr(type(model)).encode(), digest_size=16)
    for parameter in model.parameters():
        numbers = parameter.detach().reshape(-1).view(torch.uint8).cpu().numpy()
        digest.update(numbers.tobytes())
    return digest.digest()


def _groups(ffns: Sequence[Ffn]) -> Iterator[list[Ffn]]:
    """Split `ffns` into runs whose moments take at most a quarter of the machine's memory."""
    budget = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
    group: list[Ffn] = []
    used = 0
    for ffn in ffns:
        size = 8 * ffn.rows**2
        if group and used + size > budget:
            yield group
            group, used = [], 0
        group.append(ffn)
        used += size
    yield group


class _Sums:
    """Sum up hidden units and their products."""

    def __init__(self, second_FF: Tensor, first_F: Tensor) -> None:
        self.second_FF, self.first_F, self.tokens = second_FF, first_F, 0

    @classmethod
    def zeros(cls, ffn: Ffn) -> "_Sums":
        device = ffn.contract.parameter.device
        first_F = torch.zeros(ffn.rows, dtype=torch.float64, device=device)
        return cls(first_F.new_zeros(ffn.rows, ffn.rows), first_F)

    def add(self, hidden_TF: Tensor) -> None:
        hidden_TF = hidden_TF.detach().reshape(-1, hidden_TF.shape[-1]).float()
        self.second_FF += hidden_TF.T @ hidden_TF
        self.first_F += hidden_TF.sum(dim=0)
        self.tokens += len(hidden_TF)

    def moments(self) -> Moments:
        count = max(self.tokens, 1)
        return Moments(self.second_FF / count, self.first_F / count, self.tokens)


class _Watch(TorchFunctionMode):
    """See every product with a contract matrix, wherever a model computes it.

    The factor in front of the matrix is the hidden units. It is looked for by the memory of the
    matrix, so that a `Linear`, a `Conv1D` and one expert's slice of a tensor are the same to it.
    """

    def __init__(self, ffns: Sequence[Ffn], sums: dict[str, _Sums]) -> None:
        super().__init__()
        self._by_storage: dict[int, list[Ffn]] = defaultdict(list)
        self._sums = sums
        for ffn in ffns:
            self._by_storage[ffn.contract.parameter.untyped_storage().data_ptr()].append(ffn)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [value for value in args if isinstance(value, Tensor)]
        for hidden, weight in pairwise(tensors):
            ffns = self._by_storage.get(weight.untyped_storage().data_ptr(), [])
            for ffn in ffns:
                with torch._C.DisableTorchFunctionSubclass():
                    self._see(ffn, hidden, weight)
        return func(*args, **(kwargs or {}))

    def _see(self, ffn: Ffn, hidden: Tensor, weight: Tensor) -> None:
        slot = ffn.contract
        first = slot.read(ffn.rows)
        if weight.dim() == 3 and slot.expert is not None and hidden.dim() == 3:
            self._sums[ffn.name].add(hidden[slot.expert])
        elif weight.dim() == 2 and weight.storage_offset() == first.storage_offset():
            self._sums[ffn.name].add(hidden)


@contextmanager
def _eager_experts(model: nn.Module) -> Iterator[None]:
    """Let experts multiply one at a time, so that each product can be seen."""
    key = "_experts_implementation"
    configs = {id(c): c for m in model.modules() if hasattr(c := getattr(m, "config", None), key)}
    previous = {number: getattr(config, key) for number, config in configs.items()}
    try:
        for config in configs.values():
            setattr(config, key, "eager")
        yield
    finally:
        for number, config in configs.items():
            setattr(config, key, previous[number])


def _hidden_units(model: nn.Module, ffn: Ffn, states_TD: Tensor) -> Tensor:
    """Return the hidden units `(T, F)` of an FFN for given inputs, from its weights."""
    module = model.get_submodule(ffn.path)
    biases = {
        (id(s.module), s.start): s.read(ffn.rows).float() for s in ffn.vectors if "bias" in s.name
    }
    parts = []
    for slot in ffn.expand:
        part_TF = states_TD @ slot.read(ffn.rows).float().T
        parts.append(part_TF + biases.get((id(slot.module), slot.start), 0.0))
    apply_gate = getattr(module, "_apply_gate", None)
    if apply_gate is not None and len(parts) == 2:
        joined = (
            torch.cat(parts, -1) if ffn.expand[1].step == 1 else torch.stack(parts, -1).flatten(-2)
        )
        return apply_gate(joined)  # type: ignore[no-any-return]
    activation = next(
        (found for name in _ACTIVATIONS if callable(found := getattr(module, name, None))), None
    )
    if activation is None:
        raise UnsupportedModelError(
            f"yopo does not find the activation of `{ffn.path}`, so it cannot imagine its hidden "
            "units. Use `evidence='self'`."
        )
    gate_TF = activation(parts[0])
    return gate_TF * parts[1] if len(parts) == 2 else gate_TF  # type: ignore[no-any-return]


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


def _batches(total: int, size: int) -> list[int]:
    """Split `total` into batches of at most `size`."""
    return [min(size, total - start) for start in range(0, total, size)]


def _with_progress(batches: Iterable[int], verb: str) -> Iterable[int]:
    """Return `batches` under the progress bar of transformers, which users can switch off."""
    from transformers.utils.logging import tqdm

    shown: Iterable[int] = tqdm(batches, desc=verb, unit="batch")
    return shown
