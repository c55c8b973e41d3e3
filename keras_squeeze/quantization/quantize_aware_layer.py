"""`QuantizeAware`: a layer that trains as if its weights and its output were integers."""

import functools
import inspect
from typing import Any

import keras
import numpy as np
from keras import layers, ops
from keras.src.backend import AutocastScope, Variable, compute_output_spec, in_stateless_scope
from keras.src.layers.convolutional.base_conv import BaseConv

from keras_squeeze import quantizers
from keras_squeeze.analysis.report import Grid, register_grids
from keras_squeeze.introspection.layer_table import register_wrapper
from keras_squeeze.introspection.selection import CompressibleWeight, layer_weights
from keras_squeeze.introspection.variables import read, recurrent_states
from keras_squeeze.quantization.convertible import convertible_matmul, convertible_weight
from keras_squeeze.quantization.fake_quantize import FakeQuantize, is_converting
from keras_squeeze.quantizers import Binary, Quantizer
from keras_squeeze.quantizers.ops import sign


@keras.saving.register_keras_serializable(package="keras_squeeze")
class QuantizeAware(layers.Wrapper):
    """Wraps a layer so that it computes with quantized weights and gives a quantized output.

    The real weights stay in the wrapped layer and are trained; in the forward pass the layer sees them rounded to the
    grid. Biases and the statistics of normalizations stay in float. Saved with the model, without a custom-object
    scope.

    Works on every layer in the layer table: Dense, EinsumDense, Embedding, convolutions (transposed, depthwise,
    separable), attention, recurrent layers, `Bidirectional`, `TimeDistributed`, and what `keras_squeeze.register_layer`
    adds.

    Args:
        layer: The layer, built or not.
        weights: How its weights are quantized: a quantizer or its name (`"int8"`, `"int4"`, `"fixed8"`, `"ternary"`,
            `"binary"`, `"binary_connect"`, `"xnor"`, ...), or None.
        activations: How its output is quantized, likewise; of several outputs the first. By default `"int8"`, with
            binary inputs (`"xnor"`) None.

    Attributes:
        layer: The wrapped layer.

    Raises:
        TypeError, ValueError: `layer` is no layer, has no weights to quantize once built, or is quantized already.

    Example:

    ```python
    model = keras.Sequential(
        [keras.Input((28, 28, 1)), ks.QuantizeAware(keras.layers.Conv2D(8, 3, activation="relu"), weights="int4"), ...]
    )
    ```
    """

    def __init__(self, layer, weights="int8", activations="default", **kwargs):
        _check_layer(layer)

        @functools.wraps(layer.call)  # Keras reads the arguments of a layer's call from its signature
        def call(*args, **kwargs):
            return self._call_quantized(*args, **kwargs)

        self.call = call
        kwargs.setdefault("name", f"quantized_{layer.name}")
        kwargs.setdefault("dtype", layer.dtype_policy)
        super().__init__(layer, **kwargs)
        vars(self.build)["__signature__"] = inspect.signature(layer.build)  # and the shapes that it is built with
        self.supports_masking = layer.supports_masking
        self.weight_quantizer: Quantizer | None = quantizers.get(weights)
        if activations == "default":
            activations = None if self.binary_inputs else "int8"
        output = quantizers.get(activations)
        if self.binary_inputs:
            self.activity_regularizer = layer.activity_regularizer  # the layer itself is not called
        self.output_quantizer: FakeQuantize | None = None
        if output is not None:
            self.output_quantizer = FakeQuantize(output, name="activations", dtype=self.dtype_policy)
        self.quantized_weights: tuple[CompressibleWeight, ...] = ()
        self.weight_quantizers: list[FakeQuantize] = []

    @property
    def binary_inputs(self) -> Binary | None:
        """The quantizer that binarizes the inputs of the layer as well; None where they are not."""
        quantizer = self.weight_quantizer
        return quantizer if isinstance(quantizer, Binary) and quantizer.inputs and takes_signs(self.layer) else None

    def build(self, *args, **kwargs):
        if not self.layer.built:
            if getattr(self.layer.build, "_is_default", False) and self.layer._layers:
                shape = next(iter((*args, *kwargs.values())))
                compute_output_spec(self.layer.call, keras.KerasTensor(shape))  # its parts are built by a call
            else:
                self.layer.build(*args, **kwargs)
            self.layer.built = True
        if self.output_quantizer is not None:
            self.output_quantizer.build((None,))
        if self.weight_quantizer is None:
            return
        weights, reasons = layer_weights(self.layer)
        if not weights:
            raise ValueError(
                f"'{self.layer.name}' has no weights that can be quantized"
                + "".join(f"; {path}: {reason}" for path, reason in reasons)
                + ". Leave it unwrapped, or name the weights of a layer of your own with keras_squeeze.register_layer."
            )
        self.quantized_weights = tuple(weights)
        self.weight_quantizers = [self._weight_quantizer(weight) for weight in weights]

    def to_integers(self) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """`{name of a weight: (integers, scale, zero_point)}`; see `Quantizer.to_integers`."""
        pairs = zip(self.quantized_weights, self.weight_quantizers, strict=True)
        return {weight.name: quantize.to_integers(read(weight.variable)) for weight, quantize in pairs}

    def quantized_values(self) -> list[tuple[Variable, np.ndarray]]:
        """Every quantized weight's variable, and its values on the grid."""
        values = []
        for weight, quantize in zip(self.quantized_weights, self.weight_quantizers, strict=True):
            values.append((weight.variable, ops.convert_to_numpy(quantize(_value(weight.variable), training=False))))
        return values

    def begin(self) -> None:
        """Measures the weights anew where their steps are learned, after others were loaded."""
        for weight, quantize in zip(self.quantized_weights, self.weight_quantizers, strict=True):
            quantize.begin(_value(weight.variable))

    def compute_mask(self, inputs, previous_mask=None):
        return self.layer.compute_mask(inputs, previous_mask)

    def compute_output_spec(self, *args, **kwargs):
        return self.layer.compute_output_spec(*args, **kwargs)

    def compute_output_shape(self, *args, **kwargs):
        return self.layer.compute_output_shape(*args, **kwargs)

    def get_build_config(self):
        return {"layer": self.layer.get_build_config()}

    def build_from_config(self, config):
        if not self.layer.built:
            self.layer.build_from_config(config["layer"])
        self.build()

    def get_config(self):
        output = self.output_quantizer and self.output_quantizer.quantizer
        return {
            **super().get_config(),
            "weights": keras.saving.serialize_keras_object(self.weight_quantizer),
            "activations": keras.saving.serialize_keras_object(output),
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        layer, weights, activations = (
            keras.saving.deserialize_keras_object(config.pop(name), custom_objects=custom_objects)
            for name in ("layer", "weights", "activations")
        )
        return cls(layer, weights, activations, **config)

    def _weight_quantizer(self, weight: CompressibleWeight) -> FakeQuantize:
        name = weight.name.replace("/", "_")
        quantize = FakeQuantize(self.weight_quantizer, weight.channel_axes, name=name, dtype="float32")
        quantize.build(weight.variable.shape)
        quantize.begin(_value(weight.variable))
        if isinstance(self.weight_quantizer, Binary) and self.weight_quantizer.clip:
            weight.variable.constraint = ClipConstraint(weight.variable.constraint)
        return quantize

    def _call_quantized(self, *args, **kwargs):
        written_out = isinstance(self.layer, (layers.Dense, layers.Conv1D)) and _is_plain(self.layer)
        if self.binary_inputs or (written_out and is_converting() and self.quantized_weights):
            outputs = self._product(args[0] if args else kwargs["inputs"])
        else:
            outputs = self._stateless(self._values(), args, kwargs)
        if self.output_quantizer is None:
            return outputs
        flat = keras.tree.flatten(outputs)
        flat[0] = self.output_quantizer(flat[0])
        return keras.tree.pack_sequence_as(outputs, flat)

    def _values(self) -> list[tuple[Variable, Any]]:
        """The variable and the quantized value of each weight."""
        pairs = list(zip(self.quantized_weights, self.weight_quantizers, strict=True))
        if not is_converting():
            return [(weight.variable, quantize(_value(weight.variable))) for weight, quantize in pairs]
        marked = isinstance(
            self.layer, (layers.Conv2D, layers.DepthwiseConv2D, layers.SeparableConv2D, layers.Embedding)
        )
        return [
            (weight.variable, convertible_weight(integers, scale, zero_point, weight.channel_axes if marked else None))
            for (weight, _), (integers, scale, zero_point) in zip(pairs, self._constants(), strict=True)
        ]

    def _constants(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        import tensorflow as tf

        with tf.init_scope():
            return list(self.to_integers().values())

    def _stateless(self, values: list, args, kwargs):
        """Calls the layer with other values for some of its variables; its updates, such as seeds, are kept."""
        variables = self.layer.variables + recurrent_states(self.layer)
        if in_stateless_scope():  # a scope hides the values of the one around it
            replaced = {id(variable) for variable, _ in values}
            values = values + [(other, _value(other)) for other in variables if id(other) not in replaced]
        with keras.StatelessScope(state_mapping=values, collect_losses=True) as scope:
            before = dict(scope.state_mapping)
            outputs = self.layer(*args, **kwargs)
        for variable in variables:
            new = scope.get_current_value(variable)
            if new is not None and new is not before.get(id(variable)) and not is_converting():
                variable.assign(new)
        for loss in scope.losses:
            self.add_loss(loss)
        return outputs

    def _product(self, inputs):
        """A Dense layer or a convolution, written out; with binary inputs `K * (sign(x) (*) W) + b`.

        K of XNOR-Net, the mean of |x| under the kernel's window, has no gradient.
        """
        layer, binary = self.layer, self.binary_inputs
        inputs = ops.cast(inputs, layer.compute_dtype)
        read_inputs = sign(inputs, str(binary.inputs)) if binary else inputs
        if is_converting() and isinstance(layer, layers.Dense):
            outputs = convertible_matmul(read_inputs, *self._constants()[0])
        elif is_converting() and isinstance(layer, layers.Conv1D):
            outputs = _as_rows(layer, read_inputs, *self._constants()[0])
        else:
            outputs = _apply(layer, read_inputs, ops.cast(self._values()[0][1], layer.compute_dtype))
        if binary and binary.scaled:
            outputs = outputs * ops.stop_gradient(_window_means(layer, ops.abs(inputs)))
        if layer.bias is not None:
            first = isinstance(layer, BaseConv) and layer.data_format == "channels_first"
            outputs = outputs + (
                ops.reshape(layer.bias, (-1, *(1 for _ in layer.kernel_size))) if first else layer.bias
            )
        return outputs if layer.activation is None else layer.activation(outputs)


@keras.saving.register_keras_serializable(package="keras_squeeze")
class ClipConstraint(keras.constraints.Constraint):
    """Clips a weight to [-1, 1] after the constraint that was there before."""

    def __init__(self, inner=None):
        self.inner = inner

    def __call__(self, value):
        return ops.clip(value if self.inner is None else self.inner(value), -1.0, 1.0)

    def get_config(self):
        return {"inner": keras.saving.serialize_keras_object(self.inner)}

    @classmethod
    def from_config(cls, config):
        return cls(keras.saving.deserialize_keras_object(config["inner"]))


def _refusal_of_zeros(wrapper: QuantizeAware) -> str | None:
    if wrapper.weight_quantizer is None or wrapper.weight_quantizer.has_zero:
        return None
    return 'quantized to a binary grid, which has no zero; quantize with "ternary" to prune as well'


def _grids(wrapper: QuantizeAware) -> dict[int, Grid]:
    """What the report shows of the weights: the values that the layer computes with, and the bits that they take."""
    values = wrapper.quantized_values()
    scales = [part[1].size for part in wrapper.to_integers().values()]
    input_bits = 1 if wrapper.binary_inputs else None
    return {
        id(variable): Grid(quantize.quantizer.bits, array, scale, input_bits)
        for (variable, array), quantize, scale in zip(values, wrapper.weight_quantizers, scales, strict=True)
    }


register_wrapper(QuantizeAware, _refusal_of_zeros)
register_grids(QuantizeAware, _grids)


def takes_signs(layer) -> bool:
    """Whether the inputs of a layer can be binarized: Dense layers and convolutions that compute what Keras's do."""
    kinds = isinstance(layer, layers.Dense) or (isinstance(layer, BaseConv) and layer.groups == 1)
    return kinds and _is_plain(layer)


def _is_plain(layer) -> bool:
    """Whether a Dense layer or a convolution is called as Keras calls it, so that it can be written out."""
    plain = type(layer).call in (layers.Dense.call, BaseConv.call, layers.Conv1D.call)
    return plain and not getattr(layer, "lora_enabled", False)


def _check_layer(layer) -> None:
    if not isinstance(layer, layers.Layer):
        raise TypeError(f"`layer` must be a Keras layer. Received: {layer!r}")
    if any(isinstance(part, (QuantizeAware, FakeQuantize)) for part in layer._flatten_layers()):
        raise ValueError(f"'{layer.name}' is quantized already. Received: {layer!r}")
    if isinstance(layer, keras.Model):
        raise TypeError(
            f"`QuantizeAware` wraps one layer, and '{layer.name}' is a model. Received: {layer!r}. "
            "keras_squeeze.quantize_aware(model) wraps all of its layers."
        )


def _value(variable):
    """A variable's value in its own precision, whatever Keras casts to around it."""
    with AutocastScope(None):
        return ops.convert_to_tensor(variable)


def _as_rows(layer, inputs, integers, scale, zero_point):
    """A Conv1D as a convolution over pictures of one row, which the converter has an integer kernel for."""
    import tensorflow as tf

    padding = layer.padding
    if padding == "causal":
        inputs, padding = ops.pad(inputs, layer._compute_causal_padding()), "valid"
    if layer.data_format == "channels_first":
        inputs = ops.transpose(inputs, (0, 2, 1))
    kernel = convertible_weight(integers[np.newaxis], scale, zero_point, (-1,))
    (stride,), (rate,) = layer.strides, layer.dilation_rate
    rows = tf.nn.conv2d(inputs[:, tf.newaxis], kernel, (1, stride), padding.upper(), dilations=(1, rate))
    outputs = tf.squeeze(rows, 1)
    return ops.transpose(outputs, (0, 2, 1)) if layer.data_format == "channels_first" else outputs


def _apply(layer, inputs, kernel):
    """What a Dense layer or a convolution does before its bias."""
    if not isinstance(layer, BaseConv):
        return ops.matmul(inputs, kernel)
    padding = layer.padding
    if padding == "causal":
        inputs = ops.pad(inputs, layer._compute_causal_padding())
        padding = "valid"
    return ops.conv(
        inputs,
        kernel,
        strides=list(layer.strides),
        padding=padding,
        dilation_rate=layer.dilation_rate,
        data_format=layer.data_format,
    )


def _window_means(layer, magnitudes):
    """K of XNOR-Net: the mean over the channels, then over the window of the kernel at each of its places."""
    if not isinstance(layer, BaseConv):
        return ops.mean(magnitudes, axis=-1, keepdims=True)
    channel_axis = 1 if layer.data_format == "channels_first" else -1
    means = ops.mean(magnitudes, axis=channel_axis, keepdims=True)
    size = np.prod(layer.kernel_size)
    return _apply(layer, means, ops.full((*layer.kernel_size, 1, 1), 1 / size, dtype=means.dtype))
