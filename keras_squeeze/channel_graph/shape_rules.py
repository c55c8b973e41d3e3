"""The rules of layers and operations of one tensor that hold no kernels: they move channels or change their values.

A layer that only moves values is applied to the numbers of the neurons themselves: what NumPy's own reshape,
transpose or slice makes of them is what the layer makes of the channels.
"""

import functools
import inspect
import math
import types
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras.src.ops import core as core_operations
from keras.src.ops import nn as network_operations
from keras.src.ops import numpy as operations

from keras_squeeze.channel_graph.graph import ChannelGraph, Channels

SHAPE_RULES: dict[type, Callable] = {}


def registering(rules: dict[type, Callable]):
    """A decorator that enters a rule for classes of a module, by name: older versions of Keras lack some."""

    def rule_for(*names: str, module=keras.layers):
        def register(rule):
            rules.update({getattr(module, name): rule for name in names if hasattr(module, name)})
            return rule

        return register

    return rule_for


_rule_for = registering(SHAPE_RULES)


def arguments_of(layer, inputs, graph: ChannelGraph) -> dict[str, Any]:
    """What a layer is called with, by name, with the channels of a tensor in its place."""
    channels = {id(tensor): x for tensor, x in zip(graph.node.input_tensors, inputs, strict=False)}
    args, kwargs = keras.tree.map_structure(lambda value: channels.get(id(value), value), graph.arguments)
    return dict(inspect.signature(layer.call).bind(*args, **kwargs).arguments)


def mixed(layer, inputs, graph: ChannelGraph) -> list[Channels]:
    """A layer that does not treat these channels one by one: they stay, and what it computes is opaque."""
    if getattr(layer, "weights", None):
        graph.opaque_layers.setdefault(graph.path, f"this {type(layer).__name__} mixes channels")
    for channels in inputs:
        graph.freeze(channels, f"{graph.path} ({type(layer).__name__}) mixes these channels")
    return [graph.opaque(shape, f"computed by {graph.path}, which mixes channels") for shape in graph.shapes]


def along_last_axis(layer, x: Channels, graph: ChannelGraph) -> Channels:
    """What a layer reads that works along the last axis: neurons that lie along another one stay."""
    if x.axis == len(x.shape) - 1:
        return x
    graph.freeze(x, f"{graph.path} ({type(layer).__name__}) works along another axis")
    return graph.opaque(x.shape, f"places along the last axis of what {graph.path} reads")


# Values that change, each on its own.


def through_function(function, x: Channels, graph: ChannelGraph):
    """The channels after a function of one tensor, such as an activation."""
    if function is None:
        return x
    if not is_elementwise(function):
        graph.freeze(x, f"{graph.path}: {_name(function)} mixes these channels")
        return x.unknown()
    return x.with_constants(evaluated(function, x.constants))


def is_elementwise(function) -> bool:
    """Whether a function of one tensor treats its values one by one."""
    # A layer or an operation would be kept alive by the cache, and its model with it.
    return _tried(function) if isinstance(function, types.FunctionType) else _tried.__wrapped__(function)


