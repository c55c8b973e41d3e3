"""`quantize_aware` wraps a model's layers for quantization-aware training; `finalize` gives the plain model back."""

import warnings
from dataclasses import replace
from typing import Any

import keras
import numpy as np

from keras_squeeze import quantizers
from keras_squeeze.data import batches, inputs_only
from keras_squeeze.introspection.functional import (
    Rebuilder,
    compile_like,
    copy_layer,
    functional_of,
    nodes_of,
    require_graph,
)
from keras_squeeze.introspection.selection import (
    CompressibleLayer,
    LayerSelector,
    check_finite,
    compile_patterns,
    find_layers,
    select_layers,
)
from keras_squeeze.introspection.variables import read, require_tensorflow
from keras_squeeze.quantization import placement as placing
from keras_squeeze.quantization.fake_quantize import FakeQuantize
from keras_squeeze.quantization.placement import Placement
from keras_squeeze.quantization.quantize_aware_layer import QuantizeAware, takes_signs
from keras_squeeze.quantizers import Affine, Binary, Quantizer, UniformQuantizer

_EDGE_BITS = 8
_PRUNED = 0.001  # a larger part of zeros is no accident


def quantize_aware(
    model: keras.Model, weights="int8", activations="default", *, layers: LayerSelector = None
) -> keras.Model:
    """Copies a model for quantization-aware training: the same weights, seen through a grid.

    Layers with weights are wrapped in `QuantizeAware`. Quantizers of activations stand where integer kernels round:
    after a convolution or product with its batch normalization and ReLU, after sums, concatenations and global pooling,
    and at the inputs of the model. An activation that integer kernels compute apart, such as a softmax, becomes a layer
    of its own with a quantizer before it.

    With fewer than 4 bits, the first and the last layer keep 8 bits, where they have most to lose, if other layers are
    left; a dict for `weights` says exactly which layer gets what. Activations of fewer than 8 bits have 8 at the
    model's inputs and outputs, where classes would become equal by rounding.

    Args:
        model: A built Functional or Sequential model, nested ones included. It stays as it is.
        weights: A quantizer or its name: `"int8"`, `"int4"`, `"int2"`, `"fixed8"` (any number of bits from 2 to 16),
            `"ternary"`, `"binary"`, `"binary_connect"`, `"xnor"`; or `{regular expression: quantizer or name}`, where a
            layer takes the first expression that is found in its path, and layers that none matches stay in float.
        activations: A quantizer or its name; None quantizes weights only. By default `"int8"`, and None where `weights`
            is `"xnor"`.
        layers: Which layers, as in `MagnitudePruning`.

    Returns:
        A new model, not compiled. Compile and fit it like any other; `finalize` and `export` end the way.

    Raises:
        TypeError, ValueError: before anything is built: a model that is not built, subclassed or quantized already, an
            unknown name, a selection that matches nothing, weights that are not finite, pruned weights on a grid
            without zero, or binary inputs of which every sign would be the same. The message names the layer.

    Example:

    ```python
    q = ks.quantize_aware(model)
    q.compile("adam", loss, metrics=["accuracy"])
    q.fit(x, y, callbacks=[ks.QuantizationSchedule(delay=0.1, freeze=0.8)])
    ```

    Reference: Jacob et al. 2018, https://arxiv.org/abs/1712.05877
    """
    require_tensorflow()
    functional = require_graph(
        model,
        "Wrap its layers where they are made instead: self.dense = "
        "keras_squeeze.QuantizeAware(keras.layers.Dense(10)).",
    )
    wrapped = [layer.name for layer in model._flatten_layers() if isinstance(layer, (QuantizeAware, FakeQuantize))]
    if wrapped:
        raise ValueError(
            f"Model '{model.name}' is quantization-aware already: {', '.join(wrapped[:5])}. Begin with the model it "
            'was made from, or with keras_squeeze.finalize(model, activations="drop").'
        )
    selection = select_layers(model, layers)
    check_finite(selection.weights)
    chosen = _choose(weights, selection.layers)
    units = _units(functional, chosen, {id(entry.layer) for entry in find_layers(model).layers})
    if not isinstance(weights, dict):
        _keep_the_ends(model, units)
    xnor = [layer for layer, quantizer in units.values() if isinstance(quantizer, Binary) and quantizer.inputs]
    binary = [layer for layer in xnor if takes_signs(layer)]
    if activations == "default":
        activations = None if xnor else "int8"
    activations = quantizers.get(activations)
    if activations is not None:
        activations.for_activations()  # refuses what is for weights only
    placement = placing.place(model, [layer for layer, _ in units.values()], binary)
    if isinstance(activations, Binary) and not all(placement.quantized.values()):
        raise ValueError(
            "Binary activations after a ReLU would all be the same. Take the activations out of the model and put "
            'batch normalization in their place, or use weights="xnor", which binarizes the inputs of layers instead.'
        )
    _check_zeros(selection, chosen, units)
    wrapper = _Wrapper(model, units, activations, placement)
    result = wrapper.rebuild(model)
    for old, new in wrapper.variables():
        new.assign(read(old))
    for layer in result._flatten_layers():
        if isinstance(layer, QuantizeAware):
            layer.begin()
        elif isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()
    _warn_of_float(model, selection, placement if activations is not None else None)
    return result


