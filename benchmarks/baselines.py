"""Criteria of others, written plainly from their sources, to compare with.

Shapes: F rows, D model width, N sequences, W tokens a sequence.

Each scores the rows of one FFN, and every layer loses the same share of its rows, so that a
criterion is compared and not a way to spread the ratio over layers. What looks at real text gets
all of it, as much as `yopo` gets where it is calibrated.

| criterion | source | formula of row j, with g, u, w its gate, up and contract vectors |
|---|---|---|
| MAW (PPM) | OptiPFair 0.4.2, `pruning/mlp_glu.py` | max g + abs(min g) + max u + abs(min u) |
| VOW | the same | var g + var u |
| PON | the same | ‖g‖₁ · ‖u‖₁ |
| L2 | the same | ‖g‖₂ + ‖u‖₂ |
| MAW with text | the same, with a `dataloader` | (m(g) + m(u) + m(w)) · ‖h‖₂ |
| Wanda-sp | FLAP, `lib/prune.py: prune_wanda_sp` | mean of abs(w) · √(mean h²) |
| FLAP | FLAP, `lib/prune.py: prune_flap` | var h · ‖w‖₂² |
| Taylor | LLM-Pruner, `hf_llama_pruner.py` | Σ of abs(θ · ∂loss/∂θ) over all θ in g, u, w |

h is the row's hidden unit over the tokens of the text, m the MAW of a vector as a share of the
largest in its matrix.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import yopo
from yopo.adapters import Ffn, Slot
from yopo.criteria import Criterion

BATCH = 8


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """Hold what text shows of the hidden units of one FFN.

    Attributes:
        mean_F: Mean over tokens.
        second_F: Mean square over tokens.
        norm_F: Euclidean norm over the tokens of a batch, summed over batches.
    """

    mean_F: Tensor
    second_F: Tensor
    norm_F: Tensor


def maw(ffn: Ffn) -> Tensor:
    """Return OptiPFair's maximum absolute weight, which it now calls peak-to-peak magnitude."""
    gate_FD, up_FD = gate_and_up(ffn)
    return _peak_to_peak(gate_FD) + _peak_to_peak(up_FD)


def vow(ffn: Ffn) -> Tensor:
    """Return OptiPFair's variance of weights."""
    gate_FD, up_FD = gate_and_up(ffn)
    return gate_FD.var(dim=1) + up_FD.var(dim=1)


def pon(ffn: Ffn) -> Tensor:
    """Return OptiPFair's product of norms, which are sums of absolute weights."""
    gate_FD, up_FD = gate_and_up(ffn)
    return gate_FD.abs().sum(dim=1) * up_FD.abs().sum(dim=1)


def l2(ffn: Ffn) -> Tensor:
    """Return OptiPFair's sum of Euclidean norms."""
    gate_FD, up_FD = gate_and_up(ffn)
    return gate_FD.square().sum(dim=1).sqrt() + up_FD.square().sum(dim=1).sqrt()


def maw_with_text(seen: dict[str, Seen]) -> Criterion:
    """Return OptiPFair's hybrid of weights and activations (its rendering of CFSP)."""

    def score(ffn: Ffn) -> Tensor:
        matrices = (*gate_and_up(ffn), ffn.contract_weight().float())
        peaks = [_peak_to_peak(matrix_FD) for matrix_FD in matrices]
        shares_F = sum_of(peak_F / (peak_F.max() + 1e-8) for peak_F in peaks)
        return shares_F * seen[ffn.name].norm_F

    return score


def wanda_sp(seen: dict[str, Seen]) -> Criterion:
    """Return Wanda's |weight| · activation norm, averaged over the outputs of a row.

    Differs from the source: it reads layer i behind layers that are cut already, this reads the
    dense model, so that one pass over the text serves all ratios. That does it no harm: measured at
    0.3, 59.33 instead of 59.36 on llama-s, and 1.587 instead of 1.593 on the embedded model.
    """

    def score(ffn: Ffn) -> Tensor:
        weight_FD = ffn.contract_weight().float()
        return weight_FD.abs().mean(dim=1) * seen[ffn.name].second_F.sqrt()

    return score


def fluctuation(seen: dict[str, Seen]) -> Criterion:
    """Return FLAP's weighted input feature variance (WIFV).

    Differs from the source: it sums up variances batch by batch with the mean so far, and leaves
    the first batch out; this is the variance over all tokens.
    """

    def score(ffn: Ffn) -> Tensor:
        found = seen[ffn.name]
        variance_F = found.second_F - found.mean_F.square()
        return variance_F * ffn.contract_weight().float().square().sum(dim=1)

    return score


