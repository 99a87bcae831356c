"""Choose rows and re-solve the contract matrix from a few inputs, without a matrix of F² numbers.

Shapes: F rows of an FFN, A alive rows, K kept rows, B rows of a block, D model width, T inputs,
S the smaller of T and the rows at hand.

Where T inputs are fewer than the rows, second moments of the hidden units X `(T, F)` have rank T,
and all that elimination and restoring ask of them is in the T × T kernel X Xᵀ. With
P = XᵀX + μI, M = X Xᵀ + μI and what the dropped rows have put out, R = X_C W_C,

    W_K + P⁻¹ X_Kᵀ R = W_K + X_Kᵀ M⁻¹ R,    (P⁻¹)_jj = (1 - x_jᵀ M⁻¹ x_j) / μ,

the push-through identity and Woodbury's. The smaller of both matrices is the one that is built.

The ridge is μ = tr(X Xᵀ) / 4T, a quarter of the mean diagonal of the kernel. As a share of the mean
diagonal of the second moments that is rows / 4T: the fewer the inputs, the stronger, as the
variance of a least-squares fit grows with parameters over samples. No eigenvalue exceeds the
trace, so neither matrix has a condition number above 4T + 1, and float32 serves. For the same
reason 1 - xᵀM⁻¹x is never below 1 / (4T + 1).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from yopo.adapters import Ffn, Slot
from yopo.imagining import hidden_units
from yopo.restore import Restored, tell_not_restored

INPUTS = 4096
"""How many inputs serve, or as many as the model is wide where that is more."""

_BLOCK = 256
"""Rows that are worked on at a time."""

_RIDGE = 1 / 4
"""The ridge as a share of the mean diagonal of the kernel."""

_ROUNDS = 4
_CHECKED = 8
"""One input out of so many is not fitted, and tells whether the fit holds on others."""

_TINY = 1e-30


@torch.no_grad()
def read_units(model: nn.Module, ffn: Ffn, *inputs_TD: Tensor) -> Tensor:
    """Return the hidden units of `ffn`, `(F, T)` in float32 where its weights lie.

    They are computed for some rows at a time, so nothing else is as large as they are.

    Args:
        model: The model that holds `ffn`.
        ffn: The FFN, loaded.
        inputs_TD: What it reads, behind the norm. Several sets come out one behind another, and the
            units of each are the same to the bit whatever else is read.

    Raises:
        UnsupportedModelError: If its activation is not found.
    """
    device = ffn.device
    units_FT = torch.empty(ffn.rows, sum(map(len, inputs_TD)), dtype=torch.float32, device=device)
    sets = torch.split(units_FT, [len(set_TD) for set_TD in inputs_TD], dim=1)
    for set_TD, set_FT in zip(inputs_TD, sets, strict=True):
        states_TD = set_TD.to(device, torch.float32)
        for rows_B in _blocks(torch.arange(ffn.rows, device=device)):
            set_FT[rows_B] = hidden_units(model, _part(ffn, rows_B), states_TD).T
    return units_FT


@torch.no_grad()
def ffn_output(ffn: Ffn, units_FT: Tensor) -> Tensor:
    """Return what `ffn` puts out, `(T, D)` in float32, for hidden units that `read_units` gave.

    Args:
        ffn: The FFN.
        units_FT: Its hidden units.
    """
    output_TD = _output(ffn, units_FT, torch.arange(ffn.rows, device=units_FT.device))
    bias_D = ffn.contract_bias()
    return output_TD if bias_D is None else output_TD.add_(bias_D)


@torch.no_grad()
def choose_rows(ffn: Ffn, units_FT: Tensor, *, keep: int, rounds: int = _ROUNDS) -> Tensor:
    """Return the rows `(K,)` of `ffn` to keep, sorted, on the CPU.

    Each round drops an equal share of the rows that have to go, those whose loss is smallest. The
    loss of a row is by how much dropping it raises the least of ‖X_K Δ - X_C W_C‖² + μ‖Δ‖², what
    restoring minimises: ‖w̃_j‖² / (P⁻¹)_jj - μ‖w_j‖², where w̃_j is column j as re-solved for the
    rows that are alive (Hassibi & Stork 1993, for a whole column as in ZipLM; the second term is
    the ridge on a weight that is no longer there). Where the contract matrix has a bias, units are
    taken around their means. Differs from `elimination.eliminate`: that looks anew after each row,
    while rows that go in one round here do not know of one another; and there the ridge counts as
    evidence, while here rows that are always silent go first.

    Beside the units, memory holds three matrices of T² numbers in float32, or A² where T is not
    smaller than F, and two of T · D.

    Args:
        ffn: The FFN.
        units_FT: Its hidden units, as `read_units` gives them.
        keep: How many rows stay, K in [1, F].
        rounds: How many times losses are looked at.
    """
    rows, weights_FD = ffn.rows, ffn.contract_weight()
    units = _Units.of(ffn, units_FT)
    alive_A = torch.arange(rows, device=units_FT.device)
    is_dual = units.tokens < rows
    square_SS = units.kernel(alive_A) if is_dual else units.gram(alive_A)
    dropped_TD = units_FT.new_zeros(units.tokens, weights_FD.shape[1])
    for step in range(rounds):
        width = rows - (rows - keep) * (step + 1) // rounds
        if width == len(alive_A):
            continue
        loss_A = _losses(ffn, units, alive_A, square_SS, dropped_TD)
        order_A = loss_A.argsort(stable=True)
        gone, left = order_A[:-width], order_A[-width:].sort().values
        for rows_B in _blocks(alive_A[gone]):
            units_BT = units.of_rows(rows_B)
            dropped_TD.addmm_(units_BT.T, weights_FD[rows_B].float())
            if is_dual:
                square_SS.addmm_(units_BT.T, units_BT, alpha=-1)
        if not is_dual:
            square_SS = square_SS.index_select(0, left).index_select(1, left)
        alive_A = alive_A[left]
    return alive_A.cpu()


@torch.no_grad()
def restore_units(ffn: Ffn, units_FT: Tensor, *, kept_K: Tensor) -> Restored:
    """Return the contract matrix of the kept rows that best repeats the output of all rows.

    W_K + (X_KᵀX_K + μI)⁻¹ X_KᵀX_C W_C, fitted on seven of eight inputs, in the order in which they
    come. Where there is a bias, units are taken around their means and the bias absorbs those. Both
    errors are measured on the inputs that were not fitted (below eight inputs, on all), with
    weights rounded to the dtype of the parameters; should the solution not beat the weights as
    they are, those are returned, and the log says so.

    Differs from `restore.restore_contract`: the ridge, and the inputs that are not fitted.

    Args:
        ffn: The FFN.
        units_FT: Its hidden units, as `read_units` gives them.
        kept_K: Rows that stay, sorted.
    """
    tokens_T = torch.arange(units_FT.shape[1], device=units_FT.device)
    is_checked_T = tokens_T % _CHECKED == _CHECKED - 1
    fitted = tokens_T[~is_checked_T]
    units = _Units.of(ffn, units_FT, tokens=fitted)
    kept_K = kept_K.to(units_FT.device)
    is_dropped_F = torch.ones(ffn.rows, dtype=torch.bool, device=units_FT.device)
    dropped_C = is_dropped_F.index_fill_(0, kept_K, False).nonzero()[:, 0]
    solved_KD, mean_D = _solved(ffn, units, kept_K, dropped_C)
    bias_D, new_bias_D = ffn.contract_bias(), None
    if bias_D is not None and mean_D is not None:
        new_bias_D = (bias_D.float() + mean_D).to(bias_D.dtype)
    checked = tokens_T[is_checked_T] if is_checked_T.any() else fitted
    checked_FT = units_FT.index_select(1, checked)
    lost_TD = _output(ffn, checked_FT, dropped_C)
    total = (lost_TD + _output(ffn, checked_FT, kept_K)).square().sum().clamp_min(_TINY)
    before = float(lost_TD.square().sum() / total)
    for kept_B, places_B in zip(_blocks(kept_K), _blocks(_numbers(kept_K)), strict=True):
        change_BD = solved_KD[places_B].float() - ffn.contract_weight()[kept_B].float()
        lost_TD.addmm_(checked_FT[kept_B].T, change_BD, alpha=-1)
    if bias_D is not None and new_bias_D is not None:
        lost_TD -= new_bias_D.float() - bias_D.float()
    after = float(lost_TD.square().sum() / total)
    if not after < before:
        tell_not_restored(ffn.name, before)
        bias_D = None if bias_D is None else bias_D.clone()
        return Restored(ffn.contract_weight()[kept_K], bias_D, before, before)
    return Restored(solved_KD, new_bias_D, after, before)


@dataclass(frozen=True, slots=True, eq=False)
class _Units:
    """Give hidden units of some rows on chosen inputs, around their means behind a bias."""

    units_FT: Tensor
    mean_F: Tensor | None
    chosen: Tensor | None

    @classmethod
    def of(cls, ffn: Ffn, units_FT: Tensor, *, tokens: Tensor | None = None) -> "_Units":
        if ffn.contract_bias() is None:
            return cls(units_FT, None, tokens)
        plain = cls(units_FT, None, tokens)
        every = torch.arange(ffn.rows, device=units_FT.device)
        means = [plain.of_rows(rows_B).mean(dim=1) for rows_B in _blocks(every)]
        return cls(units_FT, torch.cat(means), tokens)

    @property
    def tokens(self) -> int:
        return self.units_FT.shape[1] if self.chosen is None else len(self.chosen)

    def of_rows(self, rows_B: Tensor) -> Tensor:
        """Return units `(B, T)`, a copy."""
        units_BT = self.units_FT[rows_B]
        if self.chosen is not None:
            units_BT = units_BT.index_select(1, self.chosen)
        return units_BT if self.mean_F is None else units_BT.sub_(self.mean_F[rows_B, None])

    def kernel(self, rows_A: Tensor) -> Tensor:
        """Return X Xᵀ, `(T, T)`."""
        kernel_TT = self.units_FT.new_zeros(self.tokens, self.tokens)
        for rows_B in _blocks(rows_A):
            units_BT = self.of_rows(rows_B)
            kernel_TT.addmm_(units_BT.T, units_BT)
        return kernel_TT

    def gram(self, rows_A: Tensor) -> Tensor:
        """Return XᵀX, `(A, A)`."""
        units_AT = self.of_rows(rows_A)
        return units_AT @ units_AT.T


def _losses(
    ffn: Ffn, units: _Units, alive_A: Tensor, square_SS: Tensor, dropped_TD: Tensor
) -> Tensor:
    """Return by how much dropping each alive row raises what restoring minimises."""
    ridge = _ridge(square_SS, units.tokens)
    inverse_SS = _damped_inverse(square_SS.clone(), ridge)
    weights_FD, losses = ffn.contract_weight(), []
    is_dual = units.tokens < ffn.rows
    for rows_B, change_BD, places_B in _changes(units, alive_A, inverse_SS, dropped_TD, is_dual):
        columns_BD = weights_FD[rows_B].float()
        before_B = columns_BD.square().sum(dim=1)
        after_B = change_BD.add_(columns_BD).square().sum(dim=1)
        if is_dual:
            units_BT = units.of_rows(rows_B)
            left_B = 1 - (units_BT @ inverse_SS).mul_(units_BT).sum(dim=1)
            after_B *= ridge / left_B.clamp_min(1 / (8 * units.tokens))
        else:
            after_B /= inverse_SS.diagonal()[places_B]
        losses.append(after_B - ridge * before_B)
    return torch.cat(losses)


def _solved(
    ffn: Ffn, units: _Units, kept_K: Tensor, dropped_C: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return the re-solved columns in the parameter's dtype, and what the bias has to absorb."""
    weights_FD = ffn.contract_weight()
    dropped_TD = units.units_FT.new_zeros(units.tokens, weights_FD.shape[1])
    mean_D = None if units.mean_F is None else dropped_TD.new_zeros(dropped_TD.shape[1])
    for rows_B in _blocks(dropped_C):
        columns_BD = weights_FD[rows_B].float()
        dropped_TD.addmm_(units.of_rows(rows_B).T, columns_BD)
        if mean_D is not None and units.mean_F is not None:
            mean_D.addmv_(columns_BD.T, units.mean_F[rows_B])
    is_dual = units.tokens < len(kept_K)
    square_SS = units.kernel(kept_K) if is_dual else units.gram(kept_K)
    inverse_SS = _damped_inverse(square_SS, _ridge(square_SS, units.tokens))
    solved_KD = weights_FD.new_empty(len(kept_K), weights_FD.shape[1])
    for rows_B, change_BD, places_B in _changes(units, kept_K, inverse_SS, dropped_TD, is_dual):
        columns_BD = weights_FD[rows_B].float()
        rounded_BD = (columns_BD + change_BD).to(solved_KD.dtype)
        solved_KD[places_B] = rounded_BD
        if mean_D is not None and units.mean_F is not None:
            mean_D.addmv_((columns_BD - rounded_BD.float()).T, units.mean_F[rows_B])
    return solved_KD, mean_D


