"""Decide which rows stay and what the contract matrices become, one FFN at a time.

Shapes: F rows, K kept rows, D model width, T inputs.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from yopo.adapters import Ffn, share_of_zeros
from yopo.allocation import Losses, ffn_losses
from yopo.elimination import ffn_elimination_order
from yopo.evidence import Evidence
from yopo.imagining import normed, walk
from yopo.lean import INPUTS, choose_rows, ffn_output, read_units, restore_units
from yopo.moments import Moments
from yopo.plan import PruningPlan
from yopo.policy import Policy
from yopo.ranks import gather, own
from yopo.restore import Restored, restore_contract
from yopo.sampling import best_rows, rows_drawn_by, uniform_noise
from yopo.scorer import noisy_log_odds
from yopo.writing import with_progress

logger = logging.getLogger(__name__)

Decided = tuple[str, Tensor, Restored | None]
"""The name of an FFN, its kept rows `(K,)`, and its contract matrix where one was asked for."""


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """Hold a plan, and the contract matrices that go with it, by FFN; none where none was asked.

    Attributes:
        plan: Which rows stay.
        restored: The contract matrices.
        ffns: What was decided on.
    """

    plan: PruningPlan
    restored: Mapping[str, Restored]
    ffns: Sequence[Ffn]


def weigh_losses(model: nn.Module, ffns: Sequence[Ffn], evidence: Evidence) -> dict[str, Losses]:
    """Return what the rows of each FFN cost, by name, holding moments no longer than needed."""
    found = []
    for ffn, moments in evidence.moments(model, own(ffns)):
        with ffn.loaded():
            found.append(ffn_losses(ffn, moments))
    return dict(zip((ffn.name for ffn in ffns), gather(found), strict=True))


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
    put_away: Callable[[str, Restored], None] | None = None,
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
        put_away: Gets each re-solved matrix at once, with its FFN's name; none is returned then.
    """
    made = decisions(
        model,
        ffns,
        policy=policy,
        evidence=evidence,
        widths=widths,
        restore=restore,
        generator=generator,
        losses=losses,
    )
    found: dict[str, tuple[Tensor, Restored | None]] = {}
    cut = [ffn.name for ffn in _cut(ffns, widths)]
    mine = own(cut)
    for name, kept_K, new in with_progress(made, "decide", total=len(mine), unit="FFN"):
        if new is not None and put_away is not None:
            put_away(name, new)
        found[name] = kept_K, None if put_away is not None else new
    decided = dict(zip(cut, gather([found[name] for name in mine]), strict=True))
    kept = {
        ffn.name: decided[ffn.name][0]
        if ffn.name in decided
        else torch.arange(ffn.rows, device="cpu")
        for ffn in ffns
    }
    rows = {ffn.name: ffn.rows for ffn in ffns}
    return Decision(
        PruningPlan(kept=kept, rows=rows, ratio=ratio),
        {name: new for name, (_, new) in decided.items() if new is not None},
        ffns,
    )


def decisions(
    model: nn.Module,
    ffns: Sequence[Ffn],
    *,
    policy: Policy,
    evidence: Evidence,
    widths: Mapping[str, int],
    restore: bool,
    generator: torch.Generator | None,
    losses: Mapping[str, Losses] | None = None,
) -> Iterator[Decided]:
    """Yield what `decide` finds for the FFNs of this rank, each as soon as it is decided on.

    What has been yielded is not held on to, so a caller that puts it away needs memory for one FFN.

    Args:
        model: As for `decide`.
        ffns: As for `decide`.
        policy: As for `decide`.
        evidence: As for `decide`.
        widths: As for `decide`.
        restore: As for `decide`.
        generator: As for `decide`.
        losses: As for `decide`.

    Yields:
        The name of an FFN that is cut, its kept rows `(K,)`, sorted, on the CPU, and its contract
        matrix, None where none was asked for.
    """
    cut = _cut(ffns, widths)
    if policy.recipe.method == "lean":
        wanted = {ffn.name: widths[ffn.name] for ffn in own(cut)}
        yield from _decide_lean(model, ffns, wanted, restore=restore, seed=policy.recipe.seed)
        return
    needs_moments = restore or (policy.needs_evidence and losses is None)
    # Every rank draws the noise of all FFNs, and so the same whatever its own are.
    noise = {ffn.name: _noise(ffn, generator) for ffn in cut}
    for ffn, moments in _with_moments(model, own(cut), evidence if needs_moments else None):
        yield _decide_by_policy(
            ffn,
            moments,
            policy=policy,
            keep=widths[ffn.name],
            restore=restore,
            noise_2F=noise[ffn.name],
            known=None if losses is None else losses[ffn.name],
        )


