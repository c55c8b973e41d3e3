"""Which weights of which layers can be compressed: the one layer table.

The table has a row for each kind of layer: the attributes that hold its compressible weights, and the formula
that counts its multiply-accumulates. A layer is looked up by its class, then by the classes it derives from, so
a subclass of `Dense` is treated as a `Dense` until `register_layer` gives it a row of its own.
"""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import keras
import numpy as np
from keras.src.backend import Variable  # the exported `keras.Variable` was a subclass of it until Keras 3.8
from keras.src.layers.rnn.conv_lstm import ConvLSTMCell  # Keras exports the layers but not their cell

from keras_squeeze.introspection import mac_formulas as mac_formulas

Layers = Any
"""A selection: None, regular expression(s), layer class(es), layer(s), or a predicate `layer -> bool`."""


@dataclass(frozen=True, eq=False)
class CompressibleWeight:
    """One weight that can be compressed.

    Attributes:
        name: Name inside its layer, such as `"kernel"` or `"query/kernel"`.
        path: Path inside the model, such as `"encoder/attention/query/kernel"`.
        variable: The `keras.Variable` that stores it (never a computed tensor).
        input_axis: The axis that is summed over when the layer is applied; n:m patterns run along it.
        channel_axes: The axes of the outputs, negative; a scale per channel has an entry for each of theirs. Empty
            where a kernel of integers takes one scale only.
        depthwise: Whether it filters every channel by itself.
    """

    name: str
    path: str
    variable: keras.Variable
    input_axis: int
    channel_axes: tuple[int, ...] = (-1,)
    depthwise: bool = False

    @property
    def output_axes(self) -> tuple[int, ...]:
        """The axes along which outputs lie."""
        return self.channel_axes or (-1,)


@dataclass(frozen=True, eq=False)
class CompressibleLayer:
    """A layer with a row in the table, where it stands in a model, and its weights.

    A multi-head attention or an LSTM is one such layer, with the weights of its parts.
    """

    path: str
    layer: keras.Layer
    weights: tuple[CompressibleWeight, ...]
    parents: tuple[keras.Layer, ...]


@dataclass(frozen=True, eq=False)
class Selection:
    """What was found in a model.

    Attributes:
        layers: The compressible layers.
        skipped: `(path, reason)` of every other layer that has weights.
        unknown: The part of `skipped` whose class is not in the table although it has trainable weights.
    """

    layers: tuple[CompressibleLayer, ...]
    skipped: tuple[tuple[str, str], ...]
    unknown: tuple[str, ...]

    @property
    def weights(self) -> list[CompressibleWeight]:
        return [weight for layer in self.layers for weight in layer.weights]


@dataclass(frozen=True)
class _Row:
    """One row of the table: `weights` maps attribute names to input axes (an int, or a function of the layer).

    `channels` does the same for the axes of the outputs, where they are not the last axis.
    """

    weights: Mapping[str, int | Callable[[Any], int]]
    macs: mac_formulas.MacFormula | None = None
    channels: Mapping[str, tuple[int, ...] | Callable[[Any], tuple[int, ...]]] = field(default_factory=dict)
    depthwise: tuple[str, ...] = ()  # weights that filter every channel by itself
    whole: bool = False  # the weights are those of the layer's parts, which have rows themselves
    registered: bool = False  # by a user, so that a weight which is not there is a mistake
    refuses: Callable[[Any], str | None] | None = None  # of a wrapper: why weights inside of it cannot be pruned
    hidden: bool = False  # its weights are bookkeeping that does not ship


def _contracted_axis(layer) -> int:
    """The last kernel axis that an `EinsumDense` equation sums over."""
    kernel, output = _einsum_letters(layer)
    return max((axis for axis, letter in enumerate(kernel) if letter not in output), default=0)


def _einsum_channels(layer) -> tuple[int, ...]:
    """The kernel axes that an `EinsumDense` equation keeps."""
    kernel, output = _einsum_letters(layer)
    return tuple(axis - len(kernel) for axis, letter in enumerate(kernel) if letter in output)


def _einsum_letters(layer) -> tuple[str, str]:
    operands, output = layer.equation.replace(" ", "").split("->")
    return operands.split(",")[1], output


