"""The layer that rounds a tensor to a quantizer's grid and keeps what the quantizer must remember."""

import contextlib
import threading

import keras
from keras import ops
from keras.src.backend import compute_output_spec, in_stateless_scope

from keras_squeeze import quantizers
from keras_squeeze.analysis.report import register_activation_bits
from keras_squeeze.introspection.layer_table import register_bookkeeping
from keras_squeeze.quantizers import Binary, Quantizer, UniformQuantizer

_conversion = threading.local()


@contextlib.contextmanager
def converting():
    """Within this scope, quantizers are traced for the TensorFlow Lite converter, as constants that it understands."""
    _conversion.active = True
    try:
        yield
    finally:
        _conversion.active = False


def is_converting() -> bool:
    return getattr(_conversion, "active", False)


@keras.saving.register_keras_serializable(package="keras_squeeze")
class FakeQuantize(keras.layers.Layer):
    """Fake quantization of its input: rounded to the grid of a quantizer, still in float.

    For activations, the range (or the learned step) is kept with the layer: the first batch of training begins it,
    later ones move it, `frozen` holds it. Before the first batch the input itself is measured. `QuantizeAware` uses the
    same layer for weights, which are always measured as they are, save for a learned step.

    Args:
        quantizer: A quantizer or its name.
        channels: Weights: the axes along which every entry has a scale of its own. None: the input is activations.

    Attributes:
        quantizer: Its `num_bits` follow the schedule.
        mix: Variable, 0 to 1: how much of the rounding takes part. It is looked at while `mixing` is True.
        frozen: Whether the range stays as it is; a learned step goes on learning.
        observing: Whether the range is measured outside of training, too; for calibration.
    """

    def __init__(self, quantizer, channels: tuple[int, ...] | None = None, **kwargs):
        super().__init__(**kwargs, autocast=False)
        quantizer = quantizers.get(quantizer)
        if quantizer is None:
            raise ValueError("`quantizer` must be a quantizer or its name. Received: None")
        self.channels = None if channels is None else tuple(channels)
        self.quantizer: Quantizer = quantizer.for_activations() if channels is None else quantizer.for_weights()
        self.mixing = self.frozen = self.observing = False
        self.seeds = keras.random.SeedGenerator() if self.quantizer.random else None
        self.range_state = self.initialized = None
        self._has_values = False
        self.supports_masking = True

    def build(self, input_shape):
        import tensorflow as tf

        self._has_values = tf.executing_eagerly()  # else the variables get theirs once the function is traced

        def scalar(name, value):
            initializer = keras.initializers.Constant(value)
            return self._add(name, (), initializer, trainable=False, aggregation="only_first_replica")

        # The variable carries the bits through checkpoints of weights; what is computed follows the quantizer's.
        self.num_bits = scalar("num_bits", self.quantizer.bits)
        self.mix = scalar("mix", 1.0)
        if self.quantizer.learned or (self.channels is None and self.quantizer.keeps_state):
            self.initialized = scalar("initialized", 0.0)
            shape = self._state_shape(input_shape)
            self.range_state = self._add("range", shape, "ones", trainable=self.quantizer.learned, aggregation="mean")

    def call(self, inputs, training=None):
        if not keras.backend.is_float_dtype(inputs.dtype):
            raise TypeError(f"'{self.name}' quantizes float tensors only. Received: dtype {inputs.dtype}")
        x = ops.cast(inputs, "float32")
        if self._has_values and not in_stateless_scope():
            self.follow_variables()
        if is_converting():
            return ops.cast(self._convertible(x), inputs.dtype)
        state = self._current_state(x, bool(training))
        quantized = self._quantize(x, state, bool(training))
        if self.mixing:
            quantized = x + self.mix * (quantized - x)
        return ops.cast(quantized, inputs.dtype)

    def to_integers(self, x):
        """See `Quantizer.to_integers`; with the step that was learned."""
        return self.quantizer.to_integers(x, self._known_state(), self.channels or ())

    @property
    def is_known(self) -> bool:
        """Whether the range is known, or need not be."""
        return self.range_state is None or float(ops.convert_to_numpy(self.initialized)) > 0

    def set_bits(self, num_bits: int) -> bool:
        """Changes the number of bits; True where that is a change, so that training steps must be traced anew."""
        if num_bits == self.quantizer.bits or not isinstance(self.quantizer, UniformQuantizer):
            return False
        if self.range_state is not None:
            self.range_state.assign(self.quantizer.rescaled(self.range_state, num_bits))
        self.quantizer = self.quantizer.with_bits(num_bits)
        self.num_bits.assign(num_bits)
        return True

    def reset(self) -> None:
        """Forgets the range: the next batch of training begins it."""
        if self.initialized is not None:
            self.initialized.assign(0.0)

    def begin(self, x) -> None:
        """Measures a weight whose step is learned, instead of leaving that to the first batch."""
        if self.range_state is not None:
            self.range_state.assign(self.quantizer.measure(ops.cast(x, "float32"), self.channels or ()))
            self.initialized.assign(1.0)

    def compute_output_spec(self, inputs, training=None):
        return keras.KerasTensor(inputs.shape, inputs.dtype)

    def load_own_variables(self, store):
        super().load_own_variables(store)
        self.follow_variables()

    def follow_variables(self) -> None:
        """Takes over the bits and the mix that the variables have; they may have been set behind this layer's back.

        What Keras has traced before, such as a `predict_function`, does not know them yet.
        """
        import tensorflow as tf

        with tf.init_scope():  # now, even while a function is traced
            bits, mix = (float(ops.convert_to_numpy(variable)) for variable in (self.num_bits, self.mix))
        if isinstance(self.quantizer, UniformQuantizer) and round(bits) != self.quantizer.bits:
            self.quantizer = self.quantizer.with_bits(round(bits))
        self.mixing = mix < 1

    def get_config(self):
        if self.built:
            self.follow_variables()
        quantizer = keras.saving.serialize_keras_object(self.quantizer)
        channels = None if self.channels is None else list(self.channels)
        return {**super().get_config(), "quantizer": quantizer, "channels": channels}

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        return cls(keras.saving.deserialize_keras_object(config.pop("quantizer")), **config)

    def _add(self, name, shape, initializer, *, trainable, aggregation):
        return self.add_weight(
            shape=shape,
            initializer=initializer,
            dtype="float32",
            trainable=trainable,
            autocast=False,
            aggregation=aggregation,
            name=name,
        )

    def _state_shape(self, input_shape):
        probe = keras.KerasTensor([length or 1 for length in input_shape], "float32")
        return compute_output_spec(lambda x: self.quantizer.measure(x, self.channels or ()), probe).shape

    def _current_state(self, x, training: bool):
        """The range or the step to use; None where the quantizer measures the tensor itself."""
        if self.range_state is None:
            return None
        x = ops.stop_gradient(x)
        learns = (training and not self.frozen) or self.observing
        begun = self.initialized > 0
        if self.quantizer.learned or not learns:
            state = ops.cond(begun, lambda: ops.convert_to_tensor(self.range_state), lambda: self._measure(x))
        else:
            new = self._measure(x)
            following = self.quantizer.widened if self.observing else self.quantizer.updated
            state = ops.where(begun, following(self.range_state, new), new)
        if learns:
            finite = ops.all(ops.isfinite(state))  # a batch of NaN must not destroy a range, nor begin it
            self.range_state.assign(ops.where(finite, state, self.range_state))
            self.initialized.assign(ops.maximum(self.initialized, ops.cast(finite, "float32")))
        return self.range_state if self.quantizer.learned and learns else state

    def _measure(self, x):
        return self.quantizer.measure(x, self.channels or ())

    def _quantize(self, x, state, training: bool):
        if self.channels is None and isinstance(self.quantizer, UniformQuantizer) and not self.quantizer.learned:
            grid = self.quantizer.grid(self._measure(x) if state is None else state)
            low, high = ((end - grid.zero_point) * grid.scale for end in (grid.low, grid.high))
            return _fused(x, low, high, grid, self.quantizer.num_bits)
        if isinstance(self.quantizer, Binary) and self.seeds is not None and training:
            uniform = keras.random.uniform(ops.shape(x), seed=self.seeds)
            return self.quantizer(x, None, self.channels or (), uniform=uniform)
        return self.quantizer(x, state, self.channels or ())

    def _convertible(self, x):
        """The same grid, with constants for its ends: the converter turns the operation into integers."""
        import tensorflow as tf

        if not isinstance(self.quantizer, UniformQuantizer):
            return self.quantizer(x, None, ())
        with tf.init_scope():
            mix, state = float(ops.convert_to_numpy(self.mix)), self._known_state()
            if mix < 1:
                raise ValueError(
                    f"'{self.name}' is quantized to {mix:.0%} only: train to the end of the QuantizationSchedule, "
                    "then export."
                )
            if self.range_state is not None and state is None:
                raise ValueError(
                    f"'{self.name}' has seen no data, so that its range is not known. Train the model, or calibrate it."
                )
            state = self._measure(ops.zeros((1,) * len(x.shape))) if state is None else state
            grid = self.quantizer.grid(state)
            low, high = (float((end - grid.zero_point) * grid.scale) for end in (grid.low, grid.high))
        return _fused(x, low, high, grid, self.quantizer.num_bits)

    def _known_state(self):
        return ops.convert_to_tensor(self.range_state) if self.range_state is not None and self.is_known else None


register_bookkeeping(FakeQuantize)
register_activation_bits(FakeQuantize, lambda layer: layer.quantizer.bits if layer.channels is None else None)


def _fused(x, low, high, grid: quantizers.Grid, num_bits: int):
    """One operation of TensorFlow's, which is faster and what the converter knows; the same grid and gradient."""
    import tensorflow as tf

    narrow = grid.high - grid.low + 1 < 2**num_bits
    return tf.quantization.fake_quant_with_min_max_vars(x, low, high, num_bits=num_bits, narrow_range=narrow)