def prune_as_flap(model: Any, ratio: float, *, seen: dict[str, Seen]) -> None:
    """Cut by fluctuation, and let the bias of the contract matrix stand for the dropped means.

    The ratio is the same in each layer (FLAP's "UL-UM" structure, not its default "AL-AM", which
    standardises scores and compares them over layers) and only FFNs are cut. A contract matrix
    without a bias is given one, which an ordinary checkpoint of most models has no place for.
    """
    plan = yopo.plan_by_criterion(model, ratio, criterion=fluctuation(seen), multiple_of=1)
    ffns = yopo.find_ffns(model)
    means = {}
    for ffn in ffns:
        dropped_F = torch.ones(ffn.rows, dtype=torch.bool)
        dropped_F[plan.kept[ffn.name]] = False
        lost_F = seen[ffn.name].mean_F * dropped_F
        means[ffn.name] = lost_F @ ffn.contract_weight().float()
    yopo.apply_plan(model, plan, ffns=ffns)
    for ffn in ffns:
        mean_D = means[ffn.name].to(ffn.contract.parameter.dtype)
        bias_D = ffn.contract_bias()
        if bias_D is None:
            ffn.contract.module.bias = nn.Parameter(mean_D)
        else:
            bias_D += mean_D


def taylor(model: Any, ids_NW: Tensor) -> Criterion:
    """Return LLM-Pruner's first-order importance of the weights ("param_first", summed up).

    The gradient is that of the mean loss over all of the text; the source takes ten short
    sequences.
    """
    ffns = yopo.find_ffns(model)
    parameters = {id(slot.parameter): slot.parameter for ffn in ffns for slot in _matrices(ffn)}
    gradients = {key: torch.zeros_like(parameter) for key, parameter in parameters.items()}
    for batch_BW in torch.split(ids_NW, BATCH):
        loss = model(input_ids=batch_BW, labels=batch_BW, use_cache=False).loss
        found = torch.autograd.grad(loss, list(parameters.values()))
        for key, gradient in zip(gradients, found, strict=True):
            gradients[key] += gradient
    scores = {}
    for ffn in ffns:
        parts = [_rows_of(slot, gradients[id(slot.parameter)], ffn.rows) for slot in _matrices(ffn)]
        weights = [slot.read(ffn.rows) for slot in _matrices(ffn)]
        products = zip(parts, weights, strict=True)
        scores[ffn.name] = sum_of((g * w).abs().flatten(1).sum(dim=1) for g, w in products)
    return lambda ffn: scores[ffn.name]


def see(model: Any, ids_NW: Tensor) -> dict[str, Seen]:
    """Run `model` on text, and return what it shows of the hidden units of each FFN, by name.

    Raises:
        UnsupportedModelError: If the contract matrices are no modules of their own.
    """
    ffns = yopo.find_ffns(model)
    sums = {ffn.name: torch.zeros(3, ffn.rows, dtype=torch.float64) for ffn in ffns}
    hooks = []
    for ffn in ffns:
        if ffn.contract.expert is not None:
            raise yopo.UnsupportedModelError("experts that share one tensor cannot be watched.")
        watch = partial(_add, sums[ffn.name])
        hooks.append(ffn.contract.module.register_forward_pre_hook(watch))
    try:
        with torch.no_grad():
            for batch_BW in torch.split(ids_NW, BATCH):
                model.base_model(input_ids=batch_BW, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {
        name: Seen(*(row_F.float() for row_F in (mean_F / tokens, second_F / tokens, norm_F)))
        for name, (mean_F, second_F, norm_F) in sums.items()
        if (tokens := ids_NW.numel())
    }


def gate_and_up(ffn: Ffn) -> tuple[Tensor, Tensor]:
    """Return both expand matrices in float32.

    Raises:
        UnsupportedModelError: If there is no gate.
    """
    matrices = ffn.expand_weights()
    if len(matrices) != 2:
        raise yopo.UnsupportedModelError("it needs a gate, which this model does not have.")
    return matrices[0].float(), matrices[1].float()


def sum_of(tensors: Iterable[Tensor]) -> Tensor:
    """Return the sum of tensors of one shape."""
    return torch.stack(list(tensors)).sum(dim=0)


def _add(sums_3F: Tensor, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    hidden_TF = inputs[0].detach().flatten(0, -2).float()
    square_F = hidden_TF.square().sum(dim=0)
    sums_3F += torch.stack([hidden_TF.sum(dim=0), square_F, square_F.sqrt()])


def _peak_to_peak(matrix_FD: Tensor) -> Tensor:
    return matrix_FD.amax(dim=1) + matrix_FD.amin(dim=1).abs()


def _matrices(ffn: Ffn) -> tuple[Slot, ...]:
    return (*ffn.expand, ffn.contract)


def _rows_of(slot: Slot, tensor: Tensor, rows: int) -> Tensor:
    """Return of a tensor shaped like the slot's parameter what belongs to the rows, rows first."""
    part = tensor if slot.expert is None else tensor[slot.expert]
    return part.movedim(slot.axis, 0)[slot.start : slot.start + slot.step * rows : slot.step]


WEIGHTS_ONLY: dict[str, Callable[[Ffn], Tensor]] = {
    "OptiPFair MAW": maw,
    "OptiPFair VOW": vow,
    "OptiPFair PON": pon,
    "OptiPFair L2": l2,
}