def _built_in_table() -> dict[type, _Row]:
    layers = keras.layers
    table: dict[type, _Row] = {
        layers.Dense: _Row({"kernel": -2}, mac_formulas.dense),
        layers.EinsumDense: _Row({"kernel": _contracted_axis}, mac_formulas.einsum, {"kernel": _einsum_channels}),
        layers.Embedding: _Row(
            {"embeddings": -2, "reverse_embeddings": -2},
            mac_formulas.embedding,
            {"embeddings": (), "reverse_embeddings": ()},
        ),
        layers.MultiHeadAttention: _Row({}, mac_formulas.multi_head_attention, whole=True),
        layers.GroupQueryAttention: _Row({}, mac_formulas.grouped_query_attention, whole=True),
        layers.RNN: _Row({}, mac_formulas.recurrent, whole=True),
    }
    for cell in (layers.LSTMCell, layers.GRUCell, layers.SimpleRNNCell, ConvLSTMCell):
        table[cell] = _Row({"kernel": -2, "recurrent_kernel": -2}, mac_formulas.recurrent_cell)
    for convolution in (layers.Conv1D, layers.Conv2D, layers.Conv3D):
        table[convolution] = _Row({"kernel": -2}, mac_formulas.convolution)
    for transposed in (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose):
        table[transposed] = _Row({"kernel": -1}, mac_formulas.transposed_convolution, {"kernel": (-2,)})
    for depthwise in (layers.DepthwiseConv1D, layers.DepthwiseConv2D):
        table[depthwise] = _Row({"kernel": -2}, mac_formulas.depthwise_convolution, {"kernel": (-2, -1)}, ("kernel",))
    for separable in (layers.SeparableConv1D, layers.SeparableConv2D):
        kernels = {"depthwise_kernel": -2, "pointwise_kernel": -2}
        channels = {"depthwise_kernel": (-2, -1)}
        table[separable] = _Row(kernels, mac_formulas.separable_convolution, channels, ("depthwise_kernel",))
    for recurrent in (layers.ConvLSTM1D, layers.ConvLSTM2D, layers.ConvLSTM3D):
        table[recurrent] = _Row({}, mac_formulas.recurrent_convolution, whole=True)
    for name in (
        "BatchNormalization",
        "LayerNormalization",
        "GroupNormalization",
        "RMSNormalization",
        "UnitNormalization",
        "SpectralNormalization",
        "Normalization",
        "PReLU",
    ):
        if hasattr(layers, name):
            table[getattr(layers, name)] = _Row({})
    return table


_TABLE = _built_in_table()


def register_layer(
    layer_class: type,
    weights: Sequence[str] | Mapping[str, int],
    *,
    macs: mac_formulas.MacFormula | None = None,
) -> None:
    """Teaches this package which weights of a custom layer can be compressed.

    Args:
        layer_class: The layer's class; a row for it replaces one inherited from a base class.
        weights: Names of the attributes that hold the weights, or a mapping from names to the axis that is
            summed over when the layer is applied (only n:m patterns use it; default -2). Empty: leave this
            layer alone, without a warning.
        macs: Optional function `(layer, input_shapes, output_shapes) -> {weight name: MACs}` for shapes with
            a batch of one. Without it, reports count no MACs for this layer.

    Raises:
        TypeError: `layer_class` is not a subclass of `keras.Layer`, or a weight's name is not a string.

    Example:

    ```python
    ks.register_layer(Adapter, ["down", "up"])
    ```
    """
    if not (isinstance(layer_class, type) and issubclass(layer_class, keras.Layer)):
        raise TypeError(f"`layer_class` must be a subclass of `keras.Layer`. Received: {layer_class!r}")
    names = [weights] if isinstance(weights, str) else list(weights)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"`weights` must be names of attributes of the layer. Received: {weights!r}")
    axes = weights if isinstance(weights, Mapping) else dict.fromkeys(names, -2)
    _TABLE[layer_class] = _Row(dict(axes), macs, registered=True)


