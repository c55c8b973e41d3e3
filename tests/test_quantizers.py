"""The laws that every quantizer obeys, and each grid and gradient against a derivation by hand."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_squeeze import quantizers
from keras_squeeze.quantizers import Affine, Binary, FixedPoint, LearnedStep, Ternary, ops

# Each row: a quantizer of weights, as `for_weights` leaves it or with every argument given.
AFFINE = [
    *(
        Affine(bits, symmetric=symmetric, per_channel=per_channel, narrow_range=symmetric, range="min_max")
        for bits in (2, 4, 8, 16)
        for symmetric in (True, False)
        for per_channel in (True, False)
    ),
    *(Affine(4, symmetric, True, narrow, "min_max") for symmetric, narrow in [(True, False), (False, True)]),
    *(
        Affine(bits, symmetric, per_channel, symmetric, kind)
        for bits, symmetric, per_channel in [(4, True, True), (8, False, False)]
        for kind in ("moving_average", "percentile", "mse")
    ),
    *(Affine(4, symmetric, True, None, (-0.75, 1.5)) for symmetric in (True, False)),
    Affine(3).for_weights(),
]
FIXED = [FixedPoint(8), FixedPoint(4), FixedPoint(2), FixedPoint(8, 0), FixedPoint(6, 2), FixedPoint(4, -1)]
LEARNED = [
    LearnedStep(bits, signed, per_channel)
    for bits, signed, per_channel in [(2, True, False), (4, True, True), (4, False, False), (8, False, True)]
]
TERNARY = [Ternary(), Ternary(per_channel=False)]
BINARY = [
    Binary(),
    Binary(inputs="straight_through"),
    Binary(inputs="approx_sign"),
    Binary(scaled=False, clip=True),
    Binary(scaled=False, clip=True, stochastic=True),
    Binary(scaled=False),
    Binary(gradient="approx_sign"),
    Binary(scaled=False, gradient="swish_sign"),
]
UNIFORM = [*AFFINE, *FIXED, *LEARNED]
ALL = [*UNIFORM, *TERNARY, *BINARY]

NAMED = {
    "int8": Affine(8),
    "int4": Affine(4),
    "int3": Affine(3),
    "int2": Affine(2),
    "int16": Affine(16),
    "fixed8": FixedPoint(8),
    "fixed12": FixedPoint(12),
    "ternary": Ternary(),
    "binary": Binary(),
    "binary_connect": Binary(scaled=False, clip=True),
    "xnor": Binary(inputs="straight_through"),
}


def sample(*shape, seed=0):
    """Values of both signs, every channel of another size, none of them symmetric about zero."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape) * np.geomspace(0.2, 2, shape[-1]) + 0.1
    return values.astype("float32")


WEIGHT = sample(3, 5, 4, 6)


@pytest.fixture(autouse=True)
def fresh_keras():
    """In place of the fixture of all tests: nothing here makes a layer, and clearing Keras takes most of the time."""


def state_of(quantizer, x, channels=(-1,)):
    return quantizer.measure(tf.constant(x), channels)


def quantize(quantizer, x, state=None, channels=(-1,)):
    return quantizer(tf.constant(x), state, channels).numpy()


def value_and_gradient(function, *inputs):
    """A function's value and the gradient of its weighted sum by each of the inputs; the weights as well."""
    inputs = [tf.constant(value) for value in inputs]
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        value = function(*inputs)
        upstream = np.random.default_rng(9).standard_normal(value.shape).astype("float32")
        total = tf.reduce_sum(value * upstream)
    gradients = tape.gradient(total, inputs)
    return value.numpy(), [gradient.numpy() for gradient in gradients], upstream


def is_per_channel(quantizer):
    if isinstance(quantizer, Binary):
        return quantizer.scaled
    return getattr(quantizer, "per_channel", False) and not isinstance(getattr(quantizer, "range", None), tuple)


def over_channels(statistic, x, per_channel):
    """A statistic over all but the last axis, or over everything, that broadcasts with `x`."""
    return statistic(x, axis=tuple(range(x.ndim - 1)) if per_channel else None, keepdims=True)


# Laws of all.


@pytest.mark.parametrize("quantizer", ALL, ids=repr)
def test_shape_and_type_stay(quantizer):
    result = quantizer(tf.constant(WEIGHT))
    assert result.shape == WEIGHT.shape
    assert result.dtype == "float32"


