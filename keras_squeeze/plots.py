"""Pictures of what compression did."""

from keras_squeeze.analysis.plots import (
    Bars,
    Falls,
    FrontPoint,
    plot_bars,
    plot_falls,
    plot_front,
    plot_pruning,
    plot_widths,
)

__all__ = [
    "Bars",
    "Falls",
    "FrontPoint",
    "plot_bars",
    "plot_falls",
    "plot_front",
    "plot_pruning",
    "plot_widths",
]
