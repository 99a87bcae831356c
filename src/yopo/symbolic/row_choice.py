"""Which rows of a model a symbolic metric keeps.

Shapes: K kept rows.

Whatever is measured of a metric looks at the rows that it keeps and at nothing else, so the hash of
those, and not of the formula, tells two metrics apart.
"""

import hashlib
from collections.abc import Mapping

from torch import Tensor, nn

from yopo.adapters import check_weights, find_ffns
from yopo.errors import InvalidArgumentError
from yopo.evidence import checksum_of
from yopo.plan import MultipleOf, plan_widths
from yopo.sampling import best_rows
from yopo.symbolic.expression import Expression
from yopo.symbolic.rows import (
    SMALL_TERMINALS,
    Aggregate,
    aggregated,
    check_aggregate,
    check_row_terminals,
    row_terminals,
    scores_fault,
)


class RowChoice:
    """Choose the rows of each FFN of a model that an expression scores highest.

    Args:
        model: The dense model.
        ratio: Share of the rows that is removed, in (0, 1).
        aggregate: As for `row_scores`.
        multiple_of: As for `PolicyPruner`.

    Attributes:
        ffns: The FFNs of the model.
        fingerprint: The model, the ratio, and whatever else decides which rows are kept.

    Raises:
        UnsupportedModelError: If the model cannot be pruned.
        InvalidArgumentError: If an argument is outside its range, or the ratio removes nothing.
    """

    def __init__(
        self, model: nn.Module, ratio: float, *, aggregate: Aggregate, multiple_of: MultipleOf
    ) -> None:
        """Find the FFNs and how many rows each of them keeps."""
        check_aggregate(aggregate)
        self.ffns = find_ffns(model)
        check_weights(self.ffns)
        self._widths = plan_widths(self.ffns, ratio, multiple_of=multiple_of)
        if all(self._widths[ffn.name] == ffn.rows for ffn in self.ffns):
            raise InvalidArgumentError(
                f"`ratio={ratio}` removes no row, so all expressions are worth the same. Use a "
                "larger one."
            )
        self._aggregate = aggregate
        self._small = {ffn.name: row_terminals(ffn, SMALL_TERMINALS) for ffn in self.ffns}
        self.fingerprint = (
            f"model={checksum_of(model).hex()}, ratio={ratio}, aggregate={aggregate}, "
            f"multiple_of={multiple_of}"
        )

    def kept(self, expression: Expression) -> Mapping[str, Tensor] | None:
        """Return the kept rows `(K,)` of each FFN by name, None where scores choose nothing.

        Raises:
            InvalidArgumentError: If the expression uses terminals that are none of rows.
        """
        check_row_terminals(expression.terminals)
        kept = {}
        for ffn in self.ffns:
            wide = row_terminals(ffn, expression.terminals - SMALL_TERMINALS)
            try:
                scores_F = aggregated(self._small[ffn.name] | wide, expression, self._aggregate)
            except InvalidArgumentError:  # its matrices are of different widths
                return None
            if scores_fault(scores_F) is not None:
                return None
            kept[ffn.name] = best_rows(scores_F, keep=self._widths[ffn.name])
        return kept

    def signature(self, expression: Expression) -> bytes | None:
        """Return a hash of the kept rows of all FFNs, None where scores choose nothing.

        Raises:
            InvalidArgumentError: If the expression uses terminals that are none of rows.
        """
        kept = self.kept(expression)
        if kept is None:
            return None
        digest = hashlib.blake2b(digest_size=16)
        for kept_K in kept.values():
            digest.update(kept_K.cpu().numpy().tobytes())
        return digest.digest()