@pytest.mark.parametrize("quantizer", ALL, ids=repr)
def test_quantizing_once_more_changes_nothing(quantizer):
    state = state_of(quantizer, WEIGHT)
    once = quantize(quantizer, WEIGHT, state)
    tolerance = 0 if state is not None else 2e-6  # a mean of equal numbers is that number to rounding
    np.testing.assert_allclose(quantize(quantizer, once, state), once, rtol=tolerance)


MEASURED_ANEW = [q for q in AFFINE if q.range == "min_max" and q.symmetric] + FIXED


@pytest.mark.parametrize("quantizer", MEASURED_ANEW, ids=repr)
def test_measuring_the_quantized_weight_gives_the_same_grid(quantizer):
    once = quantize(quantizer, WEIGHT)
    np.testing.assert_allclose(quantize(quantizer, once), once, rtol=1e-6)


@pytest.mark.parametrize("quantizer", ALL, ids=repr)
def test_there_are_at_most_two_to_the_bits_values_to_a_scale(quantizer):
    result = quantize(quantizer, sample(4000, 3), state_of(quantizer, sample(4000, 3)))
    groups = result.T if is_per_channel(quantizer) else [result.reshape(-1)]
    limit = 3 if isinstance(quantizer, Ternary) else 2**quantizer.bits
    for group in groups:
        assert len(np.unique(group)) <= limit


@pytest.mark.parametrize("quantizer", ALL, ids=repr)
def test_zero_stays_zero_where_the_quantizer_says_so(quantizer):
    weight = WEIGHT.copy()
    weight[::2] = 0
    zeros = quantize(quantizer, weight)[weight == 0] == 0
    assert zeros.all() if quantizer.has_zero else not zeros.any()


@pytest.mark.parametrize("quantizer", ALL, ids=repr)
@pytest.mark.parametrize("given_state", [False, True])
def test_the_integers_stand_for_the_quantized_weight(quantizer, given_state):
    state = state_of(quantizer, WEIGHT) if given_state else None
    integers, scale, zero_point = quantizer.to_integers(WEIGHT, state)
    assert (integers.dtype, scale.dtype, zero_point.dtype) == ("int32", "float32", "int32")
    assert integers.shape == WEIGHT.shape
    expected = quantize(quantizer, WEIGHT, state)
    np.testing.assert_allclose(scale * (integers - zero_point), expected, rtol=1e-6)
    assert np.size(scale) == (WEIGHT.shape[-1] if is_per_channel(quantizer) else 1)


@pytest.mark.parametrize("quantizer", ALL, ids=repr)
def test_the_integers_are_within_the_range_of_the_bits(quantizer):
    integers, _, zero_point = quantizer.to_integers(WEIGHT * 1000, state_of(quantizer, WEIGHT))
    if isinstance(quantizer, (Ternary, Binary)):
        assert set(np.unique(integers)) == ({-1, 0, 1} if isinstance(quantizer, Ternary) else {-1, 1})
        return
    signed = getattr(quantizer, "signed", True)
    narrow = isinstance(quantizer, Affine) and (
        quantizer.symmetric if quantizer.narrow_range is None else quantizer.narrow_range
    )
    low = -(2 ** (quantizer.num_bits - 1)) if signed else 0
    high = low + 2**quantizer.num_bits - 1
    assert integers.min() == low + narrow
    assert integers.max() == high
    assert ((zero_point >= low + narrow) & (zero_point <= high)).all()
    if not (isinstance(quantizer, Affine) and not quantizer.symmetric):
        assert not zero_point.any()


@pytest.mark.parametrize("quantizer", ALL, ids=repr)
def test_a_weight_of_zeros_is_finite(quantizer):
    zeros = np.zeros((4, 3), "float32")
    integers, scale, zero_point = quantizer.to_integers(zeros)
    assert np.isfinite(scale).all()
    if quantizer.has_zero or quantizer.scaled:
        np.testing.assert_array_equal(scale * (integers - zero_point), zeros)
    value, (gradient,), _ = value_and_gradient(quantizer, zeros)
    assert np.isfinite(value).all()
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("quantizer", ALL, ids=repr)
def test_the_config_survives_json_without_a_scope(quantizer):
    text = json.dumps(keras.saving.serialize_keras_object(quantizer))
    loaded = keras.saving.deserialize_keras_object(json.loads(text))
    assert type(loaded) is type(quantizer)
    assert loaded == quantizer
    np.testing.assert_array_equal(quantize(loaded, WEIGHT), quantize(quantizer, WEIGHT))


