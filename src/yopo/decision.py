"""Decide which rows stay and what the contract matrices become, one FFN at a time.

Shapes: F rows, K kept rows, D model width, P features.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from yopo.adapters import Ffn
from yopo.allocation import Losses, ffn_losses
from yopo.elimination import ffn_elimination_order
from yopo.evidence import Evidence
from yopo.moments import Moments
from yopo.plan import PruningPlan
from yopo.policy import Policy
from yopo.restore import Restored, restore_contract
from yopo.sampling import best_rows, draw_rows
from yopo.scorer import noisy_log_odds


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """Hold a plan, and the contract matrices that go with it, by FFN; none where none was asked."""

    plan: PruningPlan
    restored: Mapping[str, Restored]


def weigh_losses(model: nn.Module, ffns: Sequence[Ffn], evidence: Evidence) -> dict[str, Losses]:
    """Return what the rows of each FFN cost, by name, holding moments no longer than needed."""
    return {ffn.name: ffn_losses(ffn, moments) for ffn, moments in evidence.moments(model, ffns)}


def decide(
    model: nn.Module,
    ffns: Sequence[Ffn],
    *,
    policy: Policy,
    evidence: Evidence,
    ratio: float,
    widths: Mapping[str, int],
    restore: bool,
    generator: torch.Generator | None,
    losses: Mapping[str, Losses] | None = None,
) -> Decision:
    """Score the rows of each FFN, choose, and re-solve the contract matrix for the chosen.

    FFNs that keep their width are left alone, and nothing is asked about them.

    Args:
        model: The model that holds `ffns`.
        ffns: What to decide on.
        policy: Scores rows.
        evidence: Gives the moments, where the policy or restoring needs them.
        ratio: The ratio asked for, for the plan's record.
        widths: Rows to keep in each FFN, by name.
        restore: Whether to re-solve contract matrices.
        generator: Source of draws, None to take the rows that the policy prefers.
        losses: What is known already of the elimination of rows, by FFN.
    """
    kept = {ffn.name: torch.arange(ffn.rows, device="cpu") for ffn in ffns}
    restored: dict[str, Restored] = {}
    cut = [ffn for ffn in ffns if widths[ffn.name] < ffn.rows]
    eliminates = policy.needs_evidence
    needs_moments = restore or (eliminates and losses is None)
    # The closed form keeps the last of the order, in whatever order they are among themselves.
    stops_early = policy.recipe.episodes == 0 and generator is None
    for ffn, moments in _with_moments(model, cut, evidence if needs_moments else None):
        order_F = None
        if eliminates and losses is not None:
            order_F = losses[ffn.name].elimination.order_F
        elif eliminates and moments is not None:
            drops = ffn.rows - widths[ffn.name] if stops_early else None
            order_F = ffn_elimination_order(ffn, moments, drops=drops)
        with torch.no_grad():
            log_odds_F = policy.log_odds(ffn, order_F)
        kept[ffn.name] = _choose(policy, log_odds_F, widths[ffn.name], generator)
        if restore and moments is not None:
            restored[ffn.name] = restore_contract(
                moments,
                ffn.contract_weight(),
                ffn.contract_bias(),
                kept[ffn.name],
                dtype=ffn.contract.parameter.dtype,
                name=ffn.name,
            )
    rows = {ffn.name: ffn.rows for ffn in ffns}
    return Decision(PruningPlan(kept=kept, rows=rows, ratio=ratio), restored)


def write_restored(ffns: Sequence[Ffn], restored: Mapping[str, Restored]) -> None:
    """Write re-solved contract matrices into FFNs that have been cut."""
    with torch.no_grad():
        for ffn in ffns:
            if (new := restored.get(ffn.name)) is not None:
                keep = len(new.contract_KD)
                # Experts that lie one after another in a tensor have moved up by what was cut.
                slot = replace(ffn.contract, start=ffn.contract.start * keep // ffn.rows)
                slot.read(keep).copy_(new.contract_KD)
                bias_D = ffn.contract_bias()
                if bias_D is not None and new.bias_D is not None:
                    bias_D.copy_(new.bias_D)


def _with_moments(
    model: nn.Module, ffns: Sequence[Ffn], evidence: Evidence | None
) -> Iterator[tuple[Ffn, Moments | None]]:
    if evidence is None or not ffns:
        yield from ((ffn, None) for ffn in ffns)
    else:
        yield from evidence.moments(model, ffns)


def _choose(
    policy: Policy, log_odds_F: Tensor, keep: int, generator: torch.Generator | None
) -> Tensor:
    """Return the kept rows: drawn where there is a generator, else the preferred ones."""
    if generator is None:
        return best_rows(log_odds_F, keep=keep).cpu()
    if policy.recipe.method == "prunenet":
        log_odds_F = logsigmoid(noisy_log_odds(log_odds_F, generator=generator))
    return draw_rows(log_odds_F, keep=keep, draws=1, generator=generator)[0].sort().values.cpu()
