"""What is to be done to a model: what a user intends, or what was done to it already."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from keras_squeeze import checks, quantizers
from keras_squeeze.analysis.report import CompressionReport
from keras_squeeze.introspection.functional import functional_of
from keras_squeeze.introspection.selection import CompressibleWeight, Selection
from keras_squeeze.introspection.variables import read
from keras_squeeze.neuron_pruning.neurons import Neurons, Savings
from keras_squeeze.neuron_pruning.shrinking import kept_ids
from keras_squeeze.quantization.fake_quantize import FakeQuantize
from keras_squeeze.quantization.quantize_aware_layer import QuantizeAware
from keras_squeeze.quantizers import Affine, Binary, Quantizer
from keras_squeeze.weight_pruning.patterns import check_reachable, get_pattern

_KEYS = ("sparsity", "pattern", "neurons", "weights", "activations")
_FEW = 0.1  # zeros, as rounding makes them, that save next to nothing
_COARSE = 4  # bits of a grid on which rounding makes many zeros
_MANY = 0.5  # zeros that are more than rounding makes on such a grid


@dataclass(frozen=True)
class Plan:
    """What a user intends, or what a model has already."""

    sparsity: float = 0.0
    pattern: str = "unstructured"
    neurons: float = 0.0
    weights: Quantizer | None = None
    activations: Quantizer | None = None

    @property
    def is_empty(self) -> bool:
        return not self.sparsity and not self.neurons and self.weights is None

    @property
    def zeros(self) -> str:
        """The zeros in words."""
        unstructured = self.pattern == "unstructured"
        return f"{self.sparsity:.0%} {'unstructured zeros' if unstructured else f'zeros in pattern {self.pattern}'}"

    @property
    def has_binary_inputs(self) -> bool:
        return isinstance(self.weights, Binary) and self.weights.inputs is not None


@runtime_checkable
class Planned(Protocol):
    """What knows in these words what it does to a model: a `Recipe`."""

    def plan(self) -> Mapping: ...


def read_recipe(recipe) -> Plan:
    """What a user intends, checked."""
    recipe = recipe.plan() if isinstance(recipe, Planned) else recipe
    keys = ", ".join(map(repr, _KEYS))
    if recipe is None:
        return Plan()
    if not isinstance(recipe, Mapping):
        raise TypeError(
            f"`recipe` must be None, a `Recipe`, or a dict with any of the keys {keys}. Received: {recipe!r}"
        )
    if not recipe.keys() <= set(_KEYS):
        raise ValueError(f"`recipe` takes the keys {keys}. Received: {', '.join(map(repr, recipe))}")
    sparsity = checks.fraction("sparsity", recipe.get("sparsity", 0.0))
    neurons = checks.fraction("neurons", recipe.get("neurons", 0.0))
    pattern = recipe.get("pattern", "unstructured")
    check_reachable(sparsity, get_pattern(pattern))
    if "pattern" in recipe and pattern != "unstructured" and not sparsity:
        raise ValueError(
            '`recipe` has a pattern and no zeros to lie in it. Add their fraction, such as "sparsity": 0.5. Received: '
            f"{recipe!r}"
        )
    weights = quantizers.get(recipe.get("weights"))
    if weights is None:
        if recipe.get("activations") is not None:
            raise ValueError(
                "`recipe` quantizes activations and no weights, and no layer computes with these. Add a quantizer for "
                f'the weights, such as "weights": "int8". Received: {recipe!r}'
            )
        return Plan(sparsity, str(pattern), neurons)
    default = None if isinstance(weights, Binary) and weights.inputs else Affine(8)
    activations = quantizers.get(recipe.get("activations", default))
    if activations is not None:
        activations.for_activations()  # refuses what is for weights only
    return Plan(sparsity, str(pattern), neurons, weights, activations)


@dataclass(frozen=True)
class Zeros:
    """The zeros of a model that are not of a coarse grid.

    Attributes:
        sparsity: Scattered zeros, as a fraction of the weights outside of channels that are zero throughout.
        channels: How many channels are zero throughout.
    """

    sparsity: float
    channels: int


def zeros_of(model, report: CompressionReport, found: Selection) -> Zeros:
    """Counts a model's zeros; of weights that train on a grid those of the real weights, which rounding leaves out."""
    coarse = {row.path for row in report.layers if row.levels is not None and row.bits <= _COARSE}
    trained = {id(weight.variable) for layer in wrappers_of(model) for weight in layer.quantized_weights}
    zeros = size = channels = 0
    for entry in found.layers:
        for weight in entry.weights:
            rows = _by_channel(weight)
            alive = rows.any(axis=1)
            gone = rows[alive].size - np.count_nonzero(rows)
            size += rows[alive].size
            channels += np.count_nonzero(~alive)
            if entry.path not in coarse or id(weight.variable) in trained or gone >= _MANY * rows[alive].size:
                zeros += gone
    sparsity = zeros / max(size, 1)
    return Zeros(sparsity if sparsity > _FEW else 0.0, int(channels))


def shrunk(model) -> tuple[int, int] | None:
    """`(parameters, MACs)` that `shrink` would leave; None where it takes nothing out."""
    if functional_of(model) is None:
        return None
    neurons = Neurons(model)
    gone = np.ones(neurons.count, bool)
    gone[neurons.classes[kept_ids(neurons.graph, neurons.classes)]] = False
    return Savings(neurons).left(gone) if gone.any() else None


def wrappers_of(model) -> list[QuantizeAware]:
    return [layer for layer in model._flatten_layers() if isinstance(layer, QuantizeAware)]


def plan_of(model, report: CompressionReport, sparsity: float) -> Plan:
    """What a model has already: zeros, and quantizers or the grid that they left."""
    members = model._flatten_layers()
    wrappers = wrappers_of(model)
    chosen = [wrapper.weight_quantizer for wrapper in wrappers if wrapper.weight_quantizer is not None]
    weights = min(chosen, key=lambda quantizer: quantizer.bits, default=None)
    if weights is None and report.total.levels is not None:
        bits = min(int(row.bits) for row in report.layers if row.levels is not None)
        weights = Affine(bits) if bits > 1 else Binary()
    ranges = [layer.quantizer for layer in members if isinstance(layer, FakeQuantize) and layer.channels is None]
    activations = min(ranges, key=lambda quantizer: quantizer.bits, default=None)
    return Plan(sparsity, weights=weights, activations=None if weights is None else activations)


def label(quantizer: Quantizer) -> str:
    """A quantizer's name, or else its bits."""
    names = [name for name, known in quantizers.NAMES.items() if quantizer in (known, known.for_weights())]
    return names[0] if names else f"{quantizer.bits} bits"


def _by_channel(weight: CompressibleWeight) -> np.ndarray:
    """A weight's values, a row for every channel of its output; where it has none, for all of it."""
    values, axes = read(weight.variable), weight.channel_axes
    count = int(np.prod([values.shape[axis] for axis in axes]))
    return np.moveaxis(values, axes, range(len(axes))).reshape(count, -1)
