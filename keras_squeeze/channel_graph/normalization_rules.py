"""The rules of normalizations: what their statistics are taken over decides what may go."""

import math
from collections.abc import Callable

import numpy as np

from keras_squeeze.channel_graph.graph import Channels
from keras_squeeze.channel_graph.shape_rules import mixed, registering

NORMALIZATION_RULES: dict[type, Callable] = {}

_rule_for = registering(NORMALIZATION_RULES)


@_rule_for("BatchNormalization")
def batch_normalization(layer, inputs, graph):
    x = inputs[0]
    if x.axis != layer.axis % len(x.shape):
        return mixed(layer, inputs[:1], graph)
    mean_is_offset = layer.gamma is None  # then a channel is zero only where the mean is
    graph.follow(layer.moving_mean, 0, x.ids, "output" if mean_is_offset else "parameter")
    graph.follow(layer.moving_variance, 0, x.ids, "parameter")
    mean = graph.value(layer.moving_mean, x.ids if mean_is_offset else None)
    scale = 1.0 / np.sqrt(graph.value(layer.moving_variance) + layer.epsilon)
    if layer.gamma is not None:
        graph.follow(layer.gamma, 0, x.ids)
        scale = scale * graph.value(layer.gamma, x.ids)
    # A scale of zero makes a constant of anything.
    constants = np.where(scale == 0, 0.0, (x.constants - mean) * scale)
    if layer.beta is not None:
        graph.follow(layer.beta, 0, x.ids)
        constants = constants + graph.value(layer.beta, x.ids)
    return x.with_constants(constants)


@_rule_for("LayerNormalization")
def layer_normalization(layer, inputs, graph):
    """The mean over the channels is another one without a channel, even one that is zero."""
    (x,) = inputs
    axes = [axis % len(x.shape) for axis in np.atleast_1d(layer.axis)]
    if 0 not in axes and x.axis not in axes:  # every channel on its own; what is constant becomes zero, and then beta
        shifted = layer.beta is not None and bool(np.any(graph.value(layer.beta) != 0))
        keeps_mean = getattr(layer, "rms_scaling", False)  # which is deprecated
        return x.unknown() if shifted or keeps_mean else x.with_constants(np.where(np.isnan(x.constants), np.nan, 0.0))
    if not _is_over_channels(layer, x):
        return mixed(layer, inputs, graph)
    if not graph.inexact:
        graph.freeze(x, f"{graph.path} normalizes over it: its statistics would change (allow_inexact=True removes it)")
    else:
        graph.inexact_layers.append(graph.path)
        graph.require_constant(x, True, f"{graph.path} normalizes over it, and it is not zero")
    return _scaled_and_shifted(layer, x.unknown(), graph)


@_rule_for("RMSNormalization")
def rms_normalization(layer, inputs, graph):
    """Channels that are zero add nothing to the sum of squares; that there are fewer of them, scale and epsilon undo.

    `x * s / sqrt(sum / n + e)` is `x * s' / sqrt(sum / m + e')` with `s' = s * sqrt(n / m)` and `e' = e * n / m`.
    """
    (x,) = inputs
    if not _is_over_channels(layer, x):
        return mixed(layer, inputs, graph)
    epsilon, count = layer.epsilon, len(x.ids)
    graph.require_constant(x, True, f"{graph.path} normalizes over it, and it is not zero")
    graph.option(layer, "epsilon", x.ids, lambda kept: epsilon * count / int(np.count_nonzero(kept)))
    graph.rescale(layer.scale, x.ids, lambda kept: math.sqrt(count / int(np.count_nonzero(kept))))
    return _scaled_and_shifted(layer, x.with_constants(np.where(x.constants == 0, 0.0, np.nan)), graph)


@_rule_for("GroupNormalization")
def group_normalization(layer, inputs, graph):
    """Whole groups go: the statistics of the others do not change."""
    (x,) = inputs
    if x.axis != layer.axis % len(x.shape) or layer.groups == 1:
        return mixed(layer, inputs, graph)
    groups = len(x.ids) if layer.groups == -1 else layer.groups
    by_group = x.ids.reshape(groups, -1)
    size = by_group.shape[1]
    for index in range(1, size):
        graph.unite(by_group[:, 0], by_group[:, index])
    graph.option(layer, "groups", x.ids, lambda kept: int(np.count_nonzero(kept)) // size)
    # Channels that are constant and equal to those of their group are normalized to zero.
    constants = x.constants.reshape(groups, -1)
    same = np.all(constants == constants[:, :1], axis=1)
    return _scaled_and_shifted(layer, x.with_constants(np.repeat(np.where(same, 0.0, np.nan), size)), graph)


@_rule_for("UnitNormalization")
def unit_normalization(layer, inputs, graph):
    """Zeros add nothing to a Euclidean norm."""
    (x,) = inputs
    graph.require_constant(x, True, f"{graph.path} normalizes over it, and it is not zero")
    return x.with_constants(np.where(x.constants == 0, 0.0, np.nan))


def _scaled_and_shifted(layer, x: Channels, graph) -> Channels:
    """A normalization's gamma and beta, after what it does to the values."""
    constants = x.constants
    gamma = layer.gamma if hasattr(layer, "gamma") else layer.scale
    if gamma is not None:
        graph.follow(gamma, 0, x.ids)
        constants = np.where(graph.value(gamma, x.ids) == 0, 0.0, constants)
    beta = getattr(layer, "beta", None)
    if beta is not None:
        graph.follow(beta, 0, x.ids)
        constants = constants + graph.value(beta, x.ids)
    return x.with_constants(constants)


def _is_over_channels(layer, x: Channels) -> bool:
    return [axis % len(x.shape) for axis in np.atleast_1d(layer.axis)] == [x.axis]
