"""What each kind of layer does to channels: one small rule per kind. Users register their own.

A rule gets a layer, the `Channels` of its inputs and the `ChannelGraph`. It tells the graph where the layer's weights
hold neurons, and returns the channels of its output. The rules of layers that compute neurons from neurons stand here;
`recurrent_rules.py`, `attention_rules.py`, `normalization_rules.py`, `merge_rules.py` and `shape_rules.py` have others.
"""

from collections.abc import Callable, Sequence

import keras
import numpy as np
from keras.src.applications.convnext import LayerScale, StochasticDepth
from keras.src.applications.inception_resnet_v2 import CustomScaleLayer

from keras_squeeze.channel_graph.attention_rules import ATTENTION_RULES
from keras_squeeze.channel_graph.graph import ChannelGraph, Channels, Read
from keras_squeeze.channel_graph.merge_rules import MERGE_RULES, scaled_sum
from keras_squeeze.channel_graph.normalization_rules import NORMALIZATION_RULES
from keras_squeeze.channel_graph.recurrent_rules import RECURRENT_RULES
from keras_squeeze.channel_graph.shape_rules import (
    SHAPE_RULES,
    along_last_axis,
    mixed,
    registering,
    through_function,
    unchanged,
)
from keras_squeeze.introspection.layer_table import stored_variable

Rule = Callable[[keras.Layer, Sequence[Channels], ChannelGraph], Channels | Sequence[Channels]]

_RULES: dict[type, Rule] = {}
_OF_KERAS = (RECURRENT_RULES, ATTENTION_RULES, NORMALIZATION_RULES, MERGE_RULES, SHAPE_RULES)

_rule_for = registering(_RULES)

_COMPUTES = {
    *("call", "__call__", "build", "convolution_op", "kernel", "activation"),
    *("inner_loop", "get_initial_state", "cell"),
    *("_compute_attention", "_compute_attention_mask", "_calculate_scores", "_apply_scores"),
}
"""A class that defines one of these may compute something else than the class that it derives from."""


def register_channel_rule(layer_class: type, rule: Rule) -> None:
    """Teaches the channel graph a custom layer, so that neurons before, in and behind it can be removed.

    Args:
        layer_class: The layer's class; layers that derive from it follow the rule, too, unless they have a `build` or
            `call` of their own.
        rule: A function `(layer, inputs, graph) -> output`: `inputs` is a list of `Channels`, one for each tensor;
            `output` is a `Channels` or a list of them. It tells the graph what the weights have to do with the
            neurons: `graph.follow(weight, axis, ids)` for a weight with an entry per channel,
            `graph.consume(layer, weight, axis, channels)` and `graph.require_constant(...)` for one that reads them,
            `graph.produce(weight, axis, shape)` for one that computes new ones, `graph.unite(ids, ids)` where two
            channels go together, `graph.freeze(channels, reason)` for those that must stay, and
            `graph.option(layer, "units", ids)` for an entry of the layer's config that counts them.

    Raises:
        TypeError: `layer_class` is not a class of layers, or `rule` cannot be called.

    Example:

    ```python
    class Scale(keras.layers.Layer):           # y = scale * x, one number per channel
        def build(self, shape):
            self.scale = self.add_weight(shape=(shape[-1],), initializer="ones")

        def call(self, x):
            return x * self.scale

    def rule(layer, inputs, graph):
        (x,) = inputs
        graph.follow(layer.scale, 0, x.ids)
        return x.with_constants(x.constants * graph.value(layer.scale, x.ids))

    ks.register_channel_rule(Scale, rule)
    ```
    """
    if not (isinstance(layer_class, type) and issubclass(layer_class, keras.Operation)):
        raise TypeError(f"`layer_class` must be a class of Keras layers. Received: {layer_class!r}")
    if not callable(rule):
        raise TypeError(f"`rule` must be a function (layer, inputs, graph) -> output. Received: {rule!r}")
    _RULES[layer_class] = rule


def find_rule(layer) -> Rule | None:
    """The rule of a layer's class, or of one that it derives from without changing what it computes."""
    for base in type(layer).__mro__:
        rule = next((rules[base] for rules in (_RULES, *_OF_KERAS) if base in rules), None)
        if rule:
            return rule
        if not _COMPUTES.isdisjoint(vars(base)):
            return None
    return None


# Layers that compute neurons from neurons.


@_rule_for("Dense")
def dense(layer, inputs, graph):
    x = along_last_axis(layer, inputs[0], graph)
    if len(x.ids) != layer.kernel.shape[-2]:  # a size that is not known
        return mixed(layer, inputs, graph)
    kernel = stored_variable(layer, "kernel")
    output = _contract(layer, graph, x, kernel, -2, -1, layer.bias, graph.shapes[0], folds=True)
    graph.option(layer, "units", output.ids)
    return _activated(layer, output, graph)


