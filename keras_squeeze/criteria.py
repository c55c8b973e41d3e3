"""Criteria of `MagnitudePruning` and `prune_weights`: which weights go first."""

from keras_squeeze.weight_pruning.criteria import (
    LAMP,
    SNIP,
    Criterion,
    GradientCriterion,
    Magnitude,
    Movement,
    Random,
    batch_gradients,
    get,
    loss_gradients,
)

__all__ = [
    "LAMP",
    "SNIP",
    "Criterion",
    "GradientCriterion",
    "Magnitude",
    "Movement",
    "Random",
    "batch_gradients",
    "get",
    "loss_gradients",
]