def finalize(model: keras.Model, *, activations: str = "keep") -> keras.Model:
    """Takes the wrappers off: an ordinary model whose weights are on their grids.

    Args:
        model: A model with `QuantizeAware` layers, Functional or Sequential. It stays as it is.
        activations: `"keep"` leaves the quantizers of activations in, as `FakeQuantize` layers, so that predictions
            stay the same (a layer with binary inputs then stays wrapped, too); `"drop"` leaves nothing of this package
            in the model, under the layer names of the original one.

    Returns:
        A new model, compiled like the old one if that was, and if no loss goes by an output whose name has changed.

    Raises:
        TypeError, ValueError: no such model, `activations` is neither, or a `QuantizationSchedule` has not ended.

    Example:

    ```python
    plain = ks.finalize(q)
    plain.save("model.keras")
    ```
    """
    if activations not in ("keep", "drop"):
        raise ValueError(f'`activations` must be "keep" or "drop". Received: activations={activations!r}')
    require_graph(model, "Take the wrapped layers out by hand: `wrapper.layer`, `wrapper.quantized_values()`.")
    if not any(isinstance(layer, (QuantizeAware, FakeQuantize)) for layer in model._flatten_layers()):
        raise ValueError(
            f"Model '{model.name}' has no `QuantizeAware` layers. Make one: keras_squeeze.quantize_aware(model)."
        )
    for layer in model._flatten_layers():
        if isinstance(layer, FakeQuantize):
            layer.follow_variables()
            if layer.mixing:
                raise ValueError(
                    f"'{layer.name}' is still mixed with float: fit it to the end of a "
                    "QuantizationSchedule, then finalize."
                )
    finalizer = _Finalizer(model, keep=activations == "keep")
    result = finalizer.rebuild(model)
    wrapped = [layer for layer in result._flatten_layers() if isinstance(layer, QuantizeAware)]
    unfinished = [layer.name for layer in wrapped if not (activations == "keep" and layer.binary_inputs)]
    if unfinished:
        raise ValueError(
            f"Wrapped inside of other layers, which cannot be taken apart: {', '.join(unfinished)}. Wrap the outer "
            "layer instead: QuantizeAware(TimeDistributed(layer))."
        )
    new_of = {}
    for old, new in finalizer.variables():
        new.assign(read(old))
        new_of[id(old)] = new
    for layer in model._flatten_layers():
        if isinstance(layer, QuantizeAware):
            for variable, values in layer.quantized_values():
                new_of[id(variable)].assign(values)
    for layer in result._flatten_layers():
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()  # it computes with what it has derived from its weights
    by_name = model.compiled and any(isinstance(part, dict) for part in model._compile_config.config.values())
    if not by_name or functional_of(model).output_names == functional_of(result).output_names:
        compile_like(model, result)
    return result


def calibrate(model: keras.Model, data, *, num_batches: int | None = None) -> None:
    """Measures the ranges of activations on data, without training: quantization after training.

    A range covers what it is in every batch; with `range="percentile"` or `"mse"` that of the widest batch.

    Args:
        model: What `quantize_aware` returned.
        data: Inputs: an array (for several inputs a list or a dict of arrays), `(x, y)`, or a `tf.data.Dataset` of
            batches.
        num_batches: How many batches to look at; None: all.

    Raises:
        ValueError: `data` is empty or gives values that are not finite, or the model has no quantizers.
    """
    layers = [layer for layer in model._flatten_layers() if isinstance(layer, FakeQuantize)]
    if not layers:
        raise ValueError(f"Model '{model.name}' has no quantizers to calibrate.")
    before = [(variable, read(variable).copy()) for layer in layers for variable in layer.variables]
    for layer in layers:
        layer.observing = layer.channels is None
        if layer.observing:
            layer.reset()
    try:
        for x, _, _ in batches(inputs_only(model, data), num_batches):
            model(x, training=False)
        unknown = [layer.name for layer in layers if layer.observing and not layer.is_known]
        if unknown:
            raise ValueError(
                f"No range was found for {', '.join(unknown[:5])}: `data` gives them NaN or infinite values."
            )
    except Exception:
        for variable, value in before:
            variable.assign(value)
        raise
    finally:
        for layer in layers:
            layer.observing = False


