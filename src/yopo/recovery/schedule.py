"""How many windows are seen at a time, by each rank, and for how many steps."""

import math
from dataclasses import dataclass
from typing import Self

from yopo.errors import InvalidArgumentError
from yopo.ranks import rank_and_count
from yopo.recovery.settings import RecoverySettings

_NUMBERS = 2**28
"""Logits of a forward pass: a gigabyte in float32."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Say how many windows are seen at a time, and for how many steps.

    Attributes:
        windows: Windows that are learned from, a multiple of a batch.
        micro: Windows a forward pass of a rank.
        passes: Forward passes of a rank a step.
        steps: Steps of the optimiser.
        every: Steps between two looks at the validation windows.
        warmup: Steps until the rate is at its height.
    """

    windows: int
    micro: int
    passes: int
    steps: int
    every: int
    warmup: int

    @classmethod
    def of(cls, settings: RecoverySettings, *, windows: int, length: int, vocabulary: int) -> Self:
        """Return the schedule that `settings` give for so many windows.

        Raises:
            InvalidArgumentError: If the ranks cannot share a batch evenly.
        """
        _, ranks = rank_and_count()
        batch = min(settings.batch, windows // ranks * ranks)
        if batch == 0 or batch % ranks:
            raise InvalidArgumentError(
                f"`batch={settings.batch}` cannot be shared evenly by {ranks} ranks with {windows} "
                "windows: use a multiple of their number, and more text than that."
            )
        share = batch // ranks
        most = settings.micro_batch or max(1, _NUMBERS // (length * vocabulary))
        micro = max(n for n in range(1, share + 1) if share % n == 0 and n <= most)
        steps = windows // batch * settings.epochs
        warmup = settings.warmup * steps if settings.warmup < 1 else settings.warmup
        return cls(
            windows=windows // batch * batch,
            micro=micro,
            passes=share // micro,
            steps=steps,
            every=settings.evaluate_every or math.ceil(steps / 10),
            warmup=math.ceil(warmup),
        )
