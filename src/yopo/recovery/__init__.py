"""Win back what pruning lost: adapters trained on text, or on what the dense model writes."""

from yopo.recovery.recovering import recover
from yopo.recovery.settings import RecoverySettings

__all__ = ["RecoverySettings", "recover"]
