"""Moments of hidden units from weights alone: inputs are imagined, and the model is not run.

Shapes: F rows of an FFN, D model width, T tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from yopo.adapters import Ffn, find_ffns
from yopo.errors import UnsupportedModelError
from yopo.moments import Moments, MomentSums
from yopo.plan import stack_and_layer

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


@torch.no_grad()
def imagine_moments(
    model: nn.Module, ffns: Sequence[Ffn], *, tokens: int, seed: int
) -> dict[str, Moments]:
    """Return the moments that the hidden units of `ffns` would have, by name, from weights alone.

    Half of the inputs are what the residual stream would be without attention: embeddings of
    tokens, to which every layer adds what its FFN puts out. Tokens follow Zipf's law, for
    vocabularies list the frequent ones first. The other half are Gaussian, and stand for whatever
    attention brings. All go through the norm in front of the FFN. Where there is no table of
    embeddings, as in front of images, the stream starts as Gaussian too.

    Args:
        model: The model that holds `ffns`.
        ffns: FFNs whose moments fit into memory together: F² numbers each.
        tokens: How many inputs to imagine, T at least 2.
        seed: Seed of tokens and noise.

    Raises:
        UnsupportedModelError: If the activation of an FFN is not found.
    """
    sums = {ffn.name: MomentSums.zeros(ffn) for ffn in ffns}
    walk = [ffn for ffn in find_ffns(model, prove_unknown=False) if ffn.known or ffn.name in sums]
    last = max(number for number, ffn in enumerate(walk) if ffn.name in sums)
    streams: dict[str, Tensor] = {}
    for (stack, _), layer in groupby(walk[: last + 1], key=stack_and_layer):
        members = list(layer)
        if stack not in streams:
            streams[stack] = _embeddings(model, members[0], tokens // 2, seed)
        added = [_imagine(model, ffn, streams[stack], sums.get(ffn.name), seed) for ffn in members]
        experts = sum("expert" in ffn.name for ffn in members)
        for ffn, output_TD in zip(members, added, strict=True):
            streams[stack] += output_TD / (experts if "expert" in ffn.name else 1)
    return {name: total.moments() for name, total in sums.items()}


def _imagine(
    model: nn.Module, ffn: Ffn, stream_TD: Tensor, sums: MomentSums | None, seed: int
) -> Tensor:
    """Return what `ffn` adds to the stream, having summed up its hidden units on all inputs."""
    device = ffn.contract.parameter.device
    contract_FD, bias_D = ffn.contract_weight().float(), ffn.contract_bias()
    generator = torch.Generator().manual_seed(seed)
    outputs = []
    for part_TD in torch.split(stream_TD, _BATCH):
        hidden_TF = _hidden_units(model, ffn, _normed(ffn, part_TD.to(device)))
        output_TD = hidden_TF @ contract_FD
        outputs.append(output_TD if bias_D is None else output_TD + bias_D)
        if sums is not None:
            sums.add(hidden_TF)
            noise_TD = torch.randn(part_TD.shape, generator=generator, device="cpu")
            sums.add(_hidden_units(model, ffn, _normed(ffn, noise_TD.to(device))))
    return torch.cat(outputs).to(stream_TD.device)


def _embeddings(model: nn.Module, ffn: Ffn, tokens: int, seed: int) -> Tensor:
    """Return embeddings `(T, D)` of tokens for the stack of layers that begins with `ffn`."""
    width = ffn.expand_weights()[0].shape[1]
    generator = torch.Generator().manual_seed(seed)
    table = _embedding_table(model, ffn.path)
    if table is None or table.weight.is_meta or table.embedding_dim != width:
        return torch.randn(tokens, width, generator=generator, device="cpu")
    ranks_V = torch.arange(table.num_embeddings, device="cpu")
    ids_T = torch.multinomial(
        1 / (ranks_V + _ZIPF_SHIFT), tokens, replacement=True, generator=generator
    )
    states_TD: Tensor = table(ids_T.to(table.weight.device)).float()
    return states_TD


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


def _normed(ffn: Ffn, states_TD: Tensor) -> Tensor:
    """Return `states_TD` behind the norm in front of `ffn`, float32."""
    norm = ffn.norm
    if norm is None or any(parameter.is_meta for parameter in norm.parameters()):
        size_T1 = states_TD.square().mean(dim=1, keepdim=True).sqrt()
        return states_TD / size_T1.clamp_min(torch.finfo(torch.float32).tiny)
    weight: Tensor = next(norm.parameters(), states_TD)
    normed_TD: Tensor = norm(states_TD.to(weight.device, weight.dtype))
    return normed_TD.to(states_TD.device, torch.float32)


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
