"""`shrink(model, compensate=data)`: by hand, against what NumPy measures, and on real data."""

import keras
import numpy as np
import pytest
from random_graphs import randomize

import keras_squeeze as ks

layers = keras.layers


def two_layers(activation="relu"):
    inputs = keras.Input((6,))
    hidden = layers.Dense(8, activation=activation, name="hidden")(inputs)
    model = keras.Model(inputs, layers.Dense(3, name="logits")(hidden))
    randomize(model, 3)
    return model


def examples(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def hidden_means(model, x):
    """What `logits` reads of each unit, on average."""
    return np.asarray(keras.Model(model.input, model.get_layer("hidden").output)(x)).mean(axis=0)


def gone(model):
    return ~np.any(np.asarray(model.get_layer("hidden").kernel) != 0, axis=0)


@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
@pytest.mark.parametrize("as_data", [lambda x: x, lambda x: (x, np.zeros(len(x)))])
def test_the_mean_goes_into_the_next_bias(activation, as_data):
    """100 examples: several batches, the last of which is smaller."""
    model, x = two_layers(activation), examples(100, 6)
    means = hidden_means(model, x)
    kernel, bias = (np.array(weight) for weight in model.get_layer("logits").get_weights())
    ks.prune_neurons(model, 0.5, round_to=1)
    before = model.get_weights()
    small = ks.shrink(model, compensate=as_data(x))
    expected = bias + means[gone(model)] @ kernel[gone(model)]
    assert gone(model).sum() == 4
    np.testing.assert_allclose(small.get_layer("logits").bias, expected, rtol=1e-5)
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_pruned_twice_it_is_what_the_neurons_were_at_first():
    model, x = two_layers(), examples(64, 6)
    means = hidden_means(model, x)
    kernel, bias = (np.array(weight) for weight in model.get_layer("logits").get_weights())
    ks.prune_neurons(model, 0.25, round_to=1)
    ks.prune_neurons(model, 0.5, round_to=1)
    small = ks.shrink(model, compensate=x)
    np.testing.assert_allclose(
        small.get_layer("logits").bias, bias + means[gone(model)] @ kernel[gone(model)], rtol=1e-5
    )


def test_what_was_trained_since_is_left_alone():
    model, x = two_layers(), examples(64, 6)
    ks.prune_neurons(model, 0.5, round_to=1)
    logits = model.get_layer("logits")
    logits.bias.assign(np.asarray(logits.bias) + 0.1)
    with pytest.warns(UserWarning, match="nothing to compensate"):
        small = ks.shrink(model, compensate=x)
    np.testing.assert_array_equal(small.get_layer("logits").bias, logits.bias)


@pytest.mark.parametrize("layer", [layers.LSTM, layers.GRU])
def test_recurrent_layers_read_means(layer):
    """A unit that is constant already is as good as its mean: the answer of the whole model."""
    inputs = keras.Input((5, 6))
    hidden = layers.Dense(8, activation="relu", name="hidden")(inputs)
    model = keras.Model(inputs, layers.Dense(3)(layer(4, name="recurrent")(hidden)))
    randomize(model, 3)
    dense = model.get_layer("hidden")
    kernel = np.array(dense.kernel)
    kernel[:, :4] = 0  # constants, of which some are above zero
    dense.set_weights([kernel, np.abs(np.array(dense.bias))])
    x = examples(20, 5, 6)
    expected = np.asarray(model(x))
    ks.prune_neurons(model, 0.5, round_to=1, layers="hidden", criterion="l2")
    assert not np.allclose(model(x), expected, atol=1e-3)
    small = ks.shrink(model, compensate=x)
    assert small.get_layer("hidden").units == 4
    np.testing.assert_allclose(small(x), expected, atol=1e-5)


def test_statistics_are_measured_anew():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, padding="same", use_bias=False, name="conv")(inputs)
    x = layers.Dropout(0.5)(layers.BatchNormalization(name="norm", momentum=0.9)(x))
    x = layers.Conv2D(4, 3, use_bias=False, name="second")(layers.ReLU()(x))
    x = layers.BatchNormalization(name="second_norm", trainable=False)(x)
    model = keras.Model(inputs, layers.Dense(2)(layers.GlobalAveragePooling2D()(x)))
    randomize(model, 3)
    images = examples(64, 8, 8, 3)
    ks.prune_neurons(model, 0.5, round_to=1, layers="^conv$")
    small = ks.shrink(model, compensate=images)
    for conv, norm in (("conv", "norm"), ("second", "second_norm")):
        means, variances = [], []
        for batch in (images[:32], images[32:]):  # normalized by the batch's own statistics on the way
            entering = batch
            if conv == "second":
                first = np.asarray(small.get_layer("conv")(batch))
                own = small.get_layer("norm")
                scaled = (first - first.mean((0, 1, 2))) / np.sqrt(first.var((0, 1, 2)) + own.epsilon)
                entering = np.maximum(scaled * np.asarray(own.gamma) + np.asarray(own.beta), 0).astype("float32")
            values = np.asarray(small.get_layer(conv)(entering))
            means.append(values.mean((0, 1, 2)))
            variances.append(values.var((0, 1, 2)))
        layer = small.get_layer(norm)
        np.testing.assert_allclose(layer.moving_mean, np.mean(means, axis=0), atol=1e-5)
        np.testing.assert_allclose(layer.moving_variance, np.mean(variances, axis=0), rtol=1e-4)
    assert small.get_layer("norm").momentum == 0.9
    assert not small.get_layer("second_norm").trainable


@pytest.mark.parametrize("criterion", ["l2", "random", "apoz"])
def test_less_is_lost_on_the_digits(digits, criterion):
    x, y = digits
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Conv2D(32, 3, activation="relu"),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.003), loss, metrics=["accuracy"])
    model.fit(x[:1200], y[:1200], epochs=4, verbose=0)
    logits = model.predict(x[1200:], verbose=0)
    ks.prune_neurons(model, 0.5, round_to=4, criterion=criterion, data=(x[:600], y[:600]))
    plain, compensated = ks.shrink(model), ks.shrink(model, compensate=x[:600])
    losses = [each.evaluate(x[1200:], y[1200:], verbose=0)[0] for each in (plain, compensated)]
    errors = [np.mean((each.predict(x[1200:], verbose=0) - logits) ** 2) for each in (plain, compensated)]
    assert losses[1] < losses[0]
    assert errors[1] < errors[0]


def test_bad_data():
    model = two_layers()
    ks.prune_neurons(model, 0.5, round_to=1)
    before = model.get_weights()
    for nothing in (examples(0, 6), []):
        with pytest.raises(ValueError, match=r"`data` is empty"):
            ks.shrink(model, compensate=nothing)
    with pytest.raises(ValueError, match="not finite"):
        ks.shrink(model, compensate=np.full((4, 6), np.nan, "float32"))
    with pytest.raises(TypeError, match="an iterator or generator is empty"):
        ks.shrink(model, compensate=iter([examples(4, 6)]))
    with pytest.raises(ValueError, match="incompatible"):
        ks.shrink(model, compensate=examples(4, 5))
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
