"""How a pruned model is trained: the paper's settings, the published script's, or one's own."""

from dataclasses import dataclass
from typing import Literal, Self

from yopo.errors import InvalidArgumentError

Targets = Literal["both", "attention", "ffn"]
TARGETS: tuple[Targets, ...] = ("both", "attention", "ffn")

_RATE, _WIDTH = 3e-3, 192
"""The best step size among four, by factors of three, for models of that width."""


@dataclass(frozen=True, slots=True)
class RecoverySettings:
    """Say how adapters are trained.

    The paper gives the rank and the number of samples; what it leaves open is set by what helps
    small trained models (`benchmarks/recovery.py`). AdamW with β₂ = 0.95 and a weight decay of
    0.01, gradients clipped to norm 1 and a rate that falls linearly to 0 are the published
    script's.

    Attributes:
        rank: Rank of the adapters, at least 1.
        alpha: Their weight: what an adapter adds is scaled by `alpha / rank`; positive.
        dropout: Share of an adapter's inputs that are dropped in training, in [0, 1).
        samples: Windows of a text to learn from, at most; the last, if they fill no batch, are left
            out.
        written: Windows that the dense model writes where there is no text, at least 2.
        window: Tokens a window, at least 2; less where the model cannot read as many.
        batch: Windows a step of the optimiser, those of all ranks together.
        epochs: How often each window is seen, at least 1.
        learning_rate: Highest step size, positive; None takes 0.003 · (192 / D)^0.75 for a model
            of width D, which is 0.003 for the small models that it was chosen on and 0.0003, as is
            usual for LoRA, at a width of 4096.
        warmup: Steps until it is reached: a share of all where below 1, else their number.
        evaluate_every: Steps between two looks at the validation windows; None looks ten times.
        patience: Training ends after so many looks without a new best, at least 1.
        micro_batch: Windows a forward pass, at most; None takes as many of a batch as have
            logits of a gigabyte.
        gradient_checkpointing: Whether to compute activations twice instead of keeping them.
        bf16: Whether to compute in bfloat16 where weights are wider.

    Raises:
        InvalidArgumentError: If one is outside its range.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    samples: int = 8000
    written: int = 512
    window: int = 256
    batch: int = 8
    epochs: int = 2
    learning_rate: float | None = None
    warmup: float = 0.05
    evaluate_every: int | None = None
    patience: int = 3
    micro_batch: int | None = None
    gradient_checkpointing: bool = False
    bf16: bool = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        least = {
            "rank": 1,
            "samples": 1,
            "written": 2,
            "window": 2,
            "batch": 1,
            "epochs": 1,
            "evaluate_every": 1,
            "patience": 1,
            "micro_batch": 1,
        }
        for name, bound in least.items():
            value = getattr(self, name)
            if value is None and name in ("evaluate_every", "micro_batch"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < bound:
                raise InvalidArgumentError(
                    f"`{name}` must be a whole number of at least {bound}, got {value!r}."
                )
        for name in ("alpha", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise InvalidArgumentError(f"`{name}` must be positive, got {value}.")
        if not 0 <= self.dropout < 1:
            raise InvalidArgumentError(f"`dropout` must be in [0, 1), got {self.dropout}.")
        if not self.warmup >= 0:
            raise InvalidArgumentError(f"`warmup` must be at least 0, got {self.warmup}.")

    @classmethod
    def published(cls) -> Self:
        """Return what PruneNet's script does, which differs from its paper.

        Its README sets rank, `alpha`, dropout, samples, window, batch and one epoch, with a look
        every 16 steps; rate, 400 steps of warm-up and a patience of 5 are the defaults of the
        SliceGPT script that it builds on. With fewer than 1200 windows the rate never gets to its
        height.
        """
        return cls(
            rank=32,
            alpha=10.0,
            dropout=0.05,
            window=1024,
            batch=3,
            epochs=1,
            learning_rate=2e-4,
            warmup=400,
            evaluate_every=16,
            patience=5,
        )


def rate_for(settings: RecoverySettings, width: int) -> float:
    """Return the highest step size for a model of that width."""
    if settings.learning_rate is not None:
        return settings.learning_rate
    return float(_RATE * (_WIDTH / width) ** 0.75)


def settings_by_name(settings: RecoverySettings | str) -> RecoverySettings:
    """Return `settings`, or those of that name.

    Raises:
        InvalidArgumentError: If there is no such name.
    """
    if isinstance(settings, RecoverySettings):
        return settings
    if settings == "paper":
        return RecoverySettings()
    if settings == "published":
        return RecoverySettings.published()
    raise InvalidArgumentError(
        f'`settings` must be "paper", "published" or a `RecoverySettings`, got {settings!r}.'
    )
