"""Making up for removed neurons: their mean activation goes into the next bias, statistics are measured anew.

What a layer reads of a removed neuron was not zero but had a mean; the rest of it is lost, the mean need not be
(Molchanov et al. 2017 replace by zero; the mean is the constant with the least squared error). Batch normalizations
then count again on what is left (Li et al. 2020, "EagleEye", https://arxiv.org/abs/2007.02491).
"""

import contextlib
import weakref
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from keras_squeeze.channel_graph.activation_recorder import observe
from keras_squeeze.channel_graph.graph import ChannelGraph
from keras_squeeze.data import batches, inputs_only
from keras_squeeze.introspection.variables import changed, read

Shift = tuple[Any, np.ndarray]
"""A bias, and what is added to it."""


@dataclass(frozen=True, eq=False)
class _Before:
    """What masked entries of weights were: `(weight, True where it is masked, the values there)`, and a checksum of the
    model after that."""

    masked: list[tuple[Any, np.ndarray, np.ndarray]]
    checksum: int


_before: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def remembering(model: keras.Model, masks: Iterable[tuple[Any, np.ndarray]]) -> Iterator[None]:
    """Notes what `masks` make zero inside of the context; when weights change after it, that is of no use any more."""
    valid = {id(weight): (gone, values) for weight, gone, values in _valid(model)}
    masked = []
    for weight, keep in masks:
        values = np.array(read(weight))
        if id(weight) in valid:
            gone, earlier = valid[id(weight)]
            values[gone] = earlier
        masked.append((weight, ~keep, values[~keep]))
    yield
    _before[model] = _Before(masked, _checksum(model))


def shifts(model: keras.Model, graph: ChannelGraph, kept: np.ndarray, data) -> list[Shift]:
    """What to add to biases for the neurons that go, on top of constants that are folded anyway.

    Args:
        model: Masked by `prune_neurons`, and not trained since; else there is nothing to add.
        graph: Its channel graph.
        kept: Boolean per id of the graph.
        data: Inputs.
    """
    masked = _valid(model)
    if not masked:
        return []
    sums: dict[int, np.ndarray] = {}
    counts: dict[int, int] = {}

    def see(layer, channels, values) -> None:
        tensor_key = id(channels)
        sums[tensor_key] = sums.get(tensor_key, 0.0) + values.sum(axis=0, dtype="float64")
        counts[tensor_key] = counts.get(tensor_key, 0) + len(values)

    with changed(_unmasked(masked)):
        observe(model, graph, inputs_only(model, data), None, see)
    if not all(np.isfinite(total).all() for total in sums.values()):
        raise ValueError("`compensate` gives activations that are not finite: look for NaN or infinity in the data.")
    by_weight: dict[int, list[Shift]] = {}
    for usage in graph.reads:
        tensor_key, channels = id(usage.channels), usage.channels
        if tensor_key not in sums:
            continue
        missing = sums[tensor_key] / counts[tensor_key] - np.nan_to_num(channels.constants)
        missing = np.where(kept[channels.ids], 0.0, missing)
        kernel = np.moveaxis(graph.value(usage.kernel), (usage.in_axis, usage.out_axis), (-2, -1))
        shift = np.einsum("kio,i->o", kernel.reshape(-1, *kernel.shape[-2:]), missing)
        by_weight.setdefault(id(usage.bias), []).append((usage.bias, shift))
    # A layer that is called several times has one bias for all calls.
    return [(calls[0][0], np.mean([shift for _, shift in calls], axis=0)) for calls in by_weight.values()]


def recalibrate(model: keras.Model, data) -> None:
    """Measures the statistics of batch normalizations anew: the average over all batches of the data."""
    layers = [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]
    if not layers:
        return
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(_counting(layer))
        for number, (x, _, _) in enumerate(batches(inputs_only(model, data), None)):
            for layer in layers:
                layer.momentum = number / (number + 1)
            model(x, training=False)
    for layer in layers:
        if not np.isfinite(read(layer.moving_variance)).all():
            raise ValueError(
                f"`compensate` gives {layer.name} statistics that are not finite: look for NaN in the data."
            )


def has_something(model: keras.Model) -> bool:
    """Whether there is anything to make up for: what was masked is known, or there are statistics."""
    normalized = any(isinstance(layer, keras.layers.BatchNormalization) for layer in model._flatten_layers())
    return normalized or bool(_valid(model))


def _valid(model: keras.Model) -> list[tuple[Any, np.ndarray, np.ndarray]]:
    before = _before.get(model)
    return before.masked if before is not None and before.checksum == _checksum(model) else []


def _checksum(model: keras.Model) -> int:
    result = 0
    for weight in model.weights:
        result = zlib.crc32(np.ascontiguousarray(read(weight)).tobytes(), result)
    return result


def _unmasked(masked) -> list[tuple[Any, np.ndarray]]:
    """Weights, and what they were before they were masked."""
    slices = []
    for weight, gone, earlier in masked:
        values = np.array(read(weight))
        values[gone] = earlier
        slices.append((weight, values))
    return slices


@contextlib.contextmanager
def _counting(layer: keras.layers.BatchNormalization) -> Iterator[None]:
    """The layer normalizes by the batch, and updates its statistics, although the model does not train."""
    call, momentum, trainable = layer.call, layer.momentum, layer.trainable

    def counting(inputs, *args, **kwargs):
        return call(inputs, *args, **{**kwargs, "training": True})

    vars(layer)["call"] = counting
    layer.trainable = True
    try:
        yield
    finally:
        del vars(layer)["call"]
        layer.momentum = momentum
        layer.trainable = trainable