@_rule_for("EinsumDense")
def einsum_dense(layer, inputs, graph):
    (x,) = inputs
    operands, out_letters = layer.equation.replace(" ", "").replace("...", ".").split("->")
    in_letters, kernel_letters = operands.split(",")
    from_end = len(x.shape) - x.axis
    letter = in_letters[-from_end] if from_end <= len(in_letters) else "."
    new = [name for name in out_letters if name in kernel_letters and name not in in_letters]
    if letter not in kernel_letters or letter in out_letters or len(new) != 1 or out_letters[-1] != new[0]:
        return mixed(layer, inputs, graph)
    if layer.bias is not None and layer.bias.shape != (layer.bias.shape[-1],):
        return mixed(layer, inputs, graph)
    in_axis, out_axis = kernel_letters.index(letter), kernel_letters.index(new[0])
    kernel = stored_variable(layer, "kernel")
    output = _contract(layer, graph, x, kernel, in_axis, out_axis, layer.bias, graph.shapes[0], folds=True)
    shape = layer.get_config()["output_shape"]
    graph.option(layer, "output_shape", output.ids, lambda kept: _last_size(shape, kept))
    return _activated(layer, output, graph)


@_rule_for("Conv1D", "Conv2D", "Conv3D")
def convolution(layer, inputs, graph):
    (x,) = inputs
    if not _on_channel_axis(layer, x):
        return mixed(layer, inputs, graph)
    kernel, bias, shape = stored_variable(layer, "kernel"), layer.bias, graph.shapes[0]
    if layer.groups == 1:
        exact = layer.padding == "valid" or all(size == 1 for size in layer.kernel_size)
        output = _contract(layer, graph, x, kernel, -2, -1, bias, shape, folds=exact)
    elif layer.groups == len(x.ids):
        output = _channelwise(graph, x, kernel, -1, len(kernel.shape) - 1, bias, layer)
        graph.option(layer, "groups", x.ids)
    else:
        output = _grouped(layer, graph, x, kernel, bias, shape)
    graph.option(layer, "filters", output.ids)
    return _activated(layer, _moved(output, shape, x.axis), graph)


@_rule_for("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose")
def transposed_convolution(layer, inputs, graph):
    (x,) = inputs
    if not _on_channel_axis(layer, x):
        return mixed(layer, inputs, graph)
    exact = all(size == 1 for size in (*layer.kernel_size, *layer.strides))
    kernel = stored_variable(layer, "kernel")
    output = _contract(layer, graph, x, kernel, -1, -2, layer.bias, graph.shapes[0], folds=exact)
    graph.option(layer, "filters", output.ids)
    return _activated(layer, _moved(output, graph.shapes[0], x.axis), graph)


@_rule_for("DepthwiseConv1D", "DepthwiseConv2D")
def depthwise_convolution(layer, inputs, graph):
    (x,) = inputs
    if not _on_channel_axis(layer, x):
        return mixed(layer, inputs, graph)
    output = _channelwise(graph, x, layer.kernel, -2, len(layer.kernel.shape) - 2, layer.bias, layer)
    return _activated(layer, _moved(output, graph.shapes[0], x.axis), graph)


@_rule_for("SeparableConv1D", "SeparableConv2D")
def separable_convolution(layer, inputs, graph):
    (x,) = inputs
    if not _on_channel_axis(layer, x):
        return mixed(layer, inputs, graph)
    depthwise = layer.depthwise_kernel
    between = _channelwise(graph, x, depthwise, -2, len(depthwise.shape) - 2, None, layer)
    output = _contract(layer, graph, between, layer.pointwise_kernel, -2, -1, layer.bias, graph.shapes[0], folds=True)
    graph.option(layer, "filters", output.ids)
    return _activated(layer, _moved(output, graph.shapes[0], x.axis), graph)


@_rule_for("Embedding")
def embedding(layer, inputs, graph):
    table = stored_variable(layer, "embeddings")
    output = graph.produce(table, -1, graph.shapes[0])
    graph.option(layer, "output_dim", output.ids)
    masked = graph.is_masked(output.ids)
    zero = masked if masked is not None else ~np.any(graph.value(table) != 0, axis=0)
    return output.with_constants(np.where(zero, 0.0, np.nan))


# Layers with a parameter for each channel.


@_rule_for("PReLU")
def parametric_relu(layer, inputs, graph):
    (x,) = inputs
    alpha = layer.alpha
    if x.axis != len(x.shape) - 1 or alpha.shape[-1] != len(x.ids):
        return mixed(layer, inputs, graph)
    graph.follow(alpha, -1, x.ids, "parameter")
    slopes = graph.value(alpha).reshape(-1, len(x.ids))
    shared = np.all(slopes == slopes[:1], axis=0)
    negative = np.where(shared, slopes[0] * x.constants, np.nan)
    return x.with_constants(np.where(np.isnan(x.constants) | (x.constants >= 0), x.constants, negative))


def layer_scale(layer, inputs, graph):
    """ConvNeXt's `LayerScale`: one learned factor per channel."""
    (x,) = inputs
    if x.axis != len(x.shape) - 1:
        return mixed(layer, inputs, graph)
    graph.follow(layer.gamma, 0, x.ids)
    graph.option(layer, "projection_dim", x.ids)
    factor = graph.value(layer.gamma, x.ids)
    return x.with_constants(np.where(factor == 0, 0.0, x.constants * factor))