def register_wrapper(layer_class: type, refuses: Callable[[Any], str | None]) -> None:
    """Adds a layer that holds others to the table.

    Args:
        layer_class: The wrapper's class.
        refuses: Function from a wrapper to the reason why weights inside of it cannot be pruned; None where they can.
    """
    _TABLE[layer_class] = _Row({}, refuses=refuses)


def register_bookkeeping(layer_class: type) -> None:
    """Leaves a layer out of selections and reports: what it keeps is for the training only."""
    _TABLE[layer_class] = _Row({}, hidden=True)


def in_table(layer: keras.Layer) -> bool:
    """Whether a layer, or a class that it derives from, is in the layer table."""
    return _row(layer) is not None


def mac_formula(layer: keras.Layer) -> mac_formulas.MacFormula | None:
    """The formula that counts a layer's multiply-accumulates, None where the table has none."""
    row = _row(layer)
    return row.macs if row else None


def find_layers(model: keras.Model) -> Selection:
    """Lists every compressible layer of a built model; a shared layer or weight is listed once.

    Args:
        model: Any built Keras model: Sequential, Functional, subclassed, nested.

    Raises:
        TypeError: `model` is not a Keras model.
        ValueError: the model is not built, or Keras runs on another backend than TensorFlow.
    """
    require_tensorflow()
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a `keras.Model`. Received: {model!r} of type {type(model).__name__}")
    if not model.built:
        raise ValueError(
            f"Model '{model.name}' is not built, so it has no weights yet. Call it on a batch of data, call "
            "`model.build(input_shape)`, or begin a Sequential model with `keras.Input(shape)`."
        )
    finder = _Finder()
    finder.add(model, _row(model), model.name, ())
    finder.visit(model, "", ())
    return finder.selection()


def layers_with_paths(model: keras.Model) -> Iterator[tuple[str, keras.Layer]]:
    """Every layer inside a model, at any depth and once, with its path such as `"encoder/dense_1"`."""
    seen: set[int] = set()

    def visit(parent, prefix: str):
        for layer in parent._layers:
            if id(layer) not in seen:
                seen.add(id(layer))
                yield f"{prefix}{layer.name}", layer
                yield from visit(layer, f"{prefix}{layer.name}/")

    yield from visit(model, "")


def layer_weights(layer: keras.Layer) -> tuple[list[CompressibleWeight], list[tuple[str, str]]]:
    """The compressible weights of one built layer and of the layers in it, and `(path, reason)` of those skipped."""
    finder = _Finder()
    row = _row(layer)
    finder.add(layer, row, layer.name, ())
    if row is None or not row.whole:
        finder.visit(layer, f"{layer.name}/", ())
    found = finder.selection()
    weights = [replace(weight, name=weight.path[len(layer.name) + 1 :]) for weight in found.weights]
    return weights, list(found.skipped)


def select_layers(model: keras.Model, layers: Layers = None, *, trainable_only: bool = False) -> Selection:
    """The compressible layers of a model that a selection names.

    Args:
        model: A built Keras model.
        layers: None (all that can be), a regular expression or list of them (`re.search` on the layer's path
            inside the model, such as `"encoder/dense_1"`), a layer class or tuple of them, a layer or list of
            layers, or a predicate `layer -> bool`. Naming a wrapper or a nested model selects what is in it.
        trainable_only: Leave out frozen weights, whose values training does not change.

    Raises:
        TypeError: `layers` is none of these.
        ValueError: nothing compressible matches, a regular expression does not compile, or a layer is not in
            the model.
    """
    everything = find_layers(model)
    matches = _matcher(model, layers)
    chosen, skipped = [], list(everything.skipped)
    for entry in everything.layers:
        if not matches(entry):
            continue
        usable = [w for w in entry.weights if w.variable.trainable or not trainable_only]
        skipped += [(w.path, "frozen (trainable=False)") for w in entry.weights if w not in usable]
        if usable:
            chosen.append(CompressibleLayer(entry.path, entry.layer, tuple(usable), entry.parents))
    if not chosen:
        raise ValueError(_nothing_selected(model, layers, everything, skipped))
    unknown = everything.unknown if layers is None else ()
    return Selection(tuple(chosen), tuple(skipped), unknown)


