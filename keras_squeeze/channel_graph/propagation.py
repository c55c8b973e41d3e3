"""Takes the channels of a model's inputs through its layers, and so builds the channel graph."""

from collections.abc import Sequence
from dataclasses import replace

import keras
import numpy as np

from keras_squeeze.channel_graph.graph import ChannelGraph, Channels
from keras_squeeze.channel_graph.rules import find_rule
from keras_squeeze.introspection.functional import functional_of, nodes_of, require_graph


def trace(model: keras.Model, *, inexact: bool = False, assumed: np.ndarray | None = None) -> ChannelGraph:
    """Builds the channel graph of a Functional or Sequential model; nested ones are entered.

    Args:
        model: A built model.
        inexact: See `ChannelGraph`.
        assumed: See `ChannelGraph`; ids are the same in every trace of a model.

    Raises:
        TypeError: `model` is not a Keras model.
        ValueError: the model has no graph: it is not built, or it is subclassed.
    """
    graph = ChannelGraph(inexact, assumed)
    functional = require_graph(
        model,
        "So neurons cannot be removed from it. Build it with the functional API (keras.Model(inputs, outputs)), or "
        "take "
        "its functional parts one by one.",
    )
    inputs = [graph.opaque(tensor.shape, "input of the model") for tensor in functional.inputs]
    for channels in _run(functional, inputs, graph, ""):
        graph.freeze(channels, "output of the model")
    return graph


def _run(functional, inputs: Sequence[Channels], graph: ChannelGraph, prefix: str) -> list[Channels]:
    """Takes channels through a functional model; returns those of its outputs."""
    channels_of = {id(tensor): channels for tensor, channels in zip(functional.inputs, inputs, strict=True)}
    for node in nodes_of(functional):
        graph.node, graph.path = node, f"{prefix}{node.operation.name}"
        graph.arguments = node.arguments.args, node.arguments.kwargs
        entering = [channels_of[id(tensor)] for tensor in node.input_tensors]
        shapes = [tensor.shape for tensor in node.output_tensors]
        outputs = _call(node.operation, entering, shapes, graph)
        channels_of.update(
            (id(tensor), channels) for tensor, channels in zip(node.output_tensors, outputs, strict=True)
        )
    return [channels_of[id(tensor)] for tensor in functional.outputs]


def _call(layer, inputs: Sequence[Channels], shapes: list, graph: ChannelGraph) -> list[Channels]:
    """Takes channels through one call of a layer."""
    graph.shapes = [tuple(shape) for shape in shapes]
    graph.calls += 1
    reason = _special(layer, graph)
    if reason:
        return _opaque(layer, inputs, graph, reason)
    inner = functional_of(layer)
    if inner is not None:
        entering = [graph.enter(tensor, channels) for tensor, channels in zip(inner.inputs, inputs, strict=True)]
        return _run(inner, entering, graph, f"{graph.path}/")
    if isinstance(layer, keras.layers.TimeDistributed) and inputs[0].axis > 1:
        return _over_time(layer, inputs, shapes, graph)
    rule = find_rule(layer)
    if rule is None:
        return _opaque(layer, inputs, graph, f"{type(layer).__name__} has no channel rule")
    outputs = rule(layer, list(inputs), graph)
    outputs = [outputs] if isinstance(outputs, Channels) else outputs
    if not (isinstance(outputs, (list, tuple)) and len(outputs) == len(shapes)):
        raise TypeError(
            f"{graph.path}: the channel rule of {type(layer).__name__} must return a `Channels` for each of its "
            f"{len(shapes)} outputs. Received: {outputs!r}"
        )
    return list(outputs)


def _special(layer, graph: ChannelGraph) -> str | None:
    """Why a layer does not do what its class does."""
    if graph.arguments[1].get("training"):
        return "it is called with training=True"
    if getattr(layer, "lora_enabled", False):
        return "it has LoRA weights"
    if getattr(layer, "quantization_mode", None):
        return f"Keras has quantized it to {layer.quantization_mode}"
    return None


def _opaque(layer, inputs, graph: ChannelGraph, reason: str) -> list[Channels]:
    if getattr(layer, "weights", None):
        graph.opaque_layers[graph.path] = reason
    for channels in inputs:
        graph.freeze(channels, f"read by {graph.path}: {reason}")
    return [graph.opaque(shape, f"computed by {graph.path}: {reason}") for shape in graph.shapes]


def _over_time(layer, inputs, shapes, graph) -> list[Channels]:
    """Every time step goes through the wrapped layer, so the axis of time is left out of what its rule sees."""
    x, *masks = inputs
    for mask in masks:
        graph.freeze(mask, f"{graph.path} takes it as a mask")
    steps = [replace(x, shape=(x.shape[0], *x.shape[2:]), axis=x.axis - 1)]
    graph.path = f"{graph.path}/{layer.layer.name}"
    outputs = _call(layer.layer, steps, [(shape[0], *shape[2:]) for shape in shapes], graph)
    return [replace(y, shape=tuple(shape), axis=y.axis + 1) for y, shape in zip(outputs, shapes, strict=True)]
