"""The table of layouts: under which names models keep the matrices of an FFN.

A layout is a row of names, never a model's name, so one row serves every architecture that keeps
the convention. Sizes decide the rest: a matrix with twice the rows of its partner is a fused pair,
a three-dimensional tensor holds one matrix for each expert.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from yopo.adapters.ffn import Ffn, Slot


@dataclass(frozen=True, slots=True)
class Layout:
    """Name the matrices of one kind of FFN, as paths below the module that holds them.

    Attributes:
        expand: The matrices from d_model to d_ff, the one inside the activation first.
        contract: The matrix back to d_model.
        order: How a fused matrix interleaves its parts: one half after the other, or row by row.
            A module's own `is_concatenated` wins over it.
        known: Whether the row belongs to the built-in table.
    """

    expand: tuple[str, ...]
    contract: str
    order: Literal["halves", "interleaved"] = "halves"
    known: bool = True


LAYOUTS: list[Layout] = [
    Layout(("gate_proj", "up_proj"), "down_proj"),  # LLaMA and its many relatives
    Layout(("gate_up_proj",), "down_proj"),  # Phi-3, GLM; experts of most mixtures
    Layout(("up_proj",), "down_proj"),  # Nemotron, MPT
    Layout(("fc1",), "fc2"),  # OPT, Phi, BART, Whisper, CLIP
    Layout(("fc_in",), "fc_out"),  # GPT-J, CodeGen
    Layout(("c_fc",), "c_proj"),  # GPT-2 (Conv1D), StarCoder 2
    Layout(("dense_h_to_4h",), "dense_4h_to_h"),  # Falcon, GPT-NeoX, BLOOM
    Layout(("intermediate.dense",), "output.dense"),  # BERT, ViT
    Layout(("intermediate_query.dense",), "output_query.dense"),  # Q-Former
    Layout(("layout_intermediate.dense",), "layout_output.dense"),  # LiLT
    Layout(("lang_inter.dense",), "lang_output.dense"),  # LXMERT
    Layout(("visn_inter.dense",), "visn_output.dense"),
    Layout(("intermediate_dense",), "output_dense"),  # wav2vec 2.0 and its relatives
    Layout(("intermediate",), "output"),  # ProphetNet
    Layout(("dense.dense",), "output.dense"),  # Reformer
    Layout(("ffn",), "ffn_output"),  # ALBERT
    Layout(("ffn.0",), "ffn.2"),  # CTRL
    Layout(("ffw_layer_1",), "ffw_layer_2"),  # audio towers of Gemma
    Layout(("layer_1",), "layer_2"),  # XLNet
    Layout(("linear_1",), "linear_2"),  # Funnel
    Layout(("linear1",), "linear2"),  # Parakeet
    Layout(("linear_fc1",), "linear_fc2"),  # vision towers of Qwen-VL
    Layout(("wi_0", "wi_1"), "wo"),  # T5 1.1
    Layout(("wi",), "wo"),  # T5
    Layout(("Wi",), "Wo"),  # ModernBERT
    Layout(("w1", "w3"), "w2"),  # LFM2, experts kept as modules
    Layout(("w1", "v1"), "w2"),  # DBRX
    Layout(("lin1",), "lin2"),  # XLM, DistilBERT
    Layout(("w_in.w_0", "w_in.w_1"), "w_out"),  # CPM-Ant
    Layout(("input_linear",), "output_linear"),  # JetMoE, Granite
    Layout(("proj_up_gate", "proj_up"), "proj_down"),  # xLSTM
]
"""Rows are tried in this order; `register_adapter` puts new ones in front."""

_NORMS = (
    "pre_feedforward_layernorm",
    "pre_ff_layernorm",
    "pre_mlp_layernorm",
    "ffn_norm",
    "feedforward_layernorm",
    "intermediate.LayerNorm",
    "post_attention_layernorm",
    "final_layer_norm",
    "attention.output.LayerNorm",
    "layernorm_after",
    "layer_norm2",
    "layernorm2",
    "layer_norm",
    "norm2",
    "ln_2",
    "input_layernorm",
    "ln_1",
)
"""Where the norm in front of an FFN is found, most telling name first."""


def ffns_of_module(name: str, module: nn.Module, layout: Layout) -> Iterator[Ffn]:
    """Yield the FFNs that `module` holds in the manner of `layout`: none, one, or one an expert."""
    first = layout.contract.partition(".")[0]
    if first not in module._modules and first not in module._parameters:
        return  # most modules and layouts: this has to be quick
    holders = [_tensor(module, path) for path in (*layout.expand, layout.contract)]
    if any(holder is None for holder in holders):
        return
    found = [holder for holder in holders if holder is not None]
    dimensions = {getattr(holder, key).dim() for holder, key in found}
    if dimensions == {3}:
        yield from _expert_ffns(name, module, found, layout)
    elif dimensions == {2} and hasattr(module, "moe_num_experts"):
        yield from _stacked_expert_ffns(name, module, found, layout)
    elif dimensions == {2}:
        yield from _plain_ffn(name, found, layout)


def norm_before(root: nn.Module, path: str) -> nn.Module | None:
    """Return the norm that feeds the FFN held at `path`, searched from there up to its layer."""
    parts = path.split(".")
    for depth in range(len(parts), 0, -1):
        enclosing = root.get_submodule(".".join(parts[:depth]))
        is_post_norm = hasattr(enclosing, "post_feedforward_layernorm")
        for candidate in _NORMS:
            norm = _submodule(enclosing, candidate)
            is_one = norm is not None and not isinstance(norm, nn.ModuleList)
            if is_one and not (is_post_norm and candidate.startswith("post")):
                return norm
        if parts[depth - 1].isdigit() and "expert" not in ".".join(parts[depth - 2 : depth]):
            return None
    return None


def _plain_ffn(name: str, holders: list[tuple[nn.Module, str]], layout: Layout) -> Iterator[Ffn]:
    (*expand_holders, (contract, contract_key)) = holders
    contract_axis = 1 - _output_axis(contract)
    rows = getattr(contract, contract_key).shape[contract_axis]
    expand: list[Slot] = []
    vectors: list[Slot] = []
    for holder, key in expand_holders:
        axis = _output_axis(holder)
        parts = _parts(getattr(holder, key).shape[axis], rows, layout.order, holder)
        if parts is None or len(expand_holders) * len(parts) > 2:
            return
        expand += [Slot(holder, key, axis, *part) for part in parts]
        if getattr(holder, "bias", None) is not None:
            vectors += [Slot(holder, "bias", 0, *part) for part in parts]
    yield Ffn(
        name=name,
        path=name,
        rows=rows,
        expand=tuple(expand),
        contract=Slot(contract, contract_key, contract_axis),
        vectors=tuple(vectors),
        known=layout.known,
    )


def _expert_ffns(
    name: str, module: nn.Module, holders: list[tuple[nn.Module, str]], layout: Layout
) -> Iterator[Ffn]:
    """Yield one FFN for each expert of tensors `(experts, …, …)`."""
    (*expand_holders, (contract, contract_key)) = holders
    down = getattr(contract, contract_key)
    first = getattr(*expand_holders[0])
    # Expand tensors are (E, F, D) and contract tensors (E, D, F), or the other way about; where the
    # module does not say, the axis that both share is d_model, the usual order winning a draw.
    usual = first.shape[2] == down.shape[1] and first.shape[1] % down.shape[2] == 0
    transposed = getattr(module, "is_transposed", not usual)
    row_axis, contract_axis = (1, 0) if transposed else (0, 1)
    rows = down.shape[1 + contract_axis]
    slots: list[tuple[nn.Module, str, int, int, int]] = []
    for holder, key in expand_holders:
        length = getattr(holder, key).shape[1 + row_axis]
        parts = _parts(length, rows, layout.order, module)
        if parts is None or len(expand_holders) * len(parts) > 2:
            return
        slots += [(holder, key, row_axis, *part) for part in parts]
    for expert in range(down.shape[0]):
        expand = tuple(Slot(*slot, expert=expert) for slot in slots)
        vectors = tuple(
            Slot(slot.module, f"{slot.name}_bias", 0, slot.start, slot.step, expert)
            for slot in expand
            if isinstance(getattr(slot.module, f"{slot.name}_bias", None), nn.Parameter)
        )
        contract_slot = Slot(contract, contract_key, contract_axis, expert=expert)
        yield Ffn(
            name=f"{name}.{expert}",
            path=name,
            rows=rows,
            expand=expand,
            contract=contract_slot,
            vectors=vectors,
            known=layout.known,
        )


def _stacked_expert_ffns(
    name: str, module: nn.Module, holders: list[tuple[nn.Module, str]], layout: Layout
) -> Iterator[Ffn]:
    """Yield one FFN for each expert of matrices `(experts · F, D)`, contract matrix included."""
    experts = int(module.moe_num_experts)  # type: ignore[arg-type]
    lengths = {getattr(holder, key).shape[0] for holder, key in holders}
    if len(lengths) != 1 or min(lengths) % experts:
        return
    rows = min(lengths) // experts
    for expert in range(experts):
        *expand, contract = (Slot(holder, key, 0, expert * rows) for holder, key in holders)
        yield Ffn(
            name=f"{name}.{expert}",
            path=name,
            rows=rows,
            expand=tuple(expand),
            contract=contract,
            known=layout.known,
        )


def _parts(length: int, rows: int, order: str, module: nn.Module) -> list[tuple[int, int]] | None:
    """Return `(start, step)` of each matrix that a tensor of `length` rows holds, None if none."""
    if length == rows:
        return [(0, 1)]
    if length != 2 * rows:
        return None
    concatenated = getattr(module, "is_concatenated", order == "halves")
    return [(0, 1), (rows, 1)] if concatenated else [(0, 2), (1, 2)]


def _tensor(module: nn.Module, path: str) -> tuple[nn.Module, str] | None:
    """Return the module and the attribute that hold the matrix at `path` below `module`."""
    parent = _submodule(module, path.rpartition(".")[0]) if "." in path else module
    child = getattr(parent, path.rpartition(".")[2], None) if parent is not None else None
    if isinstance(child, nn.Parameter) and parent is not None:
        return parent, path.rpartition(".")[2]
    if isinstance(child, nn.Module) and isinstance(child._modules.get("linear"), nn.Linear):
        child = child._modules["linear"]  # Gemma clips what goes into some linear maps
    if isinstance(child, nn.Module) and isinstance(getattr(child, "weight", None), Tensor):
        return child, "weight"
    return None


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    for part in path.split("."):
        child = module._modules.get(part)
        if child is None:
            return None
        module = child
    return module


def _output_axis(holder: nn.Module) -> int:
    """Return the axis of a matrix that runs over its outputs: 0, or 1 for GPT-2's `Conv1D`."""
    return 1 if type(holder).__name__ == "Conv1D" else 0