def compile_patterns(patterns: Iterable[str]) -> list[re.Pattern]:
    """Compiles regular expressions; one that does not compile is a `ValueError` that names it."""
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except (re.error, TypeError) as error:
            raise ValueError(
                f"Layers are selected by regular expressions, and this one does not compile: {error}. "
                f"Received: {pattern!r}"
            ) from None
    return compiled


def check_finite(weights: Iterable[CompressibleWeight]) -> None:
    """Raises a `ValueError` that names every weight with NaN or infinite values."""
    with np.errstate(invalid="ignore"):  # infinities of both signs add up to NaN
        bad = [w.path for w in weights if not np.isfinite(np.sum(read(w.variable), dtype="float64"))]
    if bad:
        raise ValueError(
            f"Weights must be finite to be compared. NaN or infinite values in: {', '.join(bad)}. Load a sound "
            "checkpoint, or train with a lower learning rate."
        )


def read(variable: keras.Variable) -> np.ndarray:
    """A variable's value as a read-only array that shares its memory; do not keep it while the model trains."""
    import tensorflow as tf

    return np.asarray(tf.convert_to_tensor(variable.value))


@contextlib.contextmanager
def changed(changes: Iterable[tuple[keras.Variable, np.ndarray]]) -> Iterator[None]:
    """Gives variables other values, for a while."""
    changes = list(changes)
    before = [(variable, np.array(read(variable))) for variable, _ in changes]
    try:
        for variable, value in changes:
            variable.assign(value)
        yield
    finally:
        for variable, value in before:
            variable.assign(value)


def require_tensorflow() -> None:
    """Raises a `ValueError` unless Keras runs on TensorFlow, the backend that this package is tested on."""
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            "keras_squeeze runs on Keras's TensorFlow backend. Received: KERAS_BACKEND="
            f"{keras.backend.backend()!r}. Set the environment variable KERAS_BACKEND=tensorflow before Keras "
            "is imported."
        )


def _row(layer: keras.Layer) -> _Row | None:
    return next((_TABLE[base] for base in type(layer).__mro__ if base in _TABLE), None)


class _Finder:
    """Walks a model depth first; a layer or weight that is met again is not listed again."""

    def __init__(self):
        self.found: dict[int, CompressibleLayer] = {}
        self.skipped: list[tuple[str, str]] = []
        self.unknown: list[str] = []
        self._seen_layers: set[int] = set()
        self._seen_weights: set[int] = set()

    def selection(self) -> Selection:
        return Selection(tuple(self.found.values()), tuple(self.skipped), tuple(self.unknown))

    def visit(self, parent, prefix: str, parents: tuple) -> None:
        for layer in parent._layers:
            row = _row(layer)
            if id(layer) not in self._seen_layers:
                self._seen_layers.add(id(layer))
                self.add(layer, row, f"{prefix}{layer.name}", parents)
            elif id(layer) in self.found:
                known = self.found[id(layer)]
                self.found[id(layer)] = replace(known, parents=(*known.parents, *parents))
            if row is None or not row.whole:
                self.visit(layer, f"{prefix}{layer.name}/", (*parents, layer))

    def add(self, layer, row: _Row | None, path: str, parents: tuple) -> None:
        weights = list(self._weights(layer, row, path, ""))
        refusal = next(filter(None, map(_refusal, parents)), None)
        if weights and refusal:
            self.skipped += [(weight.path, refusal) for weight in weights]
        elif weights:
            self.found[id(layer)] = CompressibleLayer(path, layer, tuple(weights), parents)
        elif row and not row.whole and not row.weights and not row.hidden and layer._trainable_variables:
            self.skipped.append((path, f"{type(layer).__name__} has no weights worth compressing"))

    def _weights(self, layer, row: _Row | None, path: str, prefix: str) -> Iterator[CompressibleWeight]:
        """The weights that a row names; those that cannot be taken go to `skipped`."""
        if row is None:
            if layer._trainable_variables:
                self.unknown.append(path)
                self.skipped.append((path, _unknown_reason(layer)))
        elif row.whole:
            for part in layer._layers:
                part_row = _row(part) or (_Row({}, whole=True) if part._layers else None)
                yield from self._weights(part, part_row, path, f"{prefix}{part.name}/")
        elif row.weights and not layer.built:
            self.skipped.append((path, "not built: no call of the model has reached it"))
        else:
            for name, axis in row.weights.items():
                variable = _underlying(layer, name)
                if variable is None and row.registered:
                    self.skipped.append((f"{path}/{prefix}{name}", f"{type(layer).__name__} has no such weight"))
                if variable is None or id(variable) in self._seen_weights:
                    continue
                self._seen_weights.add(id(variable))
                reason = _unusable(layer, variable)
                if reason:
                    self.skipped.append((f"{path}/{prefix}{name}", reason))
                    continue
                channels = row.channels.get(name, (-1,))
                yield CompressibleWeight(
                    f"{prefix}{name}",
                    f"{path}/{prefix}{name}",
                    variable,
                    axis(layer) if callable(axis) else axis,
                    channels(layer) if callable(channels) else channels,
                    name in row.depthwise,
                )