Units = dict[int, tuple[keras.Layer, Quantizer]]
"""The layers that get a wrapper, and how their weights are quantized, by identity."""


def _choose(weights, found) -> list[tuple[CompressibleLayer, Quantizer]]:
    """The quantizer of every selected layer that gets one."""
    if not isinstance(weights, dict):
        quantizer = quantizers.get(weights)
        if quantizer is None:
            raise ValueError("`weights` must be a quantizer or its name. Received: weights=None")
        return [(entry, quantizer) for entry in found]
    if not weights:
        raise ValueError("`weights` must name a quantizer for some layers. Received: weights={}")
    patterns = list(zip(compile_patterns(weights), map(quantizers.get, weights.values()), strict=True))
    matches = [(entry, next((q for pattern, q in patterns if pattern.search(entry.path)), None)) for entry in found]
    unused = [p.pattern for p, _ in patterns if not any(p.search(entry.path) for entry in found)]
    if unused:
        raise ValueError(
            f"`weights`: no selected layer matches {', '.join(map(repr, unused))}. Layers: "
            f"{', '.join(entry.path for entry in found)}."
        )
    return [(entry, quantizer) for entry, quantizer in matches if quantizer is not None]


def _units(functional, chosen, compressible: set[int]) -> Units:
    """What the model calls for each selected layer: the layer itself, or the `TimeDistributed`, ... around it."""
    by_layer = {id(entry.layer): quantizer for entry, quantizer in chosen}
    units: Units = {}
    for node in nodes_of(functional):
        layer = node.operation
        if functional_of(layer) is not None:
            units.update(_units(functional_of(layer), chosen, compressible))
        elif isinstance(layer, keras.layers.Layer):
            inside = [by_layer.get(id(part)) for part in layer._flatten_layers() if id(part) in compressible]
            if any(inside) and any(quantizer != inside[0] for quantizer in inside):
                raise ValueError(
                    f"'{layer.name}' is wrapped as a whole, so that all its parts get the same quantizer, or none. "
                    f"Received: {', '.join(map(str, inside))}"
                )
            if inside and inside[0]:
                units[id(layer)] = layer, inside[0]
    return units


def _keep_the_ends(model, units: Units) -> None:
    """Gives the first and the last layer 8 bits where they would get few, and where others are left that do."""
    ends = placing.find_ends(model, [layer for layer, _ in units.values()])
    if units.keys() <= ends:
        return
    for id_ in ends:
        layer, quantizer = units[id_]
        if quantizer.bits < placing.LOW_BITS:
            units[id_] = layer, Affine(_EDGE_BITS)


def _check_zeros(selection, chosen, units: Units) -> None:
    paths = []
    quantizer_of = {id(part): q for layer, q in units.values() for part in layer._flatten_layers()}
    for entry, _ in chosen:
        if not quantizer_of[id(entry.layer)].has_zero:
            for weight in entry.weights:
                zeros = np.mean(read(weight.variable) == 0)
                paths += [f"{weight.path} ({zeros:.0%} zeros)"] if _PRUNED < zeros < 1 else []
    if paths:
        raise ValueError(
            f"Pruned weights would not stay zero on a binary grid, which has none: {', '.join(paths)}. Use "
            'weights="ternary", or give these layers another quantizer: weights={regular expression: quantizer}.'
        )


def _warn_of_float(model, selection, placement: Placement | None) -> None:
    in_float = [f"{path} (not in the layer table: keras_squeeze.register_layer)" for path in selection.unknown]
    in_float += [path for path in placement.left if path not in selection.unknown] if placement else []
    if in_float:
        warnings.warn(f"Model '{model.name}': left in float: {', '.join(in_float)}.", stacklevel=3)


@keras.saving.register_keras_serializable(package="keras_squeeze")
class SplitActivation(keras.layers.Activation):
    """The activation of a layer that integer kernels compute apart; `finalize(activations="drop")` puts it back."""


