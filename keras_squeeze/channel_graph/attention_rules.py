"""The channel rules of attention: whole heads, the width of keys, the width of values, and the width of the model.

In a masked head queries, keys and values are zero, and so is what it attends to. A masked place of the keys adds zero
to every score; since scores are divided by the root of the key width (Vaswani et al. 2017, equation 1), the queries
are scaled when the width changes. A masked place of the values is zero in every head.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np

from keras_squeeze.channel_graph.graph import ChannelGraph, Channels
from keras_squeeze.channel_graph.shape_rules import arguments_of, mixed, registering
from keras_squeeze.introspection.layer_table import stored_variable

ATTENTION_RULES: dict[type, Callable] = {}

_rule_for = registering(ATTENTION_RULES)


@dataclass(frozen=True)
class _Projection:
    """One of the projections inside of a layer, and the neurons along its two output axes.

    `heads`: None for a single head that stays.
    """

    dense: Any
    heads: np.ndarray | None
    width: np.ndarray

    @property
    def kernel(self):
        return stored_variable(self.dense, "kernel")

    def alive(self, graph: ChannelGraph) -> np.ndarray:
        """Boolean array of shape (heads, width): where the projection is not zero throughout."""
        alive = np.any(graph.value(self.kernel) != 0, axis=0)
        if self.dense.bias is not None:
            alive |= graph.value(self.dense.bias) != 0
        if graph.assumed is not None:
            alive &= ~graph.assumed[self.width]
            if self.heads is not None:
                alive &= ~graph.assumed[self.heads][:, None]
        return alive


@_rule_for("MultiHeadAttention")
def multi_head_attention(layer, inputs, graph: ChannelGraph):
    arguments = arguments_of(layer, inputs, graph)
    tensors = _tensors(arguments)
    output = layer._output_dense
    axes = layer._attention_axes or ()
    ranks = {len(x.shape) for x in tensors}
    mixes = len(output.kernel.shape) != 3 or any(axis % max(ranks) == max(ranks) - 1 for axis in axes)
    if mixes or not _is_plain(layer, tensors):
        return mixed(layer, inputs, graph)
    kernel = stored_variable(layer._query_dense, "kernel")
    heads = graph.produce(kernel, 1, (), name="heads", rounded=False).ids
    keys = graph.produce(kernel, 2, (), name="key_dim").ids
    values = graph.produce(stored_variable(layer._value_dense, "kernel"), 2, (), name="value_dim").ids
    query, key, value = (
        _projected(dense, x, heads, width, graph)
        for dense, x, width in zip(_denses(layer), tensors, (keys, keys, values), strict=True)
    )
    if getattr(layer, "_use_gate", False):
        _projected(layer._gate_dense, tensors[0], heads, values, graph)
    graph.follow(output.kernel, 0, heads, "input")
    graph.follow(output.kernel, 1, values, "input")
    attended, scored = value.alive(graph), query.alive(graph) & key.alive(graph)
    _may_go(graph, heads, _none(attended, 1), "its values are not zero")
    _may_go(graph, values, _none(attended, 0), "its values are not zero")
    _may_go(graph, keys, _none(scored, 0), "it counts in the scores")
    _scaled_for(query, keys, graph)
    whole = len(keys) + len(values)
    graph.count_work(layer, [(len(keys) / whole, (heads, keys)), (len(values) / whole, (heads, values))])
    _observed(output, tensors[0], heads, values, graph)
    for name, ids in (("num_heads", heads), ("key_dim", keys), ("value_dim", values)):
        graph.option(layer, name, ids)
    _freeze_masks(arguments, heads, graph)
    outputs = _output(layer, heads, graph)
    graph.option(layer, "output_shape", outputs.ids, lambda kept: (int(np.count_nonzero(kept)),))
    return [outputs, *_scores(heads, graph)]


@_rule_for("GroupQueryAttention", "GroupedQueryAttention")
def group_query_attention(layer, inputs, graph: ChannelGraph):
    """A key head goes with the query heads that share it; where all share one, query heads go one by one."""
    arguments = arguments_of(layer, inputs, graph)
    tensors = _tensors(arguments)
    if not _is_plain(layer, tensors) or len({len(x.ids) for x in tensors}) > 1:
        return mixed(layer, inputs, graph)
    output = layer._output_dense
    shared = layer.num_key_value_heads == 1
    first = layer._query_dense if shared else layer._key_dense
    heads = graph.produce(stored_variable(first, "kernel"), 1, (), name="heads", rounded=False).ids
    width = graph.produce(stored_variable(layer._query_dense, "kernel"), 2, (), name="head_dim").ids
    query_heads = heads if shared else np.repeat(heads, layer.num_repeats)
    key_heads = None if shared else heads
    query, key, value = (
        _projected(dense, x, own, width, graph)
        for dense, x, own in zip(_denses(layer), tensors, (query_heads, key_heads, key_heads), strict=True)
    )
    if getattr(layer, "use_gate", False):
        _projected(layer._gate_dense, tensors[0], query_heads, width, graph)
    graph.follow(output.kernel, 0, query_heads, "output" if shared else "input")
    graph.follow(output.kernel, 1, width, "input")
    attended = value.alive(graph)
    if shared:
        read = np.any(graph.value(output.kernel) != 0, axis=(1, 2))
        if graph.assumed is not None:
            read &= ~graph.assumed[heads]
        _may_go(graph, heads, ~read, "its values are not zero")
    else:
        _may_go(graph, heads, _none(attended, 1), "its values are not zero")
    scored = query.alive(graph) & np.repeat(key.alive(graph), layer.num_repeats, axis=0)
    _may_go(graph, width, _none(scored, 0) & _none(attended, 0), "it counts in the scores or the values")
    _scaled_for(query, width, graph)
    graph.count_work(layer, [(1.0, (query_heads, width))])
    _observed(output, tensors[0], query_heads, width, graph)
    graph.option(layer, "head_dim", width)
    graph.option(layer, "num_query_heads", query_heads)
    if not shared:
        graph.option(layer, "num_key_value_heads", heads)
    _freeze_masks(arguments, heads, graph)
    outputs = _output(layer, query_heads, graph)
    for x in tensors:  # Keras wants all of them to be equally wide, and the output like the query
        graph.unite(outputs.ids, x.ids)
    return [outputs, *_scores(heads, graph)]


@_rule_for("Attention", "AdditiveAttention")
def attention(layer, inputs, graph: ChannelGraph):
    """Scores without projections: the channels of query and key meet, and those of the value are averaged."""
    query, value, *rest = arguments_of(layer, inputs, graph)["inputs"]
    key = rest[0] if rest else value
    tensors = (query, value, key)
    if any(x.axis != len(x.shape) - 1 for x in tensors):
        return mixed(layer, inputs, graph)
    for x in inputs:
        if not any(x is tensor for tensor in tensors):
            graph.freeze(x, f"{graph.path} takes it as a mask")
    graph.unite(query.ids, key.ids)
    zero = (query.constants == 0) & (key.constants == 0)
    if type(layer) is keras.layers.Attention and layer.score_mode == "dot":
        zero = (query.constants == 0) | (key.constants == 0)
    elif getattr(layer, "scale", None) is not None and len(layer.scale.shape):
        graph.follow(layer.scale, 0, query.ids, "parameter")
    _may_go(graph, query.ids, zero, f"it counts in the scores of {graph.path}")
    shape = graph.shapes[0]
    constants = np.where(value.constants == 0, 0.0, np.nan)
    output = Channels(shape, len(shape) - 1, value.ids, constants)
    return [output, *(graph.opaque(other, f"scores of {graph.path}") for other in graph.shapes[1:])]


def _tensors(given) -> tuple[Channels, Channels, Channels]:
    """Query, key and value."""
    key = given.get("key")
    return given["query"], given["value"] if key is None else key, given["value"]


def _is_plain(layer, tensors) -> bool:
    """Whether channels lie along the last axis, and projections have no weights beside their kernels."""
    changed = any(
        getattr(dense, name, None)
        for dense in (*_denses(layer), layer._output_dense)
        for name in ("lora_enabled", "quantization_mode")
    )
    return not changed and all(isinstance(x, Channels) and x.axis == len(x.shape) - 1 for x in tensors)


def _denses(layer) -> tuple:
    return layer._query_dense, layer._key_dense, layer._value_dense


def _projected(dense, x: Channels, heads: np.ndarray | None, width: np.ndarray, graph: ChannelGraph) -> _Projection:
    """A projection to heads (None: to a single one that stays) of a width."""
    kernel = stored_variable(dense, "kernel")
    graph.consume(dense, kernel, 0, x)
    graph.require_constant(x, True, f"its output is constant but not zero, and {graph.path} attends to it")
    graph.compute(kernel, 2, width)
    if heads is not None:
        graph.compute(kernel, 1, heads)
    if dense.bias is not None:
        graph.follow(dense.bias, 1, width)
        if heads is not None:
            graph.follow(dense.bias, 0, heads)
    return _Projection(dense, heads, width)


def _none(alive: np.ndarray, axis: int) -> np.ndarray:
    return np.logical_not(np.any(alive, axis=axis))


def _may_go(graph: ChannelGraph, ids: np.ndarray, may: np.ndarray, reason: str) -> None:
    graph.require_constant(Channels((), 0, ids, np.where(may, 0.0, np.nan)), True, reason)


def _scaled_for(query: _Projection, width: np.ndarray, graph: ChannelGraph) -> None:
    """Keeps the scores what they are although they are divided by the root of another width."""
    for weight in (query.kernel, query.dense.bias):
        if weight is not None:
            graph.rescale(weight, width, lambda kept: math.sqrt(np.count_nonzero(kept) / len(kept)))


def _observed(output, x: Channels, heads: np.ndarray, values: np.ndarray, graph: ChannelGraph) -> None:
    """What the heads attend to is what the output projection is called with."""
    unknown = Channels((*x.shape[:-1], len(heads), len(values)), len(x.shape), values, np.full(len(values), np.nan))
    graph.observe(output, unknown)
    graph.observe(output, replace(unknown, axis=len(x.shape) - 1, ids=heads, constants=np.full(len(heads), np.nan)))


def _output(layer, heads: np.ndarray, graph: ChannelGraph) -> Channels:
    """The channels that the output projection computes."""
    dense = layer._output_dense
    kernel = stored_variable(dense, "kernel")
    channels = graph.produce(kernel, 2, graph.shapes[0])
    if dense.bias is not None:
        graph.follow(dense.bias, 0, channels.ids)
    masked = graph.is_masked(channels.ids)
    if masked is not None:
        return channels.with_constants(np.where(masked, 0.0, np.nan))
    bias = np.zeros(len(channels.ids)) if dense.bias is None else graph.value(dense.bias)
    return channels.with_constants(np.where(np.any(graph.value(kernel) != 0, axis=(0, 1)), np.nan, bias))


def _freeze_masks(given, heads: np.ndarray, graph: ChannelGraph) -> None:
    for name, x in given.items():
        if name.endswith("mask") and isinstance(x, Channels):
            graph.freeze(x, f"{graph.path} takes it as a mask")
            if len(x.shape) > 3:
                graph.freeze(heads, f"the mask of {graph.path} has an entry for each head")


def _scores(heads: np.ndarray, graph: ChannelGraph) -> list[Channels]:
    """The second output, if it is asked for, is as wide as there are heads."""
    if len(graph.shapes) == 1:
        return []
    graph.freeze(heads, f"{graph.path} returns its scores")
    return [graph.opaque(graph.shapes[1], f"scores of {graph.path}")]