def _decide_by_policy(
    ffn: Ffn,
    moments: Moments | None,
    *,
    policy: Policy,
    keep: int,
    restore: bool,
    noise_2F: Tensor | None,
    known: Losses | None,
) -> Decided:
    """Return the rows that the policy chooses, and the contract matrix by least squares."""
    with ffn.loaded():
        order_F = None
        if policy.needs_evidence and known is not None:
            order_F = known.elimination.order_F
        elif policy.needs_evidence and moments is not None:
            # The closed form keeps the last of the order, however they lie among themselves.
            stops_early = policy.recipe.episodes == 0 and noise_2F is None
            drops = ffn.rows - keep if stops_early else None
            order_F = ffn_elimination_order(ffn, moments, drops=drops)
        with torch.no_grad():
            log_odds_F = policy.log_odds(ffn, order_F)
        kept_K = _choose(policy, log_odds_F, keep, noise_2F)
        restored = None
        if restore and moments is not None:
            _warn_of_zeros(ffn)
            restored = restore_contract(
                moments,
                ffn.contract_weight(),
                ffn.contract_bias(),
                kept_K,
                dtype=ffn.contract.parameter.dtype,
                name=ffn.name,
            )
    return ffn.name, kept_K, restored


def _decide_lean(
    model: nn.Module, ffns: Sequence[Ffn], widths: Mapping[str, int], *, restore: bool, seed: int
) -> Iterator[Decided]:
    """Walk through `ffns`, all of the model, and decide on those that have a width.

    Half of the inputs are what `walk` gives for tokens that come as often as their share says, the
    other half are Gaussian. One FFN at a time is loaded, and nothing of it stays.
    """
    tokens = max(INPUTS, *(ffn.expand_weights()[0].shape[1] for ffn in ffns))

    def visit(ffn: Ffn, stream_TD: Tensor) -> tuple[Tensor, Decided | None]:
        inputs = [stream_TD]
        if ffn.name in widths:
            noise = torch.Generator().manual_seed(seed)
            size = (tokens - len(stream_TD), stream_TD.shape[1])
            inputs.append(torch.randn(size, generator=noise, device="cpu"))
        behind_norm = (normed(ffn, states_TD.to(ffn.device)) for states_TD in inputs)
        units_FT = read_units(model, ffn, *behind_norm)
        output_TD = ffn_output(ffn, units_FT[:, : len(stream_TD)])
        if ffn.name not in widths:
            return output_TD, None
        kept_K = choose_rows(ffn, units_FT, keep=widths[ffn.name])
        if restore:
            _warn_of_zeros(ffn)
        restored = restore_units(ffn, units_FT, kept_K=kept_K) if restore else None
        return output_TD, (ffn.name, kept_K, restored)

    return walk(model, widths, visit, tokens=tokens // 2, seed=seed, stratified=True)


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


def _warn_of_zeros(ffn: Ffn) -> None:
    """Tell whoever prunes a sparse model that re-solving makes it dense."""
    if share := share_of_zeros(ffn):
        logger.warning(
            f"{share:.0%} of the contract matrix of `{ffn.name}` are zeros, which re-solving it "
            "fills. `restore=False` keeps them; or make the model sparse after pruning."
        )


def _cut(ffns: Sequence[Ffn], widths: Mapping[str, int]) -> list[Ffn]:
    return [ffn for ffn in ffns if widths[ffn.name] < ffn.rows]


def _with_moments(
    model: nn.Module, ffns: Sequence[Ffn], evidence: Evidence | None
) -> Iterator[tuple[Ffn, Moments | None]]:
    if evidence is None or not ffns:
        yield from ((ffn, None) for ffn in ffns)
    else:
        yield from evidence.moments(model, ffns)


def _noise(ffn: Ffn, generator: torch.Generator | None) -> Tensor | None:
    """Return the noise `(2, F)` of a draw of rows, None where the preferred ones are taken."""
    return None if generator is None else uniform_noise((2, ffn.rows), generator=generator)


def _choose(policy: Policy, log_odds_F: Tensor, keep: int, noise_2F: Tensor | None) -> Tensor:
    """Return the kept rows: drawn where there is noise, else the preferred ones."""
    if noise_2F is None:
        return best_rows(log_odds_F, keep=keep).cpu()
    if policy.recipe.method == "prunenet":
        log_odds_F = logsigmoid(noisy_log_odds(log_odds_F, noise_2F[0]))
    return rows_drawn_by(noise_2F[1:], log_odds_F, keep=keep)[0].sort().values.cpu()
