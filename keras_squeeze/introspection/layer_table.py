"""The layer table: which weights of each kind of layer can be compressed, and how its operations are counted.

A layer is looked up by its class, then by the classes it derives from, so a subclass of `Dense` is treated as a `Dense`
until `register_layer` gives it a row of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
from keras.src.layers.rnn.conv_lstm import ConvLSTMCell  # Keras exports the layers but not their cell

from keras_squeeze.introspection import mac_formulas


@dataclass(frozen=True)
class LayerSpec:
    """One row of the table.

    Attributes:
        weights: Names of the attributes that hold the compressible weights, and the input axis of each: an int, or a
            function of the layer.
        macs: Formula that counts the multiply-accumulates; None where there is none.
        channels: Output axes of weights whose outputs do not lie along the last axis, or a function of the layer.
        depthwise: Weights that filter every channel by itself.
        whole: Whether the weights are those of the layer's parts, which have rows themselves.
        registered: Whether a user registered the layer, so that a missing weight is a mistake.
        refuses: Function from a wrapper to the reason why weights inside of it cannot be pruned; None where they can.
        hidden: Whether its weights are bookkeeping that does not ship.
    """

    weights: Mapping[str, int | Callable[[Any], int]]
    macs: mac_formulas.MacFormula | None = None
    channels: Mapping[str, tuple[int, ...] | Callable[[Any], tuple[int, ...]]] = field(default_factory=dict)
    depthwise: tuple[str, ...] = ()
    whole: bool = False
    registered: bool = False
    refuses: Callable[[Any], str | None] | None = None
    hidden: bool = False


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


def _built_in_table() -> dict[type, LayerSpec]:
    layers = keras.layers
    table: dict[type, LayerSpec] = {
        layers.Dense: LayerSpec({"kernel": -2}, mac_formulas.dense),
        layers.EinsumDense: LayerSpec({"kernel": _contracted_axis}, mac_formulas.einsum, {"kernel": _einsum_channels}),
        layers.Embedding: LayerSpec(
            {"embeddings": -2, "reverse_embeddings": -2},
            mac_formulas.embedding,
            {"embeddings": (), "reverse_embeddings": ()},
        ),
        layers.MultiHeadAttention: LayerSpec({}, mac_formulas.multi_head_attention, whole=True),
        layers.GroupQueryAttention: LayerSpec({}, mac_formulas.grouped_query_attention, whole=True),
        layers.RNN: LayerSpec({}, mac_formulas.recurrent, whole=True),
    }
    for cell in (layers.LSTMCell, layers.GRUCell, layers.SimpleRNNCell, ConvLSTMCell):
        table[cell] = LayerSpec({"kernel": -2, "recurrent_kernel": -2}, mac_formulas.recurrent_cell)
    for convolution in (layers.Conv1D, layers.Conv2D, layers.Conv3D):
        table[convolution] = LayerSpec({"kernel": -2}, mac_formulas.convolution)
    for transposed in (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose):
        table[transposed] = LayerSpec({"kernel": -1}, mac_formulas.transposed_convolution, {"kernel": (-2,)})
    for depthwise in (layers.DepthwiseConv1D, layers.DepthwiseConv2D):
        table[depthwise] = LayerSpec(
            {"kernel": -2}, mac_formulas.depthwise_convolution, {"kernel": (-2, -1)}, ("kernel",)
        )
    for separable in (layers.SeparableConv1D, layers.SeparableConv2D):
        kernels = {"depthwise_kernel": -2, "pointwise_kernel": -2}
        channels = {"depthwise_kernel": (-2, -1)}
        table[separable] = LayerSpec(kernels, mac_formulas.separable_convolution, channels, ("depthwise_kernel",))
    for recurrent in (layers.ConvLSTM1D, layers.ConvLSTM2D, layers.ConvLSTM3D):
        table[recurrent] = LayerSpec({}, mac_formulas.recurrent_convolution, whole=True)
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
            table[getattr(layers, name)] = LayerSpec({})
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
    _TABLE[layer_class] = LayerSpec(dict(axes), macs, registered=True)


def register_wrapper(layer_class: type, refuses: Callable[[Any], str | None]) -> None:
    """Adds a layer that holds others to the table.

    Args:
        layer_class: The wrapper's class.
        refuses: Function from a wrapper to the reason why weights inside of it cannot be pruned; None where they can.
    """
    _TABLE[layer_class] = LayerSpec({}, refuses=refuses)


def register_bookkeeping(layer_class: type) -> None:
    """Leaves a layer out of selections and reports: what it keeps is for the training only."""
    _TABLE[layer_class] = LayerSpec({}, hidden=True)


def spec_of(layer: keras.Layer) -> LayerSpec | None:
    """Returns a layer's row of the table; None if neither its class nor a base class has one."""
    return next((_TABLE[base] for base in type(layer).__mro__ if base in _TABLE), None)


def in_table(layer: keras.Layer) -> bool:
    """Returns whether a layer's class or a base class is in the table."""
    return spec_of(layer) is not None


def mac_formula(layer: keras.Layer) -> mac_formulas.MacFormula | None:
    """Returns the formula that counts a layer's multiply-accumulates; None where the table has none."""
    row = spec_of(layer)
    return row.macs if row else None


def stored_variable(layer: keras.Layer, name: str):
    """Returns the variable that stores a weight, or None.

    `kernel` itself is a property that computes with LoRA or Keras's quantization.
    """
    stored = layer.__dict__.get(f"_{name}", None)
    if stored is None and isinstance(getattr(type(layer), name, None), property):
        return None
    return stored if stored is not None else getattr(layer, name, None)