@pytest.mark.parametrize("quantizer", ALL, ids=repr)
def test_repr_is_what_makes_an_equal_one(quantizer):
    assert eval(repr(quantizer), vars(quantizers)) == quantizer


@pytest.mark.parametrize("quantizer", ALL, ids=repr)
def test_compiled_is_as_eager(quantizer):
    def run(x):
        state = quantizer.measure(x, (-1,))
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = quantizer(x, state, (-1,))
        return value, tape.gradient(value, x), quantizer(x, None, (-1,))

    x = tf.constant(sample(25, 4))
    for eager, compiled in zip(run(x), tf.function(run, jit_compile=True)(x), strict=True):
        np.testing.assert_allclose(compiled, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "expected"), NAMED.items())
def test_lookup_by_name(name, expected):
    assert quantizers.get(name) == expected


def test_every_name_has_a_row():
    assert set(quantizers.NAMES) <= set(NAMED)


@pytest.mark.parametrize("quantizer", ALL, ids=repr)
def test_a_quantizer_and_none_are_themselves(quantizer):
    assert quantizers.get(quantizer) is quantizer
    assert quantizers.get(None) is None


def test_every_class_has_a_row():
    defined = {v for v in vars(quantizers).values() if isinstance(v, type) and issubclass(v, quantizers.Quantizer)}
    assert defined - {quantizers.Quantizer, quantizers.UniformQuantizer} == {type(quantizer) for quantizer in ALL}


@pytest.mark.parametrize("quantizer", ALL, ids=repr)
def test_what_is_chosen_for_weights_stays_chosen(quantizer):
    chosen = quantizer.for_weights()
    assert chosen.for_weights() == chosen
    given = {name: value for name, value in quantizer.get_config().items() if value is not None}
    assert {name: chosen.get_config()[name] for name in given} == given


def test_weights_are_symmetric_per_channel_and_activations_affine_per_tensor():
    assert Affine(8).for_weights() == Affine(8, True, True, True, "min_max")
    assert Affine(8).for_activations() == Affine(8, False, False, False, "moving_average")
    assert LearnedStep().for_weights().signed
    assert [LearnedStep().for_activations(signed=signed).signed for signed in (True, False)] == [True, False]


# The grids, against TensorFlow and NumPy.


def away_from_ties(x, scale):
    """Moves values that lie between two levels towards the lower one."""
    between = np.abs(x / scale - np.floor(x / scale) - 0.5) < 1e-2
    return np.where(between, x - 0.1 * scale, x).astype("float32")


@pytest.mark.parametrize("quantizer", [q for q in AFFINE if q.range == "min_max"], ids=repr)
def test_affine_grids_are_those_of_tensorflow(quantizer):
    ends = state_of(quantizer, WEIGHT).numpy()
    _, scale, _ = quantizer.to_integers(WEIGHT, ends)
    too_fine = quantizer.num_bits == 16  # its ties are too close to tell apart in float32
    x = away_from_ties(2 * WEIGHT, scale)
    low, high = ends
    if quantizer.symmetric:  # the larger end of the range, 2**(bits - 1) - 1 steps from zero
        high = np.maximum(-low, high)
        low = -high if quantizer.narrow_range else -high * 2 ** (quantizer.num_bits - 1) / (high / scale)
    options = {"num_bits": quantizer.num_bits, "narrow_range": quantizer.narrow_range}
    if quantizer.per_channel:
        expected = tf.quantization.fake_quant_with_min_max_vars_per_channel(x, low.ravel(), high.ravel(), **options)
    else:
        expected = tf.quantization.fake_quant_with_min_max_vars(x, low, high, **options)
    np.testing.assert_allclose(
        quantize(quantizer, x, ends), expected, rtol=1e-5, atol=1.01 * scale.max() if too_fine else 1e-6
    )


