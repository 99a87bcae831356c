"""What FFNs read and hold, from weights alone: inputs are imagined, and the model is not run.

Shapes: F rows of an FFN, D model width, T tokens, V vocabulary.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from itertools import groupby
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from yopo.adapters import SOURCES, Ffn, find_ffns
from yopo.errors import UnsupportedModelError
from yopo.moments import Moments, MomentSums
from yopo.plan import stack_and_layer

Found = TypeVar("Found")

_ACTIVATIONS = (
    "act_fn",
    "activation_fn",
    "act",
    "activation",
    "intermediate_act_fn",
    "gelu_impl",
)
_BATCH = 4096
_ZIPF_SHIFT = 100
"""By how much Zipf's law is flattened: special tokens lie in front of the frequent ones."""


def imagine_moments(
    model: nn.Module, ffns: Sequence[Ffn], *, tokens: int, seed: int
) -> dict[str, Moments]:
    """Return the moments that the hidden units of `ffns` would have, by name, from weights alone.

    Half of the inputs are what the residual stream would be without attention, as `walk` gives it.
    The other half are Gaussian, and stand for whatever attention brings. All go through the norm
    in front of the FFN.

    Args:
        model: The model that holds `ffns`.
        ffns: FFNs whose moments fit into memory together: F² numbers each.
        tokens: How many inputs to imagine, T at least 2.
        seed: Seed of tokens and noise.

    Raises:
        UnsupportedModelError: If the activation of an FFN is not found.
    """
    names = {ffn.name for ffn in ffns}

    def visit(ffn: Ffn, stream_TD: Tensor) -> tuple[Tensor, tuple[str, Moments] | None]:
        if ffn.name not in names:
            return _imagine(model, ffn, stream_TD, None, seed), None
        sums = MomentSums.zeros(ffn)
        return _imagine(model, ffn, stream_TD, sums, seed), (ffn.name, sums.moments())

    return dict(walk(model, names, visit, tokens=tokens // 2, seed=seed))


def walk(
    model: nn.Module,
    names: Collection[str],
    visit: Callable[[Ffn, Tensor], tuple[Tensor, Found | None]],
    *,
    tokens: int,
    seed: int,
    stratified: bool = False,
) -> Iterator[Found]:
    """Walk through the layers as the residual stream would without attention.

    The stream begins as embeddings of tokens, and every layer adds what its FFN puts out. Tokens
    follow Zipf's law, for vocabularies list the frequent ones first. Where there is no table of
    embeddings, as in front of images, the stream begins as Gaussian.

    Args:
        model: The model, in memory or a skeleton whose weights are found through `SOURCES`.
        names: FFNs that are wanted; what comes after the last of them is not visited.
        visit: From an FFN, loaded, and the stream in front of its norm `(T, D)`, which it leaves as
            it is, to what the FFN puts out `(T, D)` and what else is found, if anything.
        tokens: Inputs in the stream, T at least 1.
        seed: Seed of the tokens.
        stratified: Whether each token comes as often as its share says, give or take two, in random
            order, instead of each input being drawn on its own.

    Yields:
        What `visit` finds, unless it is None. It is not held on to.
    """
    ffns = [ffn for ffn in find_ffns(model, prove_unknown=False) if ffn.known or ffn.name in names]
    last = max((number for number, ffn in enumerate(ffns) if ffn.name in names), default=-1)
    streams: dict[str, Tensor] = {}
    for (stack, _), layer in groupby(ffns[: last + 1], key=stack_and_layer):
        members = list(layer)
        if stack not in streams:
            streams[stack] = _embeddings(model, members[0], tokens, seed, stratified)
        stream_TD = streams[stack]
        experts = sum("expert" in ffn.name for ffn in members)
        after_TD = stream_TD.clone() if len(members) > 1 else stream_TD  # all read the same
        for ffn in members:
            with torch.no_grad(), ffn.loaded():
                output_TD, found = visit(ffn, stream_TD)
            after_TD += output_TD.to(after_TD.device) / (experts if "expert" in ffn.name else 1)
            del output_TD
            if found is not None:
                yield found
                del found
        streams[stack] = after_TD


def _imagine(
    model: nn.Module, ffn: Ffn, stream_TD: Tensor, sums: MomentSums | None, seed: int
) -> Tensor:
    """Return what `ffn` adds to the stream, having summed up its hidden units on all inputs."""
    device = ffn.device
    contract_FD, bias_D = ffn.contract_weight().float(), ffn.contract_bias()
    generator = torch.Generator().manual_seed(seed)
    outputs = []
    for part_TD in torch.split(stream_TD, _BATCH):
        hidden_TF = hidden_units(model, ffn, normed(ffn, part_TD.to(device)))
        output_TD = hidden_TF @ contract_FD
        outputs.append(output_TD if bias_D is None else output_TD + bias_D)
        if sums is not None:
            sums.add(hidden_TF)
            noise_TD = torch.randn(part_TD.shape, generator=generator, device="cpu")
            sums.add(hidden_units(model, ffn, normed(ffn, noise_TD.to(device))))
    return torch.cat(outputs)


@torch.no_grad()
def _embeddings(model: nn.Module, ffn: Ffn, tokens: int, seed: int, stratified: bool) -> Tensor:
    """Return embeddings `(T, D)` of tokens for the stack of layers that begins with `ffn`."""
    width = ffn.expand_weights()[0].shape[1]
    generator = torch.Generator().manual_seed(seed)
    table, load = _embedding_table(model, ffn.path), SOURCES.get(model)
    is_there = table is not None and (load is not None or not table.weight.is_meta)
    if table is None or not is_there or table.embedding_dim != width:
        return torch.randn(tokens, width, generator=generator, device="cpu")
    draw = _stratified_tokens if stratified else _drawn_tokens
    ids_T = draw(table.num_embeddings, tokens, generator)
    with load(list(table.modules())) if load is not None else nullcontext():
        states_TD: Tensor = table(ids_T.to(table.weight.device)).float()
    return states_TD


def _drawn_tokens(vocabulary: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Return tokens `(T,)`, each drawn by Zipf's law on its own."""
    ranks_V = torch.arange(vocabulary, device="cpu")
    shares_V = 1 / (ranks_V + _ZIPF_SHIFT)
    return torch.multinomial(shares_V, tokens, replacement=True, generator=generator)


def _stratified_tokens(vocabulary: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Return tokens `(T,)`, one from each of T equal slices of Zipf's law, in random order."""
    ranks_V = torch.arange(vocabulary, dtype=torch.float64, device="cpu")
    up_to_V = (1 / (ranks_V + _ZIPF_SHIFT)).cumsum(dim=0)
    place_T = torch.rand(tokens, generator=generator, dtype=torch.float64, device="cpu")
    place_T = (torch.arange(tokens, device="cpu") + place_T) / tokens * up_to_V[-1]
    ids_T = torch.searchsorted(up_to_V, place_T).clamp_max(vocabulary - 1)
    return ids_T[torch.randperm(tokens, generator=generator, device="cpu")]


def _embedding_table(model: nn.Module, path: str) -> nn.Embedding | None:
    """Return the input embeddings of the innermost model around the module at `path`."""
    parts = path.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        holder: Any = model.get_submodule(".".join(parts[:depth]))
        if hasattr(holder, "get_input_embeddings"):
            try:
                table = holder.get_input_embeddings()
            except (AttributeError, NotImplementedError):
                continue
            return table if isinstance(table, nn.Embedding) else None
    return None


def normed(ffn: Ffn, states_TD: Tensor) -> Tensor:
    """Return `states_TD` behind the norm in front of `ffn`, float32."""
    norm = ffn.norm
    if norm is None or any(parameter.is_meta for parameter in norm.parameters()):
        size_T1 = states_TD.square().mean(dim=1, keepdim=True).sqrt()
        return states_TD / size_T1.clamp_min(torch.finfo(torch.float32).tiny)
    weight: Tensor = next(norm.parameters(), states_TD)
    normed_TD: Tensor = norm(states_TD.to(weight.device, weight.dtype))
    return normed_TD.to(states_TD.device, torch.float32)


def hidden_units(model: nn.Module, ffn: Ffn, states_TD: Tensor) -> Tensor:
    """Return the hidden units `(T, F)` of an FFN for given inputs, from its weights.

    Args:
        model: The model that holds `ffn`.
        ffn: The FFN, loaded.
        states_TD: What it reads, behind the norm, in float32 where its weights lie.

    Raises:
        UnsupportedModelError: If its activation is not found.
    """
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
    activation = _activation(module)
    if activation is None:
        raise UnsupportedModelError(
            f"yopo does not find the activation of `{ffn.path}`, so it cannot imagine its hidden "
            "units. Pass token ids as `evidence`, or use `reward='spectral', restore=False`."
        )
    gate_TF = activation(parts[0])
    return gate_TF * parts[1] if len(parts) == 2 else gate_TF


def _activation(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Return the activation that `module` holds, under a usual name or as one of torch's own."""
    for holder in module.modules():
        if type(holder).__module__ == "torch.nn.modules.activation":
            return holder
        for name in _ACTIVATIONS:
            found: Callable[[Tensor], Tensor] | None = getattr(holder, name, None)
            if callable(found):
                return found
    return None
