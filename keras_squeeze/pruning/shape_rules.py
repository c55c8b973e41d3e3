"""The rules of layers and operations that hold no kernels: they move channels, join them, or change their values.

A layer that only moves values is applied to the numbers of the neurons themselves: what NumPy's own reshape,
transpose or slice makes of them is what the layer makes of the channels.
"""

import functools
import inspect
import math
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import keras
import numpy as np
from keras.src.ops import core as core_operations
from keras.src.ops import nn as network_operations
from keras.src.ops import numpy as operations

from keras_squeeze.pruning.channels import ChannelGraph, Channels

SHAPE_RULES: dict[type, Callable] = {}


def _rule_for(*names: str, module=keras.layers):
    def register(rule):
        for name in names:
            if hasattr(module, name):
                SHAPE_RULES[getattr(module, name)] = rule
        return rule

    return register


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
        for place in (0, values.size // 2, values.size - 1):
            for change in (-3.0, 3.0):
                changed = values.ravel().copy()
                changed[place] += change
                untouched = same(results(changed).ravel(), before.ravel())
                untouched[place] = True
                if not untouched.all():
                    return False
    except Exception:  # the function may be anything
        return False
    return True


def evaluated(function, constants: np.ndarray) -> np.ndarray:
    """A function of constants, where they are known; NaN elsewhere."""
    known = ~np.isnan(constants)
    result = np.full(len(constants), np.nan)
    if known.any():
        tensor = keras.ops.convert_to_tensor(constants[known].astype("float32").reshape(1, -1))
        result[known] = np.asarray(keras.ops.convert_to_numpy(function(tensor)), "float64").reshape(-1)
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


@_rule_for("UnitNormalization")
def unit_normalization(layer, inputs, graph):
    """Zeros add nothing to a Euclidean norm."""
    (x,) = inputs
    graph.require_constant(x, True, f"{graph.path} normalises over it, and it is not zero")
    return x.with_constants(np.where(x.constants == 0, 0.0, np.nan))


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
    place = output.axis - first
    if target[place] != -1:
        graph.option(
            layer,
            option,
            output.ids,
            lambda kept: [int(np.count_nonzero(kept)) if i == place else size for i, size in enumerate(target)],
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


# Several tensors.


def _where_zero(zero: bool):
    """How constants meet: a product is zero where any factor is."""

    def combined(function, constants):
        result = function(*constants)
        if zero:
            result = np.where(np.any(np.stack(np.broadcast_arrays(*constants)) == 0, axis=0), 0.0, result)
        return result

    return combined


_MERGES = {
    "Add": (lambda *x: sum(x), False),
    "Subtract": (lambda a, b: a - b, False),
    "Multiply": (lambda *x: math.prod(x), True),
    "Average": (lambda *x: sum(x) / len(x), False),
    "Maximum": (lambda *x: functools.reduce(np.maximum, x), False),
    "Minimum": (lambda *x: functools.reduce(np.minimum, x), False),
}


@_rule_for(*_MERGES)
def merge(layer, inputs, graph):
    name = next(base.__name__ for base in type(layer).__mro__ if base.__name__ in _MERGES)
    function, zero = _MERGES[name]
    if name == "Add":
        _note_zero_branches(inputs, graph)
    return _joined(layer, inputs, lambda constants: _where_zero(zero)(function, constants), graph)


def _note_zero_branches(inputs, graph: ChannelGraph) -> None:
    """A branch that is zero throughout can be left out of a sum, if what is left has the sum's shape."""
    zero = [i for i, x in enumerate(inputs) if len(x.ids) and not np.any(x.constants != 0)]
    left = [x for i, x in enumerate(inputs) if i not in zero]
    if zero and left and all(tuple(x.shape) == graph.shapes[0] for x in left):
        graph.droppable[id(graph.node)] = zero


@_rule_for("Add", "Subtract", "Multiply", "Maximum", "Minimum", module=operations)
def binary_operation(operation, inputs, graph):
    """Of two tensors, or of a tensor and a number."""
    function, zero = _MERGES[type(operation).__name__]
    args, kwargs = graph.arguments
    operands = [*args, *kwargs.values()]
    numbers = {i: operand for i, operand in enumerate(operands) if not isinstance(operand, keras.KerasTensor)}
    if any(np.size(number) != 1 for number in numbers.values()):
        return mixed(operation, inputs, graph)
    if not numbers:
        return merge(operation, inputs, graph)
    (place, number), (x,) = next(iter(numbers.items())), inputs
    pair = [x.constants, np.full(len(x.ids), float(np.reshape(number, ())))]
    return x.with_constants(_where_zero(zero)(function, pair if place else pair[::-1]))


@_rule_for("Sum", "Any", "All", "Max", "Min", "Mean", module=operations)
def reduction(operation, inputs, graph):
    """Zeros change no sum, and no answer to whether anything is true: so is a mask made by `Masking`.

    Nor do copies change what is true of all of them, or the largest: so are the masks of a `Concatenate` put together.
    """
    (x,) = inputs
    name, rank, axes = type(operation).__name__, len(x.shape), operation.axis
    axes = range(rank) if axes is None else [axis % rank for axis in np.atleast_1d(axes)]
    redundant = x.copies and name not in ("Sum", "Mean")
    if 0 in axes or (x.axis in axes and not redundant and name not in ("Sum", "Any")):
        return mixed(operation, inputs, graph)
    if x.axis in axes:
        if not redundant:
            graph.require_constant(x, True, f"{graph.path} adds it up, and it is not zero")
        return graph.opaque(graph.shapes[0], f"computed by {graph.path}, over channels")
    place = x.axis if operation.keepdims else x.axis - sum(axis < x.axis for axis in axes)
    constants = x.constants if name in ("Max", "Min") else np.where(x.constants == 0, 0.0, np.nan)
    return Channels(graph.shapes[0], place, x.ids, constants)


@_rule_for("ZerosLike", "OnesLike", module=operations)
def like(operation, inputs, graph):
    """As many channels, all the same."""
    (x,) = inputs
    value = float(type(operation).__name__ == "OnesLike")
    return replace(x, constants=np.full(len(x.ids), value), copies=True)


@_rule_for("LogicalOr", "LogicalAnd", module=operations)
def logical(operation, inputs, graph):
    """Two masks put together; one that is spread over channels makes copies of itself."""
    shape = graph.shapes[0]
    copies = [x for x in inputs if x.copies and tuple(x.shape) == shape]
    others = [x for x in inputs if not any(x is each for each in copies)]
    if not copies or any(len(x.shape) != len(shape) or x.shape[copies[0].axis] != 1 for x in others):
        return _joined(operation, inputs, lambda constants: np.full_like(constants[0], np.nan), graph)
    first = copies[0]
    for x in copies[1:]:
        graph.unite(first.ids, x.ids)
    for x in others:
        graph.freeze(x, f"{graph.path} spreads it over channels")
    return replace(first, constants=np.full(len(first.ids), np.nan))


@_rule_for("TrueDivide", "Divide", module=operations)
def division(operation, inputs, graph):
    args, kwargs = graph.arguments
    operands = [*args, *kwargs.values()]
    if len(inputs) != 1 or isinstance(operands[1], keras.KerasTensor) or np.size(operands[1]) != 1:
        return mixed(operation, inputs, graph)
    return inputs[0].with_constants(inputs[0].constants / float(np.reshape(operands[1], ())))


def scaled_sum(layer, inputs, graph):
    """InceptionResNet's `CustomScaleLayer`: the first tensor and a multiple of the second."""
    return _joined(layer, inputs, lambda constants: constants[0] + layer.scale * constants[1], graph)


def _joined(layer, inputs, combine, graph) -> Channels | list[Channels]:
    """Tensors combined value by value: the channels that meet are one neuron. Size one meets all, and stays."""
    shape = graph.shapes[0]
    from_end = [len(x.shape) - x.axis for x in inputs]
    wide = [i for i, x in enumerate(inputs) if len(x.ids) > 1]
    if not wide:
        wide = list(range(len(inputs)))
    place = from_end[wide[0]]
    size = shape[-place] if place <= len(shape) else None
    if any(from_end[i] != place or len(inputs[i].ids) != size for i in wide) or any(len(x.ids) == 0 for x in inputs):
        return mixed(layer, inputs, graph)
    first = inputs[wide[0]]
    for i, x in enumerate(inputs):
        if i not in wide:
            graph.freeze(x, f"{graph.path} spreads this one channel over others")
        elif x is not first:
            graph.unite(first.ids, x.ids)
    width = len(first.ids)
    constants = [x.constants if i in wide else np.broadcast_to(x.constants, (width,)) for i, x in enumerate(inputs)]
    return Channels(shape, len(shape) - place, first.ids, combine(constants))


@_rule_for("Concatenate")
@_rule_for("Concatenate", module=operations)
def concatenate(layer, inputs, graph):
    shape = graph.shapes[0]
    joined = layer.axis % len(shape)
    if len({x.axis for x in inputs}) != 1 or joined == 0:
        return mixed(layer, inputs, graph)
    if joined == inputs[0].axis:
        ids = np.concatenate([x.ids for x in inputs])
        constants = np.concatenate([x.constants for x in inputs])
        return Channels(shape, joined, ids, constants, all(x.copies for x in inputs))
    constants = np.stack([x.constants for x in inputs])
    for x in inputs[1:]:
        graph.unite(inputs[0].ids, x.ids)
    same = np.where(np.all(constants == constants[:1], axis=0), constants[0], np.nan)
    return Channels(shape, inputs[0].axis, inputs[0].ids, same)


@_rule_for("Split", module=operations)
def split(operation, inputs, graph):
    """Along the channels, by the places where it splits: those depend on how many stay before them."""
    (x,) = inputs
    if operation.axis % len(x.shape) != x.axis:
        return [Channels(shape, x.axis, x.ids, x.constants) for shape in graph.shapes]
    places = operation.indices_or_sections
    if isinstance(places, int):
        places = [len(x.ids) // places * i for i in range(1, places)]
    parts = [np.arange(len(x.ids))[start:stop] for start, stop in zip([0, *places], [*places, None], strict=True)]
    graph.option(
        operation,
        "indices_or_sections",
        x.ids,
        lambda kept: tuple(int(np.count_nonzero(kept[:place])) for place in places),
    )
    return [
        Channels(shape, x.axis, x.ids[part], x.constants[part]) for shape, part in zip(graph.shapes, parts, strict=True)
    ]


@_rule_for("GetItem", module=operations)
def get_item(operation, inputs, graph):
    """Slicing along other axes; along the channels, where every position is named by a slice with a step of one."""
    (x,) = inputs
    args, kwargs = graph.arguments
    key = kwargs["key"] if "key" in kwargs else args[1]
    key = tuple(key) if isinstance(key, (tuple, list)) else (key,)
    if any(part is None or not isinstance(part, (int, slice, type(Ellipsis))) for part in key):
        return mixed(operation, inputs, graph)
    if Ellipsis in key:
        place = key.index(Ellipsis)
        key = key[:place] + (slice(None),) * (len(x.shape) - len(key) + 1) + key[place + 1 :]
    key += (slice(None),) * (len(x.shape) - len(key))
    if key[0] != slice(None) or not isinstance(key[x.axis], slice) or key[x.axis].step not in (None, 1):
        return mixed(operation, inputs, graph)
    start, stop, _ = key[x.axis].indices(len(x.ids))
    if key[x.axis] != slice(None):

        def moved(kept):
            before = [int(np.count_nonzero(kept[:end])) for end in (start, stop)]
            return tuple(slice(*before) if axis == x.axis else part for axis, part in enumerate(key))

        graph.option(operation, "key", x.ids, moved)
    axis = x.axis - sum(isinstance(part, int) for part in key[: x.axis])
    return Channels(graph.shapes[0], axis, x.ids[start:stop], x.constants[start:stop])


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