def _changes(
    units: _Units, rows_A: Tensor, inverse_SS: Tensor, dropped_TD: Tensor, is_dual: bool
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield blocks of rows, the change of their columns that restoring makes, and their places."""
    if is_dual:
        weights_SD = inverse_SS @ dropped_TD
    else:
        weights_SD = torch.cat([units.of_rows(rows_B) @ dropped_TD for rows_B in _blocks(rows_A)])
    for rows_B, places_B in zip(_blocks(rows_A), _blocks(_numbers(rows_A)), strict=True):
        left_BS = units.of_rows(rows_B) if is_dual else inverse_SS[places_B]
        yield rows_B, left_BS @ weights_SD, places_B


def _ridge(square_SS: Tensor, tokens: int) -> Tensor:
    return (_RIDGE * square_SS.diagonal().sum() / max(tokens, 1)).clamp_min(_TINY)


def _damped_inverse(square_SS: Tensor, ridge: Tensor) -> Tensor:
    """Return the inverse of a matrix of products plus a ridge; the matrix is used up."""
    square_SS.diagonal().add_(ridge)
    information = torch.empty(0, dtype=torch.int32, device=square_SS.device)
    torch.linalg.cholesky_ex(square_SS, check_errors=True, out=(square_SS, information))
    return torch.cholesky_inverse(square_SS)


def _output(ffn: Ffn, units_FT: Tensor, rows_A: Tensor) -> Tensor:
    """Return what some rows put out, `(T, D)`, without the bias."""
    weights_FD = ffn.contract_weight()
    output_TD = units_FT.new_zeros(units_FT.shape[1], weights_FD.shape[1])
    for rows_B in _blocks(rows_A):
        output_TD.addmm_(units_FT[rows_B].T, weights_FD[rows_B].float())
    return output_TD


def _part(ffn: Ffn, rows_B: Tensor) -> Ffn:
    """Return a run of rows of `ffn` as an FFN of its own, in the same parameters."""
    first = int(rows_B[0])

    def moved(slots: tuple[Slot, ...]) -> tuple[Slot, ...]:
        return tuple(replace(slot, start=slot.start + slot.step * first) for slot in slots)

    return replace(ffn, rows=len(rows_B), expand=moved(ffn.expand), vectors=moved(ffn.vectors))


def _blocks(rows_A: Tensor) -> tuple[Tensor, ...]:
    return torch.split(rows_A, _BLOCK)


def _numbers(rows_A: Tensor) -> Tensor:
    return torch.arange(len(rows_A), device=rows_A.device)