def _refusal(parent) -> str | None:
    row = _row(parent)
    return row.refuses(parent) if row is not None and row.refuses is not None else None


def _underlying(layer, name: str):
    """The stored variable: `kernel` itself is a property that computes with LoRA or Keras's quantization."""
    stored = layer.__dict__.get(f"_{name}", None)
    if stored is None and isinstance(getattr(type(layer), name, None), property):
        return None
    return stored if stored is not None else getattr(layer, name, None)


def _unusable(layer, variable) -> str | None:
    if not isinstance(variable, Variable):
        return f"not a variable but a {type(variable).__name__}"
    if not keras.backend.is_float_dtype(variable.dtype):
        mode = getattr(layer, "quantization_mode", None)
        by = f" (quantized by Keras to {mode})" if mode else ""
        return f"holds integers of type {variable.dtype}{by}; only float weights can be pruned"
    return None


def _unknown_reason(layer) -> str:
    return (
        f"{type(layer).__name__} is not in the layer table; keras_squeeze.register_layer("
        f"{type(layer).__name__}, [names of its weights]) adds it"
    )


def _matcher(model, layers: Layers) -> Callable[[CompressibleLayer], bool]:
    """Turns a selection into a test of one compressible layer."""
    if layers is None:
        return lambda entry: True
    items = list(layers) if isinstance(layers, (list, tuple, set)) else [layers]
    if items and all(isinstance(item, str) for item in items):
        patterns = compile_patterns(items)
        return lambda entry: any(pattern.search(entry.path) for pattern in patterns)
    if items and all(isinstance(item, type) for item in items):
        classes = tuple(items)
        return lambda entry: any(isinstance(owner, classes) for owner in (entry.layer, *entry.parents))
    if items and all(isinstance(item, keras.Layer) for item in items):
        _check_members(model, items)
        wanted = {id(item) for item in items}
        return lambda entry: any(id(owner) in wanted for owner in (entry.layer, *entry.parents, model))
    if callable(layers):
        return lambda entry: bool(layers(entry.layer))
    raise TypeError(
        "`layers` must be None, a regular expression or a list of them, a layer class or a tuple of them, a "
        f"layer or a list of layers, or a function `layer -> bool`. Received: {layers!r}"
    )


def _check_members(model, items) -> None:
    members = {id(layer) for layer in model._flatten_layers()}
    strangers = [item.name for item in items if id(item) not in members]
    if strangers:
        raise ValueError(
            f"`layers` names layers that are not in model '{model.name}': {', '.join(strangers)}. Pass layers "
            "of this very model (a cloned or reloaded model has layers of its own)."
        )


def _nothing_selected(model, layers, everything: Selection, skipped) -> str:
    paths = ", ".join(entry.path for entry in everything.layers[:10]) or "none"
    more = len(everything.layers) - 10
    reasons = "; ".join(f"{path}: {reason}" for path, reason in skipped[:10])
    return (
        f"Nothing to compress in model '{model.name}': `layers` selects none of its compressible layers. "
        f"Received: layers={layers!r}. Compressible layers: {paths}{f' and {more} more' if more > 0 else ''}."
        + (f" Skipped: {reasons}." if reasons else "")
    )
