"""The rules of layers and operations that put tensors together or take them apart, and of sums over an axis."""

import functools
import math
from collections.abc import Callable
from dataclasses import replace

import keras
import numpy as np
from keras.src.ops import numpy as operations

from keras_squeeze.channel_graph.graph import ChannelGraph, Channels
from keras_squeeze.channel_graph.shape_rules import mixed, registering

MERGE_RULES: dict[type, Callable] = {}

_rule_for = registering(MERGE_RULES)


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
    nonzero = [x for i, x in enumerate(inputs) if i not in zero]
    if zero and nonzero and all(tuple(x.shape) == graph.shapes[0] for x in nonzero):
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
    (index, number), (x,) = next(iter(numbers.items())), inputs
    pair = [x.constants, np.full(len(x.ids), float(np.reshape(number, ())))]
    return x.with_constants(_where_zero(zero)(function, pair if index else pair[::-1]))


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
    output_axis = x.axis if operation.keepdims else x.axis - sum(axis < x.axis for axis in axes)
    constants = x.constants if name in ("Max", "Min") else np.where(x.constants == 0, 0.0, np.nan)
    return Channels(graph.shapes[0], output_axis, x.ids, constants)


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
    joined_axis = from_end[wide[0]]
    size = shape[-joined_axis] if joined_axis <= len(shape) else None
    if any(from_end[i] != joined_axis or len(inputs[i].ids) != size for i in wide) or any(
        len(x.ids) == 0 for x in inputs
    ):
        return mixed(layer, inputs, graph)
    first = inputs[wide[0]]
    for i, x in enumerate(inputs):
        if i not in wide:
            graph.freeze(x, f"{graph.path} spreads this one channel over others")
        elif x is not first:
            graph.unite(first.ids, x.ids)
    width = len(first.ids)
    constants = [x.constants if i in wide else np.broadcast_to(x.constants, (width,)) for i, x in enumerate(inputs)]
    return Channels(shape, len(shape) - joined_axis, first.ids, combine(constants))


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
        ellipsis_index = key.index(Ellipsis)
        key = key[:ellipsis_index] + (slice(None),) * (len(x.shape) - len(key) + 1) + key[ellipsis_index + 1 :]
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
