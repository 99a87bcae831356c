"""Plots of results, all in one look, for colour-blind readers too.

Each takes a path, whose ending says the format, or a stream, which gets an SVG drawing.
"""

from yopo.plots.canvas import Target
from yopo.plots.evolution import plot_evolution
from yopo.plots.layers import plot_kept_rows, plot_spectra
from yopo.plots.results import plot_perplexities, plot_rewards, plot_speed

__all__ = [
    "Target",
    "plot_evolution",
    "plot_kept_rows",
    "plot_perplexities",
    "plot_rewards",
    "plot_spectra",
    "plot_speed",
]