# The layers of Keras's own models.
_RULES[LayerScale] = layer_scale
_RULES[StochasticDepth] = unchanged
_RULES[CustomScaleLayer] = scaled_sum


# What they share.


def _contract(layer, graph, x: Channels, kernel, in_axis, out_axis, bias, shape, *, folds: bool) -> Channels:
    """`y_j = sum_i x_i * kernel_ij + bias_j`, the sum over kernel positions too.

    `folds`: an input that is constant contributes the same at every position, borders included.
    """
    output = graph.produce(kernel, out_axis, shape)
    graph.consume(layer, kernel, in_axis, x)
    if bias is not None:
        graph.follow(bias, 0, output.ids)
        graph.reads.append(Read(layer, kernel, in_axis, out_axis, bias, x))
    if folds and bias is not None:
        graph.require_constant(x, False, "")
        graph.fold(kernel, in_axis, out_axis, bias, x)
    else:
        lacks = "has no bias" if folds else "reads it with padding"
        graph.require_constant(x, True, f"its output is constant but not zero, and {graph.path} {lacks}")
    return output.with_constants(_contracted_constants(graph, x, kernel, in_axis, out_axis, bias, output, folds))


def _contracted_constants(graph, x, kernel, in_axis, out_axis, bias, output, folds) -> np.ndarray:
    masked = graph.is_masked(output.ids)
    if masked is not None:
        return np.where(masked, 0.0, np.nan)
    size = len(output.ids)
    values = np.moveaxis(np.asarray(graph.value(kernel)), (in_axis, out_axis), (-2, -1))
    values = values.reshape(-1, *values.shape[-2:])
    varying = np.isnan(x.constants) if folds else np.isnan(x.constants) | (x.constants != 0)
    constant = ~np.any(values[:, varying] != 0, axis=(0, 1)) if varying.any() else np.ones(size, bool)
    result = np.full(size, np.nan)
    if constant.any():
        constants = np.where(varying, 0.0, np.nan_to_num(x.constants))
        result[constant] = np.einsum("kio,i->o", values[..., constant], constants)
        if bias is not None:
            result[constant] += graph.value(bias)[constant]
    return result


def _channelwise(graph, x: Channels, kernel, axis: int, channel_axis: int, bias, layer) -> Channels:
    """Every channel is convolved on its own, into one or more outputs that live and die with it.

    `axis`: the kernel axis that the neurons lie along: that of the channels, or, in a convolution of as many groups as
    channels, that of the outputs.
    """
    values = graph.value(kernel)
    outputs = values.shape[-1] // len(x.ids) if axis == -1 else values.shape[-1]
    ids = np.repeat(x.ids, outputs)
    graph.follow(kernel, axis, ids if axis == -1 else x.ids)
    graph.observe(layer, x)
    values = values.reshape(-1, len(ids))
    # In a masked neuron kernel and bias are zero; the input is too, which is all that is asked.
    entering = np.repeat(x.constants, outputs)
    inside = layer.padding == "valid" or all(size == 1 for size in layer.kernel_size)
    sums = entering * values.sum(axis=0)
    constants = np.where(entering == 0, 0.0, sums if inside else np.nan)
    constants = np.where(np.any(values != 0, axis=0), constants, 0.0)
    if bias is not None:
        graph.follow(bias, 0, ids)
        constants = constants + graph.value(bias, ids)
    return Channels(x.shape, x.axis, ids, constants)


def _grouped(layer, graph, x: Channels, kernel, bias, shape) -> Channels:
    """A convolution in groups: the j-th channels of all groups go together, so that the groups stay equal."""
    output = graph.produce(kernel, -1, shape)
    for ids in (x.ids, output.ids):
        by_group = ids.reshape(layer.groups, -1)
        for group in by_group[1:]:
            graph.unite(by_group[0], group)
    graph.follow(kernel, -2, x.ids[: len(x.ids) // layer.groups], "input")
    graph.observe(layer, x)
    graph.require_constant(x, True, f"its output is constant but not zero, and {graph.path} reads it in groups")
    masked = graph.is_masked(output.ids)
    values = graph.value(kernel)
    zero = masked if masked is not None else ~np.any(values.reshape(-1, values.shape[-1]) != 0, axis=0)
    constants = np.where(zero, 0.0, np.nan)
    if bias is not None:
        graph.follow(bias, 0, output.ids)
        constants = constants + graph.value(bias, output.ids)
    return output.with_constants(constants)


def _activated(layer, x: Channels, graph) -> Channels:
    return through_function(layer.activation, x, graph)


def _moved(x: Channels, shape, axis: int) -> Channels:
    return Channels(tuple(shape), axis, x.ids, x.constants)


def _on_channel_axis(layer, x: Channels) -> bool:
    return x.axis == (len(x.shape) - 1 if layer.data_format == "channels_last" else 1)


def _last_size(shape, kept):
    count = int(np.count_nonzero(kept))
    return [*shape[:-1], count] if isinstance(shape, (list, tuple)) else count
