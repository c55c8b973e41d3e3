"""Multiply-accumulate operations (MACs) of one call of a layer, per weight.

Every formula takes the layer, the shapes of its tensor inputs (in the order of the arguments of its `call`,
masks left out) and the shapes of its outputs, and returns `{weight name: MACs}`. The shapes are those of a batch
of one, yet their first axis is counted like any other: a model may fold words or windows into it. The name `""`
holds products that no weight takes part in (attention scores). Only products are counted: no biases,
activations, normalizations or pooling. Products with padding are counted, as every profiler does.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

Shape = tuple[int, ...]
MacFormula = Callable[[Any, Sequence[Shape], Sequence[Shape]], dict[str, int]]

WEIGHTLESS = ""
"""The name under which a formula returns products between activations."""


def dense(layer, inputs, outputs):
    """Every output takes one product with each input feature."""
    return {"kernel": math.prod(outputs[0]) * inputs[0][-1]}


def einsum(layer, inputs, outputs):
    """The product over the sizes of all the letters in the equation."""
    operands, _ = layer.equation.replace(" ", "").split("->")
    terms = operands.split(",")
    kernel_shape = _weight_shape(layer, "kernel")
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, (inputs[0], kernel_shape), strict=True):
        head, dots, tail = term.partition("...")
        sizes.update(zip(head, shape, strict=False))
        sizes.update(zip(reversed(tail), reversed(shape), strict=False))
        if dots:
            sizes["..."] = math.prod(shape[len(head) : len(shape) - len(tail)])
    return {"kernel": math.prod(sizes.values())}


def convolution(layer, inputs, outputs):
    """Every output position multiplies the whole kernel once (groups included: the kernel is smaller)."""
    kernel = _weight_shape(layer, "kernel")
    return {"kernel": math.prod(outputs[0]) // kernel[-1] * math.prod(kernel)}


def transposed_convolution(layer, inputs, outputs):
    """Every input position multiplies the whole kernel once; kernel is (..., out, in)."""
    kernel = _weight_shape(layer, "kernel")
    return {"kernel": math.prod(inputs[0]) // kernel[-1] * math.prod(kernel)}


def depthwise_convolution(layer, inputs, outputs):
    """Every output multiplies one channel's window; kernel is (..., channels, multiplier)."""
    kernel = _weight_shape(layer, "kernel")
    return {"kernel": math.prod(outputs[0]) * math.prod(kernel[:-2])}


def separable_convolution(layer, inputs, outputs):
    """Depthwise, then pointwise, both at the output's positions."""
    pointwise = _weight_shape(layer, "pointwise_kernel")
    positions = math.prod(outputs[0]) // pointwise[-1]
    return {
        "depthwise_kernel": positions * math.prod(_weight_shape(layer, "depthwise_kernel")),
        "pointwise_kernel": positions * math.prod(pointwise),
    }


def embedding(layer, inputs, outputs):
    """A look-up multiplies nothing; `ReversibleEmbedding` called in reverse projects onto the vocabulary."""
    tied = getattr(layer, "tie_weights", True)
    macs = {"embeddings": 0} if tied else {"embeddings": 0, "reverse_embeddings": 0}
    if len(outputs[0]) == len(inputs[0]):
        macs["embeddings" if tied else "reverse_embeddings"] = math.prod(inputs[0]) * layer.input_dim
    return macs


def recurrent(layer, inputs, outputs):
    """Every time step multiplies the kernel and the recurrent kernel of every cell once."""
    steps = inputs[0][0] * inputs[0][1]
    cells = getattr(layer.cell, "cells", [layer.cell])
    parents = f"{layer.cell.name}/" if hasattr(layer.cell, "cells") else ""
    return {
        f"{parents}{cell.name}/{name}": steps * math.prod(_weight_shape(cell, name))
        for cell in cells
        for name in ("kernel", "recurrent_kernel")
        if hasattr(cell, name)
    }


def recurrent_cell(layer, inputs, outputs):
    """One time step of a cell that is used without its `RNN` layer; a convolution at every position of its state."""
    positions = math.prod(outputs[0]) // (layer.filters if hasattr(layer, "filters") else layer.units)
    return {name: positions * math.prod(_weight_shape(layer, name)) for name in ("kernel", "recurrent_kernel")}


def recurrent_convolution(layer, inputs, outputs):
    """Every time step convolves the input and the state, both at the state's positions."""
    steps = inputs[0][0] * inputs[0][1]
    state = outputs[0][2:] if layer.return_sequences else outputs[0][1:]
    positions = math.prod(state) // layer.filters
    return {
        f"{layer.cell.name}/{name}": steps * positions * math.prod(_weight_shape(layer.cell, name))
        for name in ("kernel", "recurrent_kernel")
    }


def multi_head_attention(layer, inputs, outputs):
    """Four projections, the scores, and the weighted sum of the values."""
    query, value = inputs[0], inputs[1]
    key = inputs[2] if len(inputs) > 2 else value
    axes = layer._attention_axes or tuple(range(1, len(query) - 1))
    scores = layer.num_heads * math.prod(query[:-1]) * math.prod(value[axis] for axis in axes)
    return {
        **_projections(layer, query, key, value),
        WEIGHTLESS: scores * (layer.key_dim + layer.value_dim),
    }


def grouped_query_attention(layer, inputs, outputs):
    """As `multi_head_attention`, the keys and values shared by groups of query heads."""
    query, value = inputs[0], inputs[1]
    key = inputs[2] if len(inputs) > 2 else value
    scores = layer.num_query_heads * math.prod(query[:-1]) * value[1]
    return {
        **_projections(layer, query, key, value),
        WEIGHTLESS: scores * 2 * layer.head_dim,
    }


def _projections(layer, query, key, value):
    """Every projection multiplies its kernel once per position of the sequence that enters it."""
    sources = {"query": query, "gate": query, "key": key, "value": value, "attention_output": query}
    return {
        f"{part.name}/kernel": math.prod(sources[part.name][:-1]) * math.prod(_weight_shape(part, "kernel"))
        for part in layer._layers
        if part.name in sources
    }


def _weight_shape(layer, name):
    """Keras packs 4-bit kernels two values to a byte and keeps the shape that they had."""
    shape = getattr(layer, f"original_{name}_shape", None)
    if shape is not None:
        return tuple(shape)
    weight = getattr(layer, f"_{name}", None)
    return tuple((getattr(layer, name) if weight is None else weight).shape)