@pytest.mark.parametrize("shift", [-5.0, 0.0, 5.0])
def test_an_affine_grid_reaches_over_values_of_one_sign_to_zero(shift):
    quantizer = Affine(8, symmetric=False, per_channel=False)
    x = np.linspace(-1, 1, 41, dtype="float32") + np.float32(shift)
    ends = min(x.min(), 0.0), max(x.max(), 0.0)
    _, scale, _ = quantizer.to_integers(x)
    np.testing.assert_allclose(scale, (ends[1] - ends[0]) / 255, rtol=1e-6)
    np.testing.assert_allclose(quantize(quantizer, x), x, atol=scale / 2 * 1.001 + scale / 2 * (shift == 0))


@pytest.mark.parametrize("per_channel", [False, True])
def test_the_percentile_range_is_that_of_numpy(per_channel):
    x = sample(50, 20, 3)
    state = state_of(Affine(8, per_channel=per_channel, range="percentile"), x)
    expected = [
        over_channels(lambda *args, end=end, **kwargs: np.quantile(args[0], end, **kwargs), x, per_channel)
        for end in (0.001, 0.999)
    ]
    np.testing.assert_allclose(np.reshape(state, np.shape(expected)), expected, rtol=1e-4)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
def test_the_mse_range_has_the_least_error_of_all_shares(bits, symmetric, per_channel):
    x = np.random.default_rng(3).standard_t(3, (300, 3)).astype("float32")
    quantizer = Affine(bits, symmetric, per_channel, range="mse")
    state = state_of(quantizer, x)
    whole = np.stack([over_channels(np.min, x, per_channel), over_channels(np.max, x, per_channel)])

    def errors_of(ends):
        return over_channels(np.mean, (quantize(quantizer, x, tf.constant(ends, tf.float32)) - x) ** 2, per_channel)

    errors = np.stack([errors_of(whole * k / 40) for k in range(8, 41)])
    np.testing.assert_allclose(errors_of(np.reshape(state, whole.shape)), errors.min(axis=0), rtol=1e-4)