class _Wrapper(Rebuilder):
    """Puts wrappers around layers and quantizers behind them."""

    def __init__(self, model, units: Units, activations: Quantizer | None, placement: Placement):
        super().__init__()
        self._units, self._activations, self._placement = units, activations, placement
        self._outputs = {tensor._keras_history[0].name for tensor in functional_of(model).outputs}
        self._names = {layer.name for layer in model._flatten_layers()}
        self._added: dict[int, list[keras.Layer]] = {}

    def make(self, layer):
        if id(layer) not in self._units:
            return super().make(layer)
        weights = self._units[id(layer)][1]
        if self._splits(layer):
            return QuantizeAware(copy_layer(layer, {"activation": "linear"}), weights, self._activations_at(layer))
        # An output keeps its name, by which losses and metrics are given.
        options = {"name": layer.name} if layer.name in self._outputs else {}
        return QuantizeAware(copy_layer(layer), weights, self._output_quantizer(layer), **options)

    def skips(self, operation):
        return id(operation) in self._placement.bypassed

    def following(self, layer):
        if id(layer) not in self._added:
            self._added[id(layer)] = self._make_following(layer)
        return self._added[id(layer)]

    def counterparts(self, old, new):
        return old, new.layer if isinstance(new, QuantizeAware) else new

    def _splits(self, layer) -> bool:
        return (
            self._activations is not None
            and id(layer) in self._units
            and placing.splits(layer)
            and not _is_composite(layer)
        )

    def _make_following(self, layer):
        extra: list[keras.Layer] = []
        dtype = getattr(layer, "dtype_policy", None)
        if self._splits(layer):
            extra.append(SplitActivation(layer.activation, name=self._unused(f"{layer.name}_activation"), dtype=dtype))
        elif id(layer) in self._units:
            return extra
        quantizer = self._output_quantizer(layer)
        if quantizer is not None:
            name = self._unused(f"quantized_{extra[0].name if extra else layer.name}")
            if extra and layer.name in self._outputs:
                name = layer.name
            extra.append(FakeQuantize(quantizer, name=name, dtype=dtype))
        return extra

    def _unused(self, name: str) -> str:
        """A name that no layer of the model has."""
        while name in self._names:
            name = f"{name}_"
        self._names.add(name)
        return name

    def _output_quantizer(self, layer) -> Quantizer | None:
        signed = self._placement.quantized.get(id(layer))
        quantizer = self._activations_at(layer)
        if quantizer is None or signed is None:
            return None
        fixed = placing.FIXED_RANGES.get(placing.activation_name(layer) or "")
        if fixed is not None and quantizer == Affine(_EDGE_BITS):
            return replace(quantizer, range=fixed).for_activations()
        return quantizer.for_activations(signed=signed)

    def _activations_at(self, layer) -> Quantizer | None:
        """The quantizer asked for, and at the ends of the model one of 8 bits at least."""
        few = isinstance(self._activations, UniformQuantizer) and self._activations.bits < _EDGE_BITS
        return Affine(_EDGE_BITS) if few and id(layer) in self._placement.ends else self._activations


class _Finalizer(Rebuilder):
    """Takes wrappers off; quantizers of activations stay or go."""

    def __init__(self, model, *, keep: bool):
        super().__init__()
        self._keep = keep
        self._inner = {layer.layer.name for layer in model._flatten_layers() if isinstance(layer, QuantizeAware)}
        self._added: dict[int, list[keras.Layer]] = {}
        self._activations: dict[int, Any] = {}  # of layers that were split, and are joined again
        self._joined: set[int] = set()
        if not keep:
            self._join(model)

    def make(self, layer):
        if isinstance(layer, FakeQuantize) and layer.name in self._inner:  # the layer itself has this name again
            return FakeQuantize.from_config({**layer.get_config(), "name": f"quantized_{layer.name}_activation"})
        if not isinstance(layer, QuantizeAware) or self._stays(layer):
            return super().make(layer)
        activation = self._activations.get(id(layer))
        return copy_layer(layer.layer, {"activation": activation} if activation else None)

    def skips(self, operation):
        return id(operation) in self._joined or (isinstance(operation, FakeQuantize) and not self._keep)

    def following(self, layer):
        if not (self._keep and isinstance(layer, QuantizeAware) and layer.output_quantizer) or self._stays(layer):
            return []
        if id(layer) not in self._added:
            quantize = layer.output_quantizer
            extra = FakeQuantize.from_config({**quantize.get_config(), "name": f"quantized_{layer.layer.name}"})
            self._added[id(layer)] = [extra]
            self._made[id(quantize)] = quantize, extra
        return self._added[id(layer)]

    def counterparts(self, old, new):
        return (old.layer, new) if isinstance(old, QuantizeAware) and not self._stays(old) else (old, new)

    def _stays(self, layer) -> bool:
        return self._keep and layer.binary_inputs is not None

    def _join(self, model) -> None:
        for node, reader in placing.only_reader(model):
            layer = node.operation
            if functional_of(layer) is not None:
                self._join(layer)
            elif isinstance(layer, QuantizeAware) and _is_split_off(reader):
                self._activations[id(layer)] = reader.activation
                self._joined.add(id(reader))


def _is_split_off(reader) -> bool:
    """Whether a layer is the activation that `quantize_aware` took from another one."""
    return isinstance(reader, SplitActivation)


def _is_composite(layer) -> bool:
    """A layer made of others may use its activation anywhere."""
    return bool(layer._layers)