@functools.lru_cache(maxsize=64)
def _tried(function) -> bool:
    """Tries whether changing one value of a tensor changes no other, wherever the values stand."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(2, 3, 4, 5)).astype("float32")
    order = rng.permutation(values.size)

    def results(flat):
        return np.asarray(keras.ops.convert_to_numpy(function(flat.reshape(values.shape))))

    def same(one, other):
        return np.isclose(one, other, rtol=1e-5, atol=1e-6, equal_nan=True)

    try:
        before = results(values.ravel())
        if (
            before.shape != values.shape
            or not same(results(values.ravel()[order]).ravel(), before.ravel()[order]).all()
        ):
            return False
        for index in (0, values.size // 2, values.size - 1):
            for change in (-3.0, 3.0):
                changed = values.ravel().copy()
                changed[index] += change
                untouched = same(results(changed).ravel(), before.ravel())
                untouched[index] = True
                if not untouched.all():
                    return False
    except Exception:  # the function may be anything
        return False
    return True


def evaluated(function, constants: np.ndarray) -> np.ndarray:
    """A function of constants, where they are known; NaN elsewhere."""
    is_constant = ~np.isnan(constants)
    result = np.full(len(constants), np.nan)
    if is_constant.any():
        tensor = keras.ops.convert_to_tensor(constants[is_constant].astype("float32").reshape(1, -1))
        result[is_constant] = np.asarray(keras.ops.convert_to_numpy(function(tensor)), "float64").reshape(-1)
    result[np.isinf(result)] = np.nan  # no product with zero is zero then
    return result


def _name(function) -> str:
    return getattr(function, "__name__", type(function).__name__)


@_rule_for("Activation")
def activation(layer, inputs, graph):
    return through_function(layer.activation, inputs[0], graph)


@_rule_for("ReLU", "LeakyReLU", "ELU", "Softmax")
def activation_layer(layer, inputs, graph):
    return through_function(layer, inputs[0], graph)


@_rule_for(
    "Dropout",
    "SpatialDropout1D",
    "SpatialDropout2D",
    "SpatialDropout3D",
    "GaussianDropout",
    "GaussianNoise",
    "AlphaDropout",
    "ActivityRegularization",
    "Identity",
)
def unchanged(layer, inputs, graph):
    """What only training changes."""
    return inputs[0]


@_rule_for("Masking")
def masking(layer, inputs, graph):
    """Steps at which every channel has a certain value are left out: channels that always have it change nothing."""
    (x,) = inputs
    if x.axis != len(x.shape) - 1:
        return mixed(layer, inputs, graph)
    above = x.with_constants(x.constants - layer.mask_value)
    graph.require_constant(above, True, f"{graph.path} looks for another value in it")
    return x.with_constants(np.where(x.constants == 0, 0.0, np.nan))


@_rule_for("Rescaling")
def rescaling(layer, inputs, graph):
    if np.ndim(layer.scale) or np.ndim(layer.offset):
        return mixed(layer, inputs, graph)
    return through_function(layer, inputs[0], graph)


# Space.


@_rule_for(
    "MaxPooling1D",
    "MaxPooling2D",
    "MaxPooling3D",
    "AveragePooling1D",
    "AveragePooling2D",
    "AveragePooling3D",
    "AdaptiveAveragePooling1D",
    "AdaptiveAveragePooling2D",
    "AdaptiveAveragePooling3D",
    "AdaptiveMaxPooling1D",
    "AdaptiveMaxPooling2D",
    "AdaptiveMaxPooling3D",
    "Cropping1D",
    "Cropping2D",
    "Cropping3D",
    "UpSampling1D",
    "UpSampling2D",
    "UpSampling3D",
    "Resizing",
)
def spatial(layer, inputs, graph):
    """A constant stays what it is; averages leave the padding out."""
    (x,) = inputs
    if x.axis != _channel_axis(layer, x):
        return mixed(layer, inputs, graph)
    constants = x.constants
    if getattr(layer, "pad_to_aspect_ratio", False):
        constants = np.where(constants == layer.fill_value, constants, np.nan)
    if getattr(layer, "interpolation", "nearest") not in ("nearest", "bilinear"):
        constants = np.where(constants == 0, 0.0, np.nan)  # weights that add up to one only to rounding
    return Channels(graph.shapes[0], x.axis, x.ids, constants)


@_rule_for("ZeroPadding1D", "ZeroPadding2D", "ZeroPadding3D")
def zero_padding(layer, inputs, graph):
    (x,) = inputs
    if x.axis != _channel_axis(layer, x):
        return mixed(layer, inputs, graph)
    return Channels(graph.shapes[0], x.axis, x.ids, np.where(x.constants == 0, 0.0, np.nan))


@_rule_for(
    "GlobalAveragePooling1D",
    "GlobalAveragePooling2D",
    "GlobalAveragePooling3D",
    "GlobalMaxPooling1D",
    "GlobalMaxPooling2D",
    "GlobalMaxPooling3D",
)
def global_pooling(layer, inputs, graph):
    x = inputs[0]
    if x.axis != _channel_axis(layer, x):
        return mixed(layer, inputs, graph)
    axis = x.axis if layer.keepdims else 1
    return Channels(graph.shapes[0], axis, x.ids, x.constants)


def _channel_axis(layer, x: Channels) -> int:
    return 1 if getattr(layer, "data_format", None) == "channels_first" else len(x.shape) - 1


# Values that move.


@_rule_for("Flatten")
def flatten(layer, inputs, graph):
    (x,) = inputs
    if layer.data_format == "channels_first" and len(x.shape) > 2:
        return mixed(layer, inputs, graph)
    return _moved(layer, x, lambda array: array.reshape(1, -1), graph)


@_rule_for("Reshape")
def reshape_layer(layer, inputs, graph):
    (x,) = inputs
    return _reshaped(layer, x, "target_shape", layer.target_shape, first=1, graph=graph)


@_rule_for("Reshape", module=operations)
def reshape_operation(operation, inputs, graph):
    (x,) = inputs
    return _reshaped(operation, x, "newshape", operation.newshape, first=0, graph=graph)


def _reshaped(layer, x, option, target, first, graph):
    """`first`: the axis that the first entry of `target` stands for."""
    shape = graph.shapes[0]
    output = _moved(layer, x, lambda array: array.reshape(1, *shape[1:]), graph)
    axis = output.axis - first
    if target[axis] != -1:
        graph.option(
            layer,
            option,
            output.ids,
            lambda kept: [int(np.count_nonzero(kept)) if i == axis else size for i, size in enumerate(target)],
        )
    return output


@_rule_for("Permute")
def permute(layer, inputs, graph):
    return _moved(layer, inputs[0], lambda array: array.transpose(0, *layer.dims), graph)


@_rule_for("Transpose", module=operations)
def transpose(operation, inputs, graph):
    axes = operation.axes
    if axes is None or axes[0] != 0:
        return mixed(operation, inputs, graph)
    return _moved(operation, inputs[0], lambda array: array.transpose(axes), graph)


@_rule_for("RepeatVector")
def repeat_vector(layer, inputs, graph):
    (x,) = inputs
    return Channels(graph.shapes[0], 2, x.ids, x.constants)


@_rule_for("Squeeze", "ExpandDims", module=operations)
def size_one_axis(operation, inputs, graph):
    return _moved(operation, inputs[0], lambda array: array.reshape(1, *graph.shapes[0][1:]), graph)


def _moved(layer, x: Channels, function, graph) -> Channels:
    """Applies a function that only moves values to the numbers of the neurons.

    Where they vary along several axes afterwards, those along all but the longest go together.
    """
    sizes = [1, *(size or 0 for size in x.shape[1:])]
    after = graph.shapes[0][1:]
    if 0 in sizes or None in after or math.prod(sizes) != math.prod(after):
        return mixed(layer, [x], graph)[0]
    along = [size if axis == x.axis else 1 for axis, size in enumerate(sizes)]
    positions = function(np.broadcast_to(np.arange(len(x.ids)).reshape(along), sizes))
    varying = [axis for axis, size in enumerate(positions.shape) if size > 1 and _varies(positions, axis)]
    axis = max(varying, key=lambda axis: positions.shape[axis]) if varying else len(positions.shape) - 1
    lanes = np.moveaxis(positions, axis, -1).reshape(-1, positions.shape[axis])
    constants = x.constants[lanes[0]]
    if len(varying) > 1:
        lanes = np.unique(lanes, axis=0)
        for lane in lanes[1:]:
            graph.unite(x.ids[lanes[0]], x.ids[lane])
        constants = np.where(np.all(x.constants[lanes] == constants, axis=0), constants, np.nan)
    return Channels(graph.shapes[0], axis, x.ids[lanes[0]], constants)


def _varies(array: np.ndarray, axis: int) -> bool:
    lanes = np.moveaxis(array, axis, 0)
    return bool(np.any(lanes[1:] != lanes[:-1]))


# Any other operation.


def elementwise_operation(operation, inputs, graph):
    """Any operation of `keras.ops` on one tensor; whether it treats the channels one by one is tried."""
    args, kwargs = graph.arguments
    tensors = [x for x in keras.tree.flatten((args, kwargs)) if isinstance(x, keras.KerasTensor)]
    if len(tensors) != 1 or not (args and args[0] is tensors[0]):
        return mixed(operation, inputs, graph)
    others = [x for x in keras.tree.flatten((args[1:], kwargs)) if not isinstance(x, str)]
    if any(np.size(x) != 1 for x in others):  # an array may have an entry per channel
        return mixed(operation, inputs, graph)
    applied = _Applied(operation, args[1:], kwargs)
    return through_function(applied, inputs[0], graph) if is_elementwise(applied) else mixed(operation, inputs, graph)


class _Applied:
    """An operation of one tensor with its other arguments."""

    def __init__(self, operation, args, kwargs):
        self.operation, self.args, self.kwargs = operation, args, kwargs

    def __call__(self, tensor):
        return self.operation.call(keras.ops.convert_to_tensor(tensor), *self.args, **self.kwargs)


for _module in (operations, network_operations, core_operations):
    for _class in vars(_module).values():
        if isinstance(_class, type) and issubclass(_class, keras.Operation) and _class is not keras.Operation:
            SHAPE_RULES.setdefault(_class, elementwise_operation)
