"""Pruner-Zero: symbolic pruning metrics over weights, gradients and activations."""

from yopo.symbolic.expression import TERMINALS, Expression
from yopo.symbolic.primitives import PRIMITIVES

__all__ = ["PRIMITIVES", "TERMINALS", "Expression"]
