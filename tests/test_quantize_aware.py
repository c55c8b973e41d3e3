"""A layer in `QuantizeAware` is the plain layer on weights quantized by hand, in every condition of training."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import keras_squeeze as ks
from keras_squeeze.quantization.fake_quantize import FakeQuantize
from keras_squeeze.quantizers import Affine, Binary, FixedPoint, LearnedStep, Ternary

LAST = {"kernel": (-1,)}


@pytest.fixture(autouse=True)
def fresh_keras():
    """In place of the fixture of all tests: no name matters here, and clearing Keras takes half of the time."""
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy("float32")


# Each row: the layer, the shapes of its inputs, and the channel axes of the weights whose path ends so.
LAYERS = {
    "dense": (lambda: layers.Dense(5, activation="relu"), [(4, 7)], LAST),
    "dense, sequence, no bias": (lambda: layers.Dense(5, use_bias=False), [(2, 3, 7)], LAST),
    "einsum": (lambda: layers.EinsumDense("abc,cd->abd", (None, 5), bias_axes="d"), [(2, 3, 4)], LAST),
    "einsum, two output axes": (
        lambda: layers.EinsumDense("abc,cde->abde", (None, 3, 2), bias_axes="de"),
        [(2, 3, 4)],
        {"kernel": (-2, -1)},
    ),
    "conv 1d, causal": (lambda: layers.Conv1D(4, 3, padding="causal", dilation_rate=2), [(2, 8, 3)], LAST),
    "conv 2d": (lambda: layers.Conv2D(4, 3, strides=2, padding="same", activation="relu"), [(2, 6, 6, 3)], LAST),
    "conv 2d, groups": (lambda: layers.Conv2D(6, 3, groups=2), [(2, 5, 5, 4)], LAST),
    "conv 3d": (lambda: layers.Conv3D(3, 2), [(2, 4, 4, 4, 2)], LAST),
    "conv 1d transposed": (lambda: layers.Conv1DTranspose(4, 3, strides=2), [(2, 5, 3)], {"kernel": (-2,)}),
    "conv 2d transposed": (lambda: layers.Conv2DTranspose(4, 3, strides=2), [(2, 4, 4, 3)], {"kernel": (-2,)}),
    "conv 3d transposed": (lambda: layers.Conv3DTranspose(3, 2), [(1, 3, 3, 3, 2)], {"kernel": (-2,)}),
    "depthwise 1d": (lambda: layers.DepthwiseConv1D(3), [(2, 6, 4)], {"kernel": (-2, -1)}),
    "depthwise 2d, twice": (
        lambda: layers.DepthwiseConv2D(3, depth_multiplier=2),
        [(2, 5, 5, 3)],
        {"kernel": (-2, -1)},
    ),
    "separable 1d": (
        lambda: layers.SeparableConv1D(4, 3),
        [(2, 6, 3)],
        {"depthwise_kernel": (-2, -1), "pointwise_kernel": (-1,)},
    ),
    "separable 2d": (
        lambda: layers.SeparableConv2D(4, 3, depth_multiplier=2),
        [(2, 5, 5, 3)],
        {"depthwise_kernel": (-2, -1), "pointwise_kernel": (-1,)},
    ),
    "embedding": (lambda: layers.Embedding(9, 4), [(2, 5)], {"embeddings": ()}),
    "multi-head attention": (
        lambda: layers.MultiHeadAttention(2, 3),
        [(2, 4, 6), (2, 5, 6)],
        {"attention_output/kernel": (-1,), "kernel": (-2, -1)},
    ),
    "grouped-query attention": (
        lambda: layers.GroupQueryAttention(3, 4, 2),
        [(2, 4, 6), (2, 5, 6)],
        {"attention_output/kernel": (-1,), "kernel": (-2, -1)},
    ),
    "lstm": (lambda: layers.LSTM(3, return_sequences=True), [(2, 4, 5)], LAST),
    "gru": (lambda: layers.GRU(3), [(2, 4, 5)], LAST),
    "simple rnn": (lambda: layers.SimpleRNN(3), [(2, 4, 5)], LAST),
    "conv lstm": (lambda: layers.ConvLSTM2D(2, 3), [(1, 3, 5, 5, 2)], LAST),
    "bidirectional": (lambda: layers.Bidirectional(layers.LSTM(2)), [(2, 4, 3)], LAST),
    "time distributed": (lambda: layers.TimeDistributed(layers.Conv2D(3, 2)), [(2, 3, 4, 4, 2)], LAST),
}


# The grids once more, in NumPy: functions of a weight and the axes that every scale spans.


def symmetric(weight, axes, high=127):
    scale = np.max(abs(weight), axes, keepdims=True) / np.float32(high)
    return np.clip(np.round(weight / scale), -high, high) * scale


def affine(weight, axes):
    least = np.minimum(np.min(weight, axes, keepdims=True), 0)
    scale = (np.maximum(np.max(weight, axes, keepdims=True), 0) - least) / np.float32(15)
    zero_point = np.clip(np.round(-8 - least / scale), -8, 7)
    return np.clip(np.round(weight / scale), -8 - zero_point, 7 - zero_point) * scale


def learned(weight, axes):
    step = 2 * np.mean(abs(weight)) / np.sqrt(np.float32(7))
    return np.clip(np.round(weight / step), -8, 7) * step


def ternary(weight, axes):
    large = abs(weight) > 0.7 * np.mean(abs(weight), axes, keepdims=True)
    alpha = np.sum(abs(weight) * large, axes, keepdims=True) / np.sum(large, axes, keepdims=True)
    return np.sign(weight) * large * alpha


def binary(weight, axes):
    return np.where(weight >= 0, 1, -1) * np.mean(abs(weight), axes, keepdims=True)


QUANTIZERS = [
    ("int8", symmetric),
    (Affine(4, symmetric=False), affine),
    (LearnedStep(4), learned),
    ("ternary", ternary),
    ("binary", binary),
]


def inputs_of(kind):
    rng = np.random.default_rng(1)
    shapes = LAYERS[kind][1]
    if kind == "embedding":
        return [rng.integers(0, 9, shapes[0])]
    return [rng.standard_normal(shape).astype("float32") for shape in shapes]


def randomize(layer):
    """Values for all weights, the biases among them, so that no error hides behind a zero."""
    rng = np.random.default_rng(2)
    layer.set_weights([(rng.standard_normal(w.shape) * 0.5).astype("float32") for w in layer.weights])


def plain_layer(kind):
    layer = LAYERS[kind][0]()
    layer(*inputs_of(kind))
    randomize(layer)
    return layer


def quantized_by_hand(weights, channels, by_hand):
    values = []
    for weight in weights:
        axes = next((axes for suffix, axes in channels.items() if weight.path.endswith(suffix)), None)
        value = weight.numpy()
        if axes is not None:
            others = tuple(axis for axis in range(value.ndim) if axis - value.ndim not in axes)
            value = by_hand(value, others).astype("float32")
        values.append(value)
    return values


def on_quantized_weights(layer, channels, by_hand):
    """A copy of a layer, and in it what a quantizer makes of its weights."""
    copy = type(layer).from_config(layer.get_config())
    copy.build_from_config(layer.get_build_config())
    copy.set_weights(quantized_by_hand(layer.weights, channels, by_hand))
    return copy


def wrap(layer, weights="int8"):
    return ks.QuantizeAware(layer, weights, activations=None)


def fit(model, x, y, **options):
    return model.fit(x, y, **{"epochs": 2, "batch_size": 16, "verbose": 0, **options})


def regression(units=3, features=6, count=64):
    rng = np.random.default_rng(3)
    return rng.standard_normal((count, features)).astype("float32"), rng.standard_normal((count, units)).astype("f")


# Every layer in the layer table.


@pytest.mark.parametrize("kind", LAYERS)
def test_a_wrapped_layer_is_the_plain_one_on_quantized_weights(kind):
    channels = LAYERS[kind][2]
    for quantizer, by_hand in QUANTIZERS:
        layer, inputs = plain_layer(kind), inputs_of(kind)
        expected = on_quantized_weights(layer, channels, by_hand)(*inputs)
        before = layer.get_weights()
        wrapped = wrap(layer, quantizer)
        np.testing.assert_allclose(wrapped(*inputs), expected, rtol=1e-4, atol=1e-5, err_msg=repr(quantizer))
        for now, then in zip(layer.get_weights(), before, strict=True):
            np.testing.assert_array_equal(now, then)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_integers_of_a_wrapped_layer_are_its_quantized_weights(kind):
    layer = plain_layer(kind)
    wrapped = wrap(layer, "int8")
    wrapped(*inputs_of(kind))
    quantized = [scale * (q - zero_point) for q, scale, zero_point in wrapped.to_integers().values()]
    channels = LAYERS[kind][2]
    by_hand = [
        value
        for weight, value in zip(layer.weights, quantized_by_hand(layer.weights, channels, symmetric), strict=True)
        if weight.path.endswith(tuple(channels))
    ]
    assert len(quantized) == len(by_hand)
    for ours, expected in zip(quantized, by_hand, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-6)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_gradient_reaches_the_real_weights(kind):
    """That of ternary weights is 1: what the plain layer has at the quantized weights."""
    layer, inputs = plain_layer(kind), inputs_of(kind)
    plain = on_quantized_weights(layer, LAYERS[kind][2], ternary)
    wrapped = wrap(layer, "ternary")
    gradients = []
    for call, weights in [(wrapped, layer.trainable_weights), (plain, plain.trainable_weights)]:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(call(*inputs) ** 2)
        gradients.append([tf.convert_to_tensor(g) for g in tape.gradient(loss, [w.value for w in weights])])
    for ours, expected in zip(*gradients, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_saved_model_predicts_identically_without_a_scope(kind, tmp_path):
    arrays = inputs_of(kind)
    inputs = [keras.Input(array.shape[1:], dtype=array.dtype.name) for array in arrays]
    model = keras.Model(inputs, ks.QuantizeAware(LAYERS[kind][0](), weights="int4")(*inputs))
    randomize(model.layers[-1].layer)
    model(arrays, training=True)
    expected = model(arrays)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(arrays), expected)
    np.testing.assert_array_equal(loaded([a[::-1] for a in arrays]), model([a[::-1] for a in arrays]))


@pytest.mark.parametrize("kind", ["dense", "conv 2d", "multi-head attention", "lstm", "embedding"])
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_in_mixed_precision_weights_are_quantized_in_full(kind, policy):
    keras.config.set_dtype_policy(policy)
    for quantizer, by_hand in QUANTIZERS:
        layer, inputs = plain_layer(kind), inputs_of(kind)
        expected = on_quantized_weights(layer, LAYERS[kind][2], by_hand)(*inputs)
        outputs = wrap(layer, quantizer)(*inputs)
        assert outputs.dtype == expected.dtype
        assert all(weight.dtype == "float32" for weight in layer.weights)
        values = [tf.cast(tensor, "float32") for tensor in (outputs, expected)]
        np.testing.assert_allclose(*values, rtol=2e-2, atol=2e-2, err_msg=repr(quantizer))


@pytest.mark.parametrize(
    "quantizer",
    [
        Affine(2),
        Affine(8, per_channel=False),
        Affine(8, range=(-1, 1)),
        Affine(4, range="percentile"),
        Affine(4, range="mse"),
        FixedPoint(8),
        FixedPoint(6, 0),
        LearnedStep(3, per_channel=True),
        Ternary(per_channel=False),
        Binary(scaled=False, gradient="swish_sign"),
    ],
    ids=repr,
)
def test_other_quantizers_take_the_integers_that_they_give(quantizer, tmp_path):
    layer, (x,) = plain_layer("conv 2d"), inputs_of("conv 2d")
    integers, scale, zero_point = quantizer.for_weights().to_integers(layer.kernel)
    plain = on_quantized_weights(layer, LAST, lambda *_: scale * (integers - zero_point))
    model = keras.Sequential([keras.Input(x.shape[1:]), wrap(layer, quantizer)])
    np.testing.assert_allclose(model(x), plain(x), rtol=1e-4, atol=1e-5)
    model.save(tmp_path / "model.keras")
    np.testing.assert_array_equal(keras.saving.load_model(tmp_path / "model.keras")(x), model(x))


def test_without_a_quantizer_of_weights_the_layer_is_as_it_was():
    layer, (x,) = plain_layer("dense"), inputs_of("dense")
    expected = layer(x)
    np.testing.assert_array_equal(wrap(layer, None)(x), expected)


# Outputs.


def on_grid(values, ends, bits=8):
    """Affine fake quantization by hand, after Jacob et al.: the zero point moves the ends of the grid."""
    least, largest = min(ends[0], 0), max(ends[1], 0)
    steps = 2**bits - 1
    scale = (largest - least) / steps
    zero_point = np.round(-least / scale)
    return (np.clip(np.round(values / scale) + zero_point, 0, steps) - zero_point) * scale


def test_the_output_is_quantized_to_the_range_that_training_saw():
    layer, (x,) = plain_layer("dense, sequence, no bias"), inputs_of("dense, sequence, no bias")
    plain = on_quantized_weights(layer, LAST, symmetric)
    wrapped = ks.QuantizeAware(layer)
    outputs = plain(x).numpy()
    wrapped(x, training=True)
    ends = outputs.min(), outputs.max()
    np.testing.assert_allclose(wrapped.output_quantizer.range_state, ends, rtol=1e-5)
    np.testing.assert_allclose(wrapped(2 * x), on_grid(2 * outputs, ends), atol=1e-5)


def test_of_several_outputs_the_first_is_quantized():
    layer = layers.LSTM(3, return_state=True)
    x = np.random.default_rng(0).standard_normal((2, 4, 5)).astype("float32")
    layer(x)
    plain = on_quantized_weights(layer, LAST, symmetric)
    outputs, *states = plain(x)
    ours, *our_states = ks.QuantizeAware(layer)(x)
    np.testing.assert_allclose(ours, on_grid(outputs.numpy(), (np.min(outputs), np.max(outputs))), atol=1e-5)
    for state, expected in zip(our_states, states, strict=True):
        np.testing.assert_allclose(state, expected, rtol=1e-5)


# What a layer does besides its outputs.


def test_a_mask_passes_from_an_embedding_to_a_recurrent_layer():
    def network():
        inputs = keras.Input((None,), dtype="int32")
        x = ks.QuantizeAware(layers.Embedding(9, 4, mask_zero=True))(inputs)
        return keras.Model(inputs, ks.QuantizeAware(layers.LSTM(3))(x))

    model = network()
    padded = np.array([[3, 5, 2, 0, 0], [1, 7, 4, 0, 0]])
    model(padded, training=True)
    np.testing.assert_allclose(model(padded), model(padded[:, :3]), rtol=1e-6)
    unmasked = wrap(layers.Embedding(9, 4))
    assert unmasked.compute_mask(padded) is None


def test_a_mask_given_by_hand_passes():
    layer, (x,) = plain_layer("lstm"), inputs_of("lstm")
    mask = np.array([[True, True, False, False]] * 2)
    expected = on_quantized_weights(layer, LAST, symmetric)(x, mask=mask)
    np.testing.assert_allclose(wrap(layer)(x, mask=mask), expected, rtol=1e-5, atol=1e-6)


def test_arguments_of_the_call_pass():
    layer, (query, value) = plain_layer("multi-head attention"), inputs_of("multi-head attention")
    mask = np.random.default_rng(0).random((2, 4, 5)) < 0.7
    mask[..., 0] = True
    plain = on_quantized_weights(layer, LAYERS["multi-head attention"][2], symmetric)
    options = {"attention_mask": mask, "return_attention_scores": True}
    ours = wrap(layer)(query, value=value, **options)
    for part, expected in zip(ours, plain(query, value, **options), strict=True):
        np.testing.assert_allclose(part, expected, rtol=1e-4, atol=1e-5)


class Block(layers.Layer):
    """A layer of layers that updates statistics and seeds, and adds losses."""

    def build(self, shape):
        self.dense = layers.Dense(5, kernel_regularizer="l2")
        self.norm = layers.BatchNormalization(momentum=0.7)
        self.dropout = layers.Dropout(0.5, seed=7)
        self.calls = self.add_weight(shape=(), trainable=False, name="calls", initializer="zeros")
        self.dense.build(shape)
        self.norm.build((*shape[:-1], 5))

    def call(self, x, training=None):
        self.calls.assign(self.calls + 1)
        x = self.dense(x)
        self.add_loss(keras.ops.mean(keras.ops.square(x)))
        return self.dropout(self.norm(x, training=training), training=training)


@pytest.mark.parametrize("graph", [False, True])
def test_updates_inside_the_layer_are_kept(graph):
    x = np.random.default_rng(0).standard_normal((8, 6)).astype("float32")
    block = Block()
    block.build(x.shape)
    plain = Block()
    plain.build(x.shape)
    plain.set_weights(quantized_by_hand(block.weights, LAST, symmetric))
    wrapped = wrap(block)
    runs = [lambda call=call: call(x, training=True) for call in (wrapped, plain)]
    run, run_plain = map(tf.function, runs) if graph else runs
    for _ in range(3):
        np.testing.assert_allclose(run(), run_plain(), rtol=1e-4, atol=1e-5)
    assert float(block.calls) == float(plain.calls) >= 3
    assert len(block.non_trainable_variables) == len(plain.non_trainable_variables) == 4
    for ours, expected in zip(block.non_trainable_variables, plain.non_trainable_variables, strict=True):
        np.testing.assert_allclose(ours.numpy(), expected.numpy(), rtol=1e-5, atol=1e-6)


def test_losses_added_inside_the_layer_are_kept():
    x = np.random.default_rng(0).standard_normal((8, 6)).astype("float32")
    block = Block()
    block.build(x.shape)
    wrapped = wrap(block)
    wrapped(x)
    outputs = x @ symmetric(block.dense.kernel.numpy(), (0,))
    decay = 0.01 * np.sum(block.dense.kernel.numpy() ** 2)
    np.testing.assert_allclose(sorted(wrapped.losses), sorted([np.mean(outputs**2), decay]), rtol=1e-5)


def test_an_activity_regularizer_adds_its_loss():
    layer = layers.Dense(5, activity_regularizer=keras.regularizers.L2(0.3))
    x = np.random.default_rng(0).standard_normal((8, 6)).astype("float32")
    layer(x)
    wrapped = wrap(layer)
    plain = on_quantized_weights(layer, LAST, symmetric)
    wrapped(x)
    plain(x)
    np.testing.assert_allclose(wrapped.losses, plain.losses, rtol=1e-5)


def test_the_state_of_a_stateful_layer_is_kept():
    x = np.random.default_rng(0).standard_normal((2, 4, 5)).astype("float32")
    layer = layers.GRU(3, stateful=True)
    layer.build(x.shape)
    plain = on_quantized_weights(layer, LAST, symmetric)
    wrapped = wrap(layer)
    for _ in range(3):
        np.testing.assert_allclose(wrapped(x), plain(x), rtol=1e-5, atol=1e-6)


def test_dropout_inside_a_recurrent_layer_differs_from_call_to_call():
    layer, (x,) = layers.LSTM(3, dropout=0.5, recurrent_dropout=0.2), inputs_of("lstm")
    wrapped = wrap(layer)
    first, second = wrapped(x, training=True).numpy(), wrapped(x, training=True).numpy()
    assert (first != second).any()
    np.testing.assert_array_equal(wrapped(x), wrapped(x))


# XNOR-Net.


def padding_of(length, window, stride, padding):
    if padding == "valid":
        return 0, 0
    if padding == "causal":
        return window - 1, 0
    total = max((-(-length // stride) - 1) * stride + window - length, 0)
    return total // 2, total - total // 2


def convolve(x, kernel, strides, padding, dilation):
    """A convolution of images, one output at a time."""
    windows = [(size - 1) * rate + 1 for size, rate in zip(kernel.shape[:2], dilation, strict=True)]
    pads = [padding_of(*each, padding) for each in zip(x.shape[1:3], windows, strides, strict=True)]
    x = np.pad(x.astype("float64"), [(0, 0), *pads, (0, 0)])
    counts = [(x.shape[1 + i] - windows[i]) // strides[i] + 1 for i in range(2)]
    result = np.zeros((len(x), *counts, kernel.shape[-1]))
    for i, j in np.ndindex(*counts):
        top, left = i * strides[0], j * strides[1]
        patch = x[:, top : top + windows[0] : dilation[0], left : left + windows[1] : dilation[1]]
        result[:, i, j] = np.einsum("nhwc,hwco->no", patch, kernel)
    return result


def xnor(x, kernel, bias, scaled, *window):
    """`K * (sign(x) (*) sign(W)) * alpha + b`, K the mean of |x| over the channels and the window."""
    alpha = np.mean(abs(kernel), axis=(0, 1, 2)) if scaled else 1
    box = np.full((*kernel.shape[:2], 1, 1), 1 / np.prod(kernel.shape[:2]))
    scales = convolve(np.mean(abs(x), axis=-1, keepdims=True), box, *window) if scaled else 1
    signs = convolve(np.where(x >= 0, 1, -1), np.where(kernel >= 0, 1, -1), *window)
    return scales * signs * alpha + bias


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize(
    ("strides", "padding", "dilation"),
    [(1, "valid", 1), (1, "same", 1), (2, "same", 1), ((2, 1), "valid", 1), (1, "same", 2), (1, "valid", (1, 2))],
)
def test_a_binary_convolution_is_that_of_xnor_net(strides, padding, dilation, scaled):
    layer = layers.Conv2D(4, (3, 2), strides=strides, padding=padding, dilation_rate=dilation, activation="tanh")
    x = np.random.default_rng(0).standard_normal((2, 7, 6, 3)).astype("float32")
    layer.build(x.shape)
    randomize(layer)
    window = layer.strides, padding, layer.dilation_rate
    expected = np.tanh(xnor(x, layer.kernel.numpy(), layer.bias.numpy(), scaled, *window))
    wrapped = ks.QuantizeAware(layer, Binary(scaled=scaled, inputs="approx_sign"))
    assert wrapped.output_quantizer is None
    np.testing.assert_allclose(wrapped(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dilation", [1, 2])
def test_a_causal_binary_convolution_is_that_of_xnor_net(dilation):
    layer = layers.Conv1D(4, 3, padding="causal", dilation_rate=dilation, use_bias=False)
    x = np.random.default_rng(0).standard_normal((2, 8, 3)).astype("float32")
    layer.build(x.shape)
    kernel = layer.kernel.numpy()[:, np.newaxis]
    expected = xnor(x[:, :, np.newaxis], kernel, 0, True, (1, 1), "causal", (dilation, 1))[:, :, 0]
    np.testing.assert_allclose(ks.QuantizeAware(layer, "xnor")(x), expected, rtol=1e-4, atol=1e-5)


def test_a_binary_dense_layer_is_that_of_xnor_net_and_so_are_its_gradients():
    layer = layers.Dense(5)
    x = np.random.default_rng(0).standard_normal((2, 4, 6)).astype("float32")
    layer.build(x.shape)
    randomize(layer)
    kernel, bias = layer.kernel.numpy(), layer.bias.numpy()
    signs, kernel_signs = np.where(x >= 0, 1, -1), np.where(kernel >= 0, 1, -1)
    scales, alpha = np.mean(abs(x), axis=-1, keepdims=True), np.mean(abs(kernel), axis=0)
    wrapped = ks.QuantizeAware(layer, "xnor")
    inputs = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        outputs = wrapped(inputs)
        loss = tf.reduce_sum(outputs)
    by_x, by_kernel, by_bias = tape.gradient(loss, [inputs, layer.kernel.value, layer.bias.value])
    np.testing.assert_allclose(outputs, scales * (signs @ (kernel_signs * alpha)) + bias, rtol=1e-4, atol=1e-5)
    by_signs = scales * (kernel_signs * alpha).sum(axis=1)
    np.testing.assert_allclose(by_x, by_signs * (abs(x) <= 1), rtol=1e-4, atol=1e-5)
    by_weight = np.sum(scales * signs, axis=(0, 1))[:, np.newaxis]
    expected = by_weight * (1 / len(kernel) + alpha * (abs(kernel) <= 1))
    np.testing.assert_allclose(by_kernel, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(by_bias, np.full(5, x.shape[0] * x.shape[1]), rtol=1e-6)


def test_layers_that_cannot_take_binary_inputs_have_binary_weights_only():
    for kind in ("conv 2d, groups", "depthwise 2d, twice", "lstm"):
        layer, inputs = plain_layer(kind), inputs_of(kind)
        expected = on_quantized_weights(layer, LAYERS[kind][2], binary)(*inputs)
        np.testing.assert_allclose(wrap(layer, "xnor")(*inputs), expected, rtol=1e-4, atol=1e-5)


# BinaryConnect.


@pytest.mark.parametrize("constraint", [None, "non_neg", keras.constraints.MaxNorm(0.5)])
def test_binary_connect_clips_the_real_weights_after_the_users_own_constraint(constraint, tmp_path):
    x, y = regression()
    wrapped = ks.QuantizeAware(layers.Dense(3, kernel_constraint=constraint), "binary_connect", None)
    model = keras.Sequential([keras.Input((6,)), wrapped])
    model.compile(keras.optimizers.SGD(5.0), "mse")
    for reloaded in (False, True):
        if reloaded:
            model.save(tmp_path / "model.keras")
            model = keras.saving.load_model(tmp_path / "model.keras")
        fit(model, x, y, epochs=1)
        kernel = model.layers[-1].layer.kernel.numpy()
        assert abs(kernel).max() <= 1
        if constraint is None:
            assert (abs(kernel) == 1).any()
        elif constraint == "non_neg":
            assert kernel.min() == 0
            assert kernel.max() == 1
        else:
            assert np.linalg.norm(kernel, axis=0).max() <= 0.5 + 1e-5


def test_a_stochastic_sign_is_random_in_training_and_the_sign_otherwise():
    layer = layers.Dense(40, use_bias=False)
    layer.build((None, 30))
    layer.kernel.assign(np.random.default_rng(0).uniform(-0.9, 0.9, (30, 40)))
    wrapped = wrap(layer, Binary(scaled=False, stochastic=True, clip=True))
    x = np.eye(30, dtype="float32")
    first, second = (wrapped(x, training=True).numpy() for _ in range(2))
    assert set(np.unique(first)) == {-1, 1}
    assert (first != second).any()
    np.testing.assert_array_equal(wrapped(x), np.where(layer.kernel.numpy() >= 0, 1, -1))


# The layer that keeps the range.


def batches(count=4):
    rng = np.random.default_rng(8)
    return [(rng.standard_normal((20, 5)) * (k + 1) + 0.3).astype("float32") for k in range(count)]


def test_the_first_batch_begins_the_range_and_later_ones_move_it():
    layer = FakeQuantize("int8")
    ends = None
    for x in batches():
        result = layer(x, training=True)
        new = np.array([x.min(), x.max()])
        ends = new if ends is None else 0.99 * ends + 0.01 * new
        np.testing.assert_allclose(layer.range_state, ends, rtol=1e-5)
        np.testing.assert_allclose(result, on_grid(x, ends), atol=1e-5)


def test_the_range_of_the_last_batch():
    layer = FakeQuantize(Affine(8, range="min_max"))
    for x in batches():
        layer(x, training=True)
        np.testing.assert_allclose(layer.range_state, [x.min(), x.max()], rtol=1e-6)


@pytest.mark.parametrize("quantizer", ["int8", "fixed8", LearnedStep(8)], ids=repr)
def test_inference_and_freezing_leave_the_range_as_it_is(quantizer):
    first, *others = batches()
    layer = FakeQuantize(quantizer)
    layer(first, training=True)
    before = layer.range_state.numpy()
    for x in others:
        layer(x)
        layer(x, training=False)
    layer.frozen = True
    for x in others:
        layer(x, training=True)
    np.testing.assert_array_equal(layer.range_state, before)


def test_observing_measures_outside_of_training_and_a_reset_begins_anew():
    first, second, *_ = batches()
    layer = FakeQuantize("int8")
    layer(first, training=True)
    layer.reset()
    layer.observing = True
    layer(second)
    np.testing.assert_allclose(layer.range_state, [second.min(), second.max()], rtol=1e-6)


@pytest.mark.parametrize("quantizer", ["int8", "fixed8", Affine(8, range="percentile")], ids=repr)
def test_before_any_data_the_input_itself_is_measured(quantizer):
    layer = FakeQuantize(quantizer)
    for x in batches():
        expected = layer.quantizer(tf.constant(x), None, ())
        np.testing.assert_allclose(layer(x), expected, atol=1e-5)
    assert float(layer.initialized) == 0


@pytest.mark.parametrize("quantizer", ["int8", Affine(8, range="min_max"), "fixed8", LearnedStep(8)], ids=repr)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_batch_that_is_not_finite_does_not_destroy_the_range(quantizer, bad):
    first, second, *_ = batches()
    layer = FakeQuantize(quantizer)
    layer(first, training=True)
    broken = np.where(np.arange(5) == 2, bad, second).astype("float32")
    layer(broken, training=True)
    assert np.isfinite(layer.range_state).all()
    assert np.isfinite(layer(second)).all()


@pytest.mark.parametrize("quantizer", ["int8", Affine(8, range="min_max"), "fixed8", LearnedStep(8)], ids=repr)
def test_a_first_batch_that_is_not_finite_does_not_begin_the_range(quantizer):
    first, *_ = batches()
    layer, fresh = FakeQuantize(quantizer), FakeQuantize(quantizer)
    layer(np.full_like(first, np.nan), training=True)
    layer(first, training=True)
    fresh(first, training=True)
    np.testing.assert_allclose(layer.range_state, fresh.range_state, rtol=1e-6)


@pytest.mark.parametrize("quantizer", ["int8", Affine(4, range=(-2, 3)), FixedPoint(8, 1), "fixed8"], ids=repr)
def test_activations_have_the_gradient_of_the_grid(quantizer):
    first, second, *_ = batches()
    layer = FakeQuantize(quantizer)
    layer(first, training=True)
    layer.frozen = True
    x = tf.constant(3 * second)
    levels = layer(tf.constant([[-1e6, 1e6]])).numpy()
    with tf.GradientTape() as tape:
        tape.watch(x)
        total = tf.reduce_sum(layer(x, training=True))
    inside = (x.numpy() >= levels.min()) & (x.numpy() <= levels.max())
    assert 0 < inside.sum() < inside.size
    np.testing.assert_array_equal(tape.gradient(total, x), inside)


def test_integers_are_a_type_error():
    with pytest.raises(TypeError, match=r"float.*int32"):
        FakeQuantize("int8")(np.array([1, 2], "int32"))


def test_none_is_no_quantizer_of_activations():
    with pytest.raises(ValueError, match="quantizer"):
        FakeQuantize(None)


# Models.


class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.hidden = ks.QuantizeAware(layers.Dense(8, activation="relu"), "int4")
        self.norm = layers.BatchNormalization()
        self.out = ks.QuantizeAware(layers.Dense(3), LearnedStep(4), LearnedStep(8))

    def call(self, x, training=None):
        return self.out(self.norm(self.hidden(x), training=training))


def test_a_subclassed_model_trains_compiled_as_it_does_otherwise():
    x, y = regression()
    losses = []
    for jit_compile in (False, True):
        keras.utils.set_random_seed(1)
        model = Subclassed()
        model.compile("sgd", "mse", jit_compile=jit_compile)
        losses.append(fit(model, x, y, shuffle=False).history["loss"])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)


def test_a_subclassed_model_trains_and_reloads(tmp_path):
    x, y = regression()
    model = Subclassed()
    model.compile(keras.optimizers.Adam(0.01), "mse", jit_compile=False)
    losses = fit(model, x, y, epochs=8).history["loss"]
    assert losses[-1] < losses[0]
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    loaded = keras.saving.load_model(tmp_path / "model.keras", custom_objects={"Subclassed": Subclassed})
    np.testing.assert_array_equal(loaded(x), model(x))
    other = Subclassed()
    other(x)
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(other(x), model(x))
    fit(loaded, x, y, epochs=1)


def test_the_steps_of_a_learned_quantizer_are_trained():
    x, y = regression()
    wrapped = ks.QuantizeAware(layers.Dense(3), LearnedStep(4), LearnedStep(8))
    model = keras.Sequential([keras.Input((6,)), wrapped])
    steps = [wrapped.weight_quantizers[0].range_state, wrapped.output_quantizer.range_state]
    assert {id(step) for step in steps} <= {id(v) for v in model.trainable_variables}
    wrapped(x, training=True)
    before = [step.numpy() for step in steps]
    model.compile(keras.optimizers.SGD(0.05), "mse")
    fit(model, x, y)
    assert all(step.numpy() != value for step, value in zip(steps, before, strict=True))


def test_a_layer_that_is_not_trainable_stays():
    x, y = regression()
    wrapped = ks.QuantizeAware(layers.Dense(3), LearnedStep(4))
    model = keras.Sequential([keras.Input((6,)), wrapped, layers.Dense(3)])
    wrapped.trainable = False
    before = [v.numpy() for v in (*wrapped.layer.weights, wrapped.weight_quantizers[0].range_state)]
    model.compile("sgd", "mse")
    fit(model, x, y)
    after = [v.numpy() for v in (*wrapped.layer.weights, wrapped.weight_quantizers[0].range_state)]
    for now, then in zip(after, before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_a_shared_wrapper_quantizes_both_of_its_calls():
    layer, (x,) = plain_layer("dense, sequence, no bias"), inputs_of("dense, sequence, no bias")
    plain = on_quantized_weights(layer, LAST, symmetric)
    wrapped = wrap(layer)
    inputs = [keras.Input(x.shape[1:]) for _ in range(2)]
    model = keras.Model(inputs, layers.Add()([wrapped(i) for i in inputs]))
    np.testing.assert_allclose(model([x, 2 * x]), plain(x) + plain(2 * x), rtol=1e-4, atol=1e-5)
    assert len(model.trainable_variables) == 1


# Bad input.


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ks.QuantizeAware("dense"), TypeError, "Keras layer"),
        (lambda: ks.QuantizeAware(layers.Dense), TypeError, "Keras layer"),
        (lambda: ks.QuantizeAware(ks.QuantizeAware(layers.Dense(2))), ValueError, "quantized already"),
        (
            lambda: ks.QuantizeAware(layers.TimeDistributed(ks.QuantizeAware(layers.Dense(2)))),
            ValueError,
            "quantized already",
        ),
        (lambda: ks.QuantizeAware(FakeQuantize("int8")), ValueError, "quantized already"),
        (lambda: ks.QuantizeAware(keras.Sequential([layers.Dense(2)])), TypeError, "is a model"),
        (lambda: ks.QuantizeAware(layers.Dense(2), "int99"), ValueError, "num_bits"),
        (lambda: ks.QuantizeAware(layers.Dense(2), "intt8"), ValueError, "Unknown quantizer"),
        (lambda: ks.QuantizeAware(layers.Dense(2), "int8", "ternary"), ValueError, "for weights"),
        (lambda: ks.QuantizeAware(layers.Dense(2), "int8", Affine(per_channel=True)), ValueError, "one scale"),
    ],
)
def test_what_cannot_be_wrapped_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("layer", [layers.Flatten, layers.ReLU, layers.BatchNormalization])
def test_a_layer_without_weights_to_quantize_is_refused_once_it_is_built(layer):
    wrapped = ks.QuantizeAware(layer(name="mine"))
    with pytest.raises(ValueError, match=r"'mine' has no weights"):
        wrapped(np.zeros((2, 3), "float32"))
