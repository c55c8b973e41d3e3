"""What a model would hold and compute after a compression that was not done yet."""

import keras
import numpy as np
from keras import layers

from keras_squeeze.analysis.encodings import encode
from keras_squeeze.analysis.report import grids_of
from keras_squeeze.introspection.functional import functional_of
from keras_squeeze.introspection.selection import CompressibleLayer, CompressibleWeight, Selection
from keras_squeeze.introspection.variables import read
from keras_squeeze.neuron_pruning.neuron_allocation import Allocation, Limits
from keras_squeeze.neuron_pruning.neurons import Neurons, Savings
from keras_squeeze.quantization.placement import LOW_BITS, find_ends
from keras_squeeze.quantizers import Affine, Quantizer
from keras_squeeze.weight_pruning.weight_allocation import keep_count

MULTIPLE = 8
"""Widths that runtimes compute without a rest are multiples of it."""

_CONVOLUTIONS = (
    *(layers.Conv1D, layers.Conv2D, layers.Conv3D),
    *(layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose),
    *(layers.SeparableConv1D, layers.SeparableConv2D),
    *(layers.DepthwiseConv1D, layers.DepthwiseConv2D),
)
_REASONS = 3


def saved_bytes(model, found: Selection, sparsity: float, quantizer: Quantizer | None) -> int:
    """Bytes that a packed file saves with so many zeros and this quantizer: weights are packed, as they are and so.

    Args:
        model: A built model.
        found: Its compressible layers.
        sparsity: Fraction of zeros of every weight; on a grid without zero there are none.
        quantizer: None: weights stay in float.
    """
    ends, grids = _ends(model, found, quantizer), grids_of(model)
    saved = 0
    for entry in found.layers:
        chosen = Affine(8) if id(unit_of(entry)) in ends else quantizer
        for weight in entry.weights:
            grid = grids.get(id(weight.variable))
            now = read(weight.variable) if grid is None else grid.values
            saved += encode(now).num_bytes - _weight_bytes(weight, sparsity, chosen)
    return saved


def without_neurons(model, fraction: float) -> tuple[int, int] | str:
    """`(parameters, MACs)` without a fraction of the neurons, or the reason why none can go.

    Every layer loses the same share, down to a multiple of 8, as with `prune_neurons(allocation="uniform")`.
    """
    if functional_of(model) is None:
        return "the model is subclassed, and does not say how its layers are connected"
    neurons = Neurons(model)
    allocation = Allocation(neurons.groups, Limits(MULTIPLE), "uniform", neurons.count)
    if len(allocation.stuck) == len(neurons.groups):
        reasons = [f"{group.name}: no smaller width is a multiple of {MULTIPLE}" for group in allocation.stuck]
        reasons += [f"{path}: {reason}" for path, reason in neurons.frozen]
        return "; ".join(reasons[:_REASONS])
    wanted = fraction * neurons.prunable
    gone = allocation.prune(
        np.zeros(neurons.count),
        lambda pruned: bool(np.count_nonzero(pruned) >= wanted),
        nearest=lambda pruned: abs(np.count_nonzero(pruned) - wanted),
    )
    return Savings(neurons).left(gone)


def unit_of(entry: CompressibleLayer) -> keras.Layer:
    """What the model calls for a layer: the layer itself, or the wrapper around it."""
    return next((parent for parent in entry.parents if functional_of(parent) is None), entry.layer)


def output_units(model, found: Selection) -> set[int]:
    """The units whose width is that of an output of the model, by identity; none where the model is subclassed."""
    units = {id(unit_of(entry)) for entry in found.layers}
    functional = functional_of(model)
    last, seen = set(), set()
    waiting = list(functional.outputs) if functional is not None else []
    while waiting:
        tensor = waiting.pop()
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        operation, node, _ = tensor._keras_history
        inner = functional_of(operation)
        if id(operation) in units:
            last.add(id(operation))
        elif inner is not None:
            waiting += inner.outputs
        else:
            waiting += operation._inbound_nodes[node].input_tensors
    return last


def is_convolution(entry: CompressibleLayer) -> bool:
    return isinstance(entry.layer, _CONVOLUTIONS)


def width_of(entry: CompressibleLayer) -> int:
    """Channels that a Dense layer or a convolution gives; 0 for others."""
    if isinstance(entry.layer, layers.Dense):
        return entry.layer.units
    return (getattr(entry.layer, "filters", 0) or 0) if is_convolution(entry) else 0


def _weight_bytes(weight: CompressibleWeight, sparsity: float, quantizer: Quantizer | None) -> int:
    """Of a packed weight, once its smallest magnitudes are zero and the others on a grid."""
    values = read(weight.variable)
    if quantizer is not None and not quantizer.has_zero:
        sparsity = 0.0
    gone = np.argsort(np.abs(values), axis=None, kind="stable")[: values.size - keep_count(values.size, sparsity)]
    values = np.array(values)
    values.reshape(-1)[gone] = 0
    if quantizer is not None:
        tensor = keras.ops.convert_to_tensor(values, "float32")
        values = keras.ops.convert_to_numpy(quantizer.for_weights()(tensor, None, weight.channel_axes))
    return encode(values).num_bytes


def _ends(model, found: Selection, quantizer: Quantizer | None) -> set[int]:
    """The units that `quantize_aware` gives 8 bits where others get very few, by identity."""
    if quantizer is None or quantizer.bits >= LOW_BITS or functional_of(model) is None:
        return set()
    units = {id(unit): unit for unit in map(unit_of, found.layers)}
    ends = find_ends(model, units.values())
    return set() if units.keys() <= ends else ends
