"""Pruner-Zero: symbolic pruning metrics over weights, gradients and activations."""

from yopo.symbolic.evaluating import Fitness
from yopo.symbolic.evolution import evolve
from yopo.symbolic.expression import Expression
from yopo.symbolic.fitness import PerplexityFitness
from yopo.symbolic.growing import crossover, mutate, random_expression
from yopo.symbolic.history import Candidate, Evolution
from yopo.symbolic.matrices import sparsity_of
from yopo.symbolic.metric_pruner import MetricPruner
from yopo.symbolic.metrics import METRICS
from yopo.symbolic.names import ROW_TERMINALS, TERMINALS, WEIGHT_TERMINALS
from yopo.symbolic.primitives import PRIMITIVES
from yopo.symbolic.row_fitness import DivergenceFitness, SpectralFitness
from yopo.symbolic.rows import row_criterion, row_scores
from yopo.symbolic.settings import EvolutionSettings
from yopo.symbolic.simplifying import simplify
from yopo.symbolic.statistics import Statistics, collect_statistics

__all__ = [
    "METRICS",
    "PRIMITIVES",
    "ROW_TERMINALS",
    "TERMINALS",
    "WEIGHT_TERMINALS",
    "Candidate",
    "DivergenceFitness",
    "Evolution",
    "EvolutionSettings",
    "Expression",
    "Fitness",
    "MetricPruner",
    "PerplexityFitness",
    "SpectralFitness",
    "Statistics",
    "collect_statistics",
    "crossover",
    "evolve",
    "mutate",
    "random_expression",
    "row_criterion",
    "row_scores",
    "simplify",
    "sparsity_of",
]