def test_a_fixed_range_is_what_it_says():
    quantizer = Affine(8, symmetric=False, range=(-1, 2))
    assert not quantizer.keeps_state
    np.testing.assert_allclose(quantize(quantizer, np.float32([-9, -1, 0, 2, 9])), [-1, -1, 0, 2, 2], atol=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize(("reach", "more"), [(0.9, 0), (1.0, 0), (1.1, 1)])
def test_a_fixed_point_scale_is_the_least_power_of_two_that_reaches(bits, reach, more):
    """Exactly: also where the largest value is the end of a grid, at every power of two."""
    exponents = np.arange(-100, 90)
    high = 2 ** (bits - 1) - 1
    ends = np.float32([-0.5, reach])[:, np.newaxis] * np.float32(high * 2.0**exponents)
    scales = FixedPoint(bits).grid(tf.constant(ends)).scale
    np.testing.assert_array_equal(np.log2(scales), exponents + more)


def test_a_fixed_point_scale_is_that_of_the_whole_weight():
    _, scale, _ = FixedPoint(8).to_integers(np.float32([[0.01, 0.5], [0.3, -1.9]]))
    assert scale == 2.0**-6


@pytest.mark.parametrize(("bits", "integer_bits"), [(8, 0), (8, 3), (8, 7), (4, -2), (4, 9)])
def test_fixed_point_has_the_integer_bits_that_were_asked_for(bits, integer_bits):
    step, end = 2.0 ** -(bits - 1 - integer_bits), 2.0**integer_bits
    x = np.float32(np.random.default_rng(4).uniform(-1.5 * end, 1.5 * end, 200))
    expected = np.clip(np.round(x / step), -end / step, end / step - 1) * step
    np.testing.assert_array_equal(quantize(FixedPoint(bits, integer_bits), x), expected)


@pytest.mark.parametrize("quantizer", LEARNED, ids=repr)
def test_a_learned_step_begins_at_twice_the_mean_over_the_root_of_the_largest_integer(quantizer):
    high = 2 ** (quantizer.num_bits - 1) - 1 if quantizer.signed else 2**quantizer.num_bits - 1
    expected = 2 * over_channels(np.mean, abs(WEIGHT), quantizer.per_channel) / np.sqrt(high)
    step = np.exp(np.reshape(state_of(quantizer, WEIGHT), expected.shape))
    np.testing.assert_allclose(step, expected, rtol=1e-5)


@pytest.mark.parametrize("quantizer", TERNARY, ids=repr)
@pytest.mark.parametrize("channels", [(-1,), (-2,), (-2, -1), (0,)])
def test_ternary_is_the_formula(quantizer, channels):
    axes = tuple(axis for axis in range(4) if axis - 4 not in channels and axis not in channels)
    axes = axes if quantizer.per_channel else None
    threshold = 0.7 * np.mean(abs(WEIGHT), axis=axes, keepdims=True)
    large = abs(WEIGHT) > threshold
    alpha = np.sum(abs(WEIGHT) * large, axis=axes, keepdims=True) / np.sum(large, axis=axes, keepdims=True)
    result = quantize(quantizer, WEIGHT, channels=channels)
    np.testing.assert_allclose(result, alpha * np.sign(WEIGHT) * large, rtol=1e-5)


@pytest.mark.parametrize("quantizer", BINARY, ids=repr)
@pytest.mark.parametrize("channels", [(-1,), (-2,), (-2, -1)])
def test_binary_is_the_sign_times_the_mean_magnitude(quantizer, channels):
    weight = WEIGHT.copy()
    weight[0, 0] = 0
    axes = tuple(axis for axis in range(4) if axis - 4 not in channels)
    alpha = np.mean(abs(weight), axis=axes, keepdims=True) if quantizer.scaled else 1
    expected = alpha * np.where(weight >= 0, 1, -1)
    np.testing.assert_allclose(quantize(quantizer, weight, channels=channels), expected, rtol=1e-6)


@pytest.mark.parametrize("quantizer", [q for q in ALL if is_per_channel(q)], ids=repr)
@pytest.mark.parametrize("channels", [(-2,), (-2, -1), (1,)])
def test_every_channel_is_quantized_as_if_it_were_alone(quantizer, channels):
    whole = quantize(quantizer, WEIGHT, state_of(quantizer, WEIGHT, channels), channels)
    kept = [axis % 4 for axis in channels]
    for index in np.ndindex(*(WEIGHT.shape[axis] for axis in kept)):
        where = [slice(None)] * 4
        for axis, position in zip(kept, index, strict=True):
            where[axis] = slice(position, position + 1)
        alone = WEIGHT[tuple(where)]
        np.testing.assert_allclose(whole[tuple(where)], quantize(quantizer, alone, channels=channels), rtol=1e-5)


# The gradients, derived by hand.


@pytest.mark.parametrize("quantizer", [*AFFINE, *FIXED], ids=repr)
def test_the_gradient_goes_straight_through_inside_the_grid_and_is_zero_outside(quantizer):
    ends = state_of(quantizer, WEIGHT)
    integers, scale, zero_point = quantizer.to_integers(1000 * WEIGHT, ends)
    low, high = (scale * (end - zero_point) for end in (integers.min(), integers.max()))
    x = 3 * WEIGHT
    x = np.where(np.minimum(abs(x - low), abs(x - high)) < 1e-4 * scale, 0, x).astype("float32")
    _, (gradient,), upstream = value_and_gradient(lambda x: quantizer(x, ends), x)
    np.testing.assert_allclose(gradient, upstream * ((x > low) & (x < high)), rtol=1e-6)
    assert (gradient == 0).any()


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("quantizer", [Affine().for_weights(), FixedPoint()], ids=repr)
def test_a_weight_whose_range_is_measured_has_a_gradient_everywhere(quantizer, bits):
    """Also the largest of each channel, which is the end of the grid itself."""
    quantizer = quantizer.with_bits(bits)
    for seed in range(10):
        _, (gradient,), upstream = value_and_gradient(quantizer, sample(30, 8, seed=seed))
        np.testing.assert_allclose(gradient, upstream, rtol=1e-6)


@pytest.mark.parametrize("quantizer", LEARNED, ids=repr)
def test_the_gradient_of_a_learned_step_is_equation_3(quantizer):
    logarithm = state_of(quantizer, WEIGHT).numpy()  # what is trained
    step = np.exp(logarithm)
    largest = 2 ** (quantizer.num_bits - 1) - 1 if quantizer.signed else 2**quantizer.num_bits - 1
    least = -largest - 1 if quantizer.signed else 0
    x = 3 * WEIGHT
    value, (by_x, by_logarithm), upstream = value_and_gradient(quantizer, x, logarithm)
    ratio = x / step
    inside = (ratio > least) & (ratio < largest)
    by_hand = np.where(inside, np.round(ratio) - ratio, np.clip(ratio, least, largest))
    factor = 1 / np.sqrt(x.size / step.size * largest)
    np.testing.assert_allclose(value, np.round(np.clip(ratio, least, largest)) * step, rtol=1e-6)
    np.testing.assert_allclose(by_x, upstream * inside, rtol=1e-6)
    by_step = over_channels(np.sum, factor * upstream * by_hand, quantizer.per_channel).reshape(step.shape)
    np.testing.assert_allclose(by_logarithm, by_step * step, rtol=1e-3, atol=1e-5)  # the chain rule


# d sign(x) / dx of each published approximation, written out.
SIGN_GRADIENTS = {
    "straight_through": lambda x: np.where(abs(x) <= 1, 1.0, 0.0),
    "approx_sign": lambda x: np.where(abs(x) < 1, 2 - 2 * abs(x), 0.0),
    "swish_sign": lambda x: 5 * (2 - 5 * x * np.tanh(5 * x / 2)) / (1 + np.cosh(5 * x)),
}


@pytest.mark.parametrize("gradient", ops.GRADIENTS)
def test_the_gradient_of_a_sign_is_as_published(gradient):
    x = np.concatenate([np.linspace(-3, 3, 61), [-20, 20, 0.999, 1.001]]).astype("float32")
    x = np.where(abs(abs(x) - 1) < 1e-6, np.sign(x), x).astype("float32")
    value, (by_x,), upstream = value_and_gradient(Binary(scaled=False, gradient=gradient), x)
    np.testing.assert_array_equal(value, np.where(x >= 0, 1, -1))
    np.testing.assert_allclose(by_x, upstream * SIGN_GRADIENTS[gradient](x.astype("float64")), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gradient", ops.GRADIENTS)
@pytest.mark.parametrize("channels", [(-1,), (-2,), (-2, -1)])
def test_the_gradient_of_a_scaled_sign_is_that_of_xnor_net(gradient, channels):
    weight = 2 * WEIGHT
    axes = tuple(axis for axis in range(4) if axis - 4 not in channels)
    alpha = np.mean(abs(weight), axis=axes, keepdims=True)
    count = weight.size / alpha.size
    _, (by_w,), upstream = value_and_gradient(lambda w: Binary(gradient=gradient)(w, None, channels), weight)
    expected = upstream * (1 / count + alpha * SIGN_GRADIENTS[gradient](weight.astype("float64")))
    np.testing.assert_allclose(by_w, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("quantizer", TERNARY, ids=repr)
def test_the_gradient_of_ternary_is_one(quantizer):
    _, (gradient,), upstream = value_and_gradient(quantizer, 2 * WEIGHT)
    np.testing.assert_allclose(gradient, upstream, rtol=1e-6)


def test_the_gradient_of_a_stochastic_sign_is_one_up_to_one():
    x = np.linspace(-2, 2, 33, dtype="float32")
    uniform = np.random.default_rng(5).random(33, dtype="float32")
    quantizer = Binary(scaled=False, stochastic=True)
    value, (by_x,), upstream = value_and_gradient(lambda x: quantizer(x, uniform=uniform), x)
    np.testing.assert_array_equal(value, np.where(uniform < np.clip((x + 1) / 2, 0, 1), 1, -1))
    np.testing.assert_allclose(by_x, upstream * (abs(x) <= 1), rtol=1e-6)


def test_the_mean_of_a_stochastic_sign_is_the_hard_sigmoid():
    x = np.float32([-1.5, -1, -0.6, 0, 0.25, 1, 2])
    draws = 20_000
    uniform = np.random.default_rng(6).random((draws, x.size), dtype="float32")
    signs = Binary(scaled=False, stochastic=True)(tf.broadcast_to(x, (draws, x.size)), uniform=uniform).numpy()
    probability = np.clip((x + 1) / 2, 0, 1)
    error = 5 * np.sqrt(probability * (1 - probability) / draws)
    assert (abs((signs == 1).mean(axis=0) - probability) <= error).all()


@pytest.mark.parametrize("quantizer", [q for q in UNIFORM if q.keeps_state], ids=repr)
def test_a_range_over_batches_is_the_moving_average_or_the_last(quantizer):
    first, second = (state_of(quantizer, sample(40, 6, seed=seed)) for seed in (1, 2))
    updated = quantizer.updated(first, second)
    only_the_last = quantizer.learned or getattr(quantizer, "range", None) == "min_max"
    expected = second if only_the_last else 0.99 * first + 0.01 * second
    np.testing.assert_allclose(updated, expected, rtol=1e-5)


@pytest.mark.parametrize("quantizer", LEARNED, ids=repr)
def test_with_other_bits_a_learned_step_still_reaches_as_far(quantizer):
    state = state_of(quantizer, WEIGHT)
    grids = quantizer.grid(state), quantizer.with_bits(6).grid(quantizer.rescaled(state, 6))
    np.testing.assert_allclose(*(grid.high * grid.scale for grid in grids), rtol=1e-5)


# Bad input.


@pytest.mark.parametrize("make", [Affine, FixedPoint, LearnedStep])
@pytest.mark.parametrize(("bits", "error"), [(1, ValueError), (17, ValueError), (8.5, TypeError), (True, TypeError)])
def test_the_number_of_bits_is_an_int_from_2_to_16(make, bits, error):
    with pytest.raises(error, match=rf"num_bits.*Received: num_bits={bits}"):
        make(bits)
    with pytest.raises(error, match="num_bits"):
        make().with_bits(bits)


@pytest.mark.parametrize("name", ["int1", "int17", "fixed0"])
def test_a_name_with_too_few_or_too_many_bits_says_so(name):
    with pytest.raises(ValueError, match=r"num_bits.*\[2, 16\]"):
        quantizers.get(name)


@pytest.mark.parametrize("name", ["int", "INT8", "uint8", "int8 ", "float16", ""])
def test_an_unknown_name_lists_those_that_are_known(name):
    with pytest.raises(ValueError, match="Unknown quantizer") as info:
        quantizers.get(name)
    assert repr(name) in str(info.value)
    assert all(repr(known) in str(info.value) for known in quantizers.NAMES)


@pytest.mark.parametrize("identifier", [8, Affine, {"bits": 8}, ["int8"]], ids=repr)
def test_what_is_no_quantizer_is_a_type_error(identifier):
    with pytest.raises(TypeError, match="Received"):
        quantizers.get(identifier)


@pytest.mark.parametrize("quantizer", [Affine(), FixedPoint(), LearnedStep(), Ternary(), Binary()], ids=repr)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_has_no_integers(quantizer, bad):
    with pytest.raises(ValueError, match="finite"):
        quantizer.to_integers(np.float32([1, bad, 2]))


@pytest.mark.parametrize("quantizer", [Affine(8, per_channel=True), LearnedStep(4, per_channel=True)], ids=repr)
def test_activations_have_one_scale(quantizer):
    with pytest.raises(ValueError, match="one scale"):
        quantizer.for_activations()


@pytest.mark.parametrize(
    "quantizer",
    [
        Ternary(),
        Binary(scaled=False, stochastic=True),
        Binary(scaled=False, clip=True),
        Binary(inputs="approx_sign"),
    ],
    ids=repr,
)
def test_grids_that_are_for_weights_only(quantizer):
    with pytest.raises(ValueError, match="for weights"):
        quantizer.for_activations()


@pytest.mark.parametrize("ends", [(0.5, 1), (-2, -1), (1, -1), (0, 0), (-1, np.inf), (np.nan, 1), (-1, 0, 1), (1,)])
def test_a_fixed_range_has_two_finite_ends_with_zero_between(ends):
    with pytest.raises(ValueError, match="range"):
        Affine(8, range=ends)


@pytest.mark.parametrize("make", [lambda: Affine(range="minmax"), lambda: Affine(range=3)])
def test_an_unknown_range_lists_those_that_are_known(make):
    with pytest.raises(ValueError, match=r"min_max.*moving_average.*percentile.*mse.*Received"):
        make()


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: Affine(symmetric="yes"), TypeError),
        (lambda: Affine(per_channel=2), TypeError),
        (lambda: LearnedStep(signed="yes"), TypeError),
        (lambda: LearnedStep(per_channel=None), TypeError),
        (lambda: FixedPoint(8, 1.5), TypeError),
        (lambda: FixedPoint(8, True), TypeError),
        (lambda: FixedPoint(8, 65), ValueError),
        (lambda: Binary(gradient="relu"), ValueError),
        (lambda: Binary(inputs="relu"), ValueError),
        (lambda: Binary(stochastic=True, gradient="approx_sign"), ValueError),
    ],
)
def test_other_arguments_are_checked(make, error):
    with pytest.raises(error, match="Received"):
        make()
