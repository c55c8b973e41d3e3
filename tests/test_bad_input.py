"""Bad input is refused before anything changes, with what was received and how to mend it."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from networks import small_convnet

import keras_squeeze as ks


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ks.MagnitudePruning(80), ValueError, r"Received: sparsity=80.*pass 0\.8"),
        (lambda: ks.MagnitudePruning(1.0), ValueError, r"\[0, 1\)"),
        (lambda: ks.MagnitudePruning(-0.1), ValueError, r"Received: sparsity=-0\.1"),
        (lambda: ks.MagnitudePruning(float("nan")), ValueError, "Received: sparsity=nan"),
        (lambda: ks.MagnitudePruning("0.5"), TypeError, "Received: '0.5'"),
        (lambda: ks.MagnitudePruning(True), TypeError, "Received: True"),
        (lambda: ks.MagnitudePruning(None), TypeError, "Received: None"),
        (lambda: ks.MagnitudePruning({}), ValueError, "empty dictionary"),
        (lambda: ks.MagnitudePruning({"(": 0.5}), ValueError, r"does not compile.*Received: '\('"),
        (lambda: ks.MagnitudePruning({3: 0.5}), ValueError, "Received: 3"),
        (lambda: ks.MagnitudePruning(0.5, allocation="erdos"), ValueError, "'uniform', 'global', 'erk'"),
        (lambda: ks.MagnitudePruning(0.5, pattern="2/4"), ValueError, "Received: '2/4'"),
        (lambda: ks.MagnitudePruning(0.5, pattern="4:2"), ValueError, "n=4, m=2"),
        (lambda: ks.MagnitudePruning(0.6, pattern="2:4"), ValueError, r"at most 0\.5.*sparsity=0\.6"),
        (lambda: ks.MagnitudePruning(0.5, criterion="size"), ValueError, "'magnitude'.*Received: criterion='size'"),
        (lambda: ks.prune_weights(None, 0.5, criterion="snip"), ValueError, "needs `data`"),
        (lambda: ks.AfterTarget("early"), TypeError, "Received: 'early'"),
    ],
)
def test_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


def untouched_after(model, error, message, fit):
    before = [weight.numpy() for weight in model.weights]
    with pytest.raises(error, match=message):
        fit(model)
    for weight, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(weight.numpy(), value)
    assert all(variable.constraint is None for variable in model.trainable_variables)


@pytest.mark.parametrize(
    ("callback", "error", "message"),
    [
        (lambda m: ks.MagnitudePruning(0.5, layers="nope"), ValueError, "layers='nope'.*conv, hidden, logits"),
        (lambda m: ks.MagnitudePruning(0.5, layers="["), ValueError, "does not compile"),
        (lambda m: ks.MagnitudePruning(0.5, layers=[keras.layers.Dense(1, name="other")]), ValueError, "other"),
        (lambda m: ks.MagnitudePruning(0.5, layers=7), TypeError, "Received: 7"),
        (lambda m: ks.MagnitudePruning({"conv": 0.5, "dens": 0.9}), ValueError, "select no layer: 'dens'"),
        (lambda m: ks.MagnitudePruning(0.5, pattern=(2, 2, 2, 2, 2)), ValueError, "conv/kernel"),
        (
            lambda m: ks.MagnitudePruning(ks.schedules.PolynomialDecay(0.5, begin=1000, end=2000)),
            ValueError,
            "from step 1000 to 2000.*this run has 10 steps",
        ),
        (
            lambda m: ks.MagnitudePruning(ks.schedules.PolynomialDecay(0.5, begin=0, end=2000, frequency=100)),
            ValueError,
            "Nothing would be pruned",
        ),
        (
            lambda m: ks.MagnitudePruning(ks.schedules.PolynomialDecay(0.5, begin=8, end=0.5)),
            ValueError,
            "must not begin after its end",
        ),
        (lambda m: ks.KeepSparsity(), ValueError, "no zeros to keep"),
    ],
)
def test_what_does_not_fit_the_model_or_the_run(digits, callback, error, message):
    x, y = digits
    model = small_convnet()
    model.train_on_batch(x[:32], y[:32])
    untouched_after(
        model, error, message, lambda m: m.fit(x[:320], y[:320], epochs=1, verbose=0, callbacks=[callback(m)])
    )


def test_one_callback_that_does_not_fit_leaves_the_others_without_effect(digits):
    x, y = digits
    callbacks = [ks.MagnitudePruning(ks.schedules.Constant(0.5)), ks.MagnitudePruning(0.5, layers="nope")]
    untouched_after(
        small_convnet(), ValueError, "nope", lambda m: m.fit(x, y, epochs=1, verbose=0, callbacks=callbacks)
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(digits, bad):
    x, y = digits
    model = small_convnet()
    kernel = model.get_layer("hidden").kernel
    values = kernel.numpy()
    values[3, 4] = bad
    kernel.assign(values)
    message = "NaN or infinite values in: hidden/kernel"
    untouched_after(model, ValueError, message, lambda m: ks.prune_weights(m, 0.5))
    untouched_after(model, ValueError, message, lambda m: m.fit(x, y, verbose=0, callbacks=[ks.MagnitudePruning(0.5)]))


@pytest.mark.parametrize("call", [lambda m: ks.prune_weights(m, 0.5), ks.summarize])
def test_an_unbuilt_model(call):
    model = keras.Sequential([keras.layers.Dense(3)])
    with pytest.raises(ValueError, match=r"is not built.*model\.build"):
        call(model)


def test_an_unbuilt_model_in_fit(digits):
    x, y = digits
    model = keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(10)])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="is not built"):
        model.fit(x, keras.utils.to_categorical(y), verbose=0, callbacks=[ks.MagnitudePruning(0.5)])


@pytest.mark.parametrize("call", [lambda m: ks.prune_weights(m, 0.5), ks.summarize])
def test_something_that_is_not_a_model(call):
    with pytest.raises(TypeError, match=r"must be a `keras\.Model`"):
        call("model.keras")


def test_integer_weights():
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8, name="only")])
    model.quantize("int8", filters=["only"])
    with pytest.raises(ValueError, match=r"only/kernel: holds integers of type int8 \(quantized by Keras to int8\)"):
        ks.prune_weights(model, 0.5)


def test_every_layer_frozen(digits):
    x, y = digits
    model = small_convnet()
    model.get_layer("norm").trainable = True
    for name in ("conv", "hidden", "logits"):
        model.get_layer(name).trainable = False
    model.compile("adam", model.loss)
    with pytest.raises(ValueError, match=r"conv/kernel: frozen \(trainable=False\)"):
        model.fit(x, y, verbose=0, callbacks=[ks.MagnitudePruning(0.5)])


def test_a_length_that_is_not_known_with_times_as_fractions(digits):
    x, y = digits
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(64).filter(lambda *_: True)
    untouched_after(
        small_convnet(),
        ValueError,
        "steps_per_epoch",
        lambda m: m.fit(data, verbose=0, callbacks=[ks.MagnitudePruning(0.5)], shuffle=False),
    )


def test_an_empty_data_set(digits):
    x, y = digits
    data = tf.data.Dataset.from_tensor_slices((x[:0], y[:0])).batch(64)
    untouched_after(
        small_convnet(),
        ValueError,
        "data set is empty",
        lambda m: m.fit(data, verbose=0, callbacks=[ks.MagnitudePruning(0.5)], shuffle=False),
    )


def test_a_gradient_criterion_without_loss_or_data(digits):
    x, y = digits
    model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(10)])
    with pytest.raises(ValueError, match=r"not compiled.*model\.compile"):
        ks.prune_weights(model, 0.5, criterion="movement", data=(x, y))
    model.compile("sgd", "sparse_categorical_crossentropy")
    with pytest.raises(ValueError, match="`data` is empty"):
        ks.prune_weights(model, 0.5, criterion="movement", data=(x[:0], y[:0]))


def test_a_custom_loop_with_fractions_and_no_total(digits):
    model = small_convnet()
    with pytest.raises(ValueError, match="total_steps"):
        ks.MagnitudePruning(0.5).attach(model, model.optimizer)


def test_another_backend(monkeypatch):
    model = small_convnet()
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(ValueError, match=r"Received: KERAS_BACKEND='jax'.*KERAS_BACKEND=tensorflow"):
        ks.prune_weights(model, 0.5)


def test_a_layer_that_no_one_taught_us_is_skipped_with_one_warning(digits):
    @keras.saving.register_keras_serializable("test")
    class Custom(keras.layers.Layer):
        def build(self, input_shape):
            self.matrix = self.add_weight(shape=(input_shape[-1], 4))

        def call(self, inputs):
            return inputs @ self.matrix

    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8, name="known"), Custom(name="custom")])
    with pytest.warns(UserWarning, match=r"not pruned.*custom.*register_layer") as caught:
        report = ks.prune_weights(model, 0.5)
    assert len(caught) == 1
    assert any(path == "custom" and "Custom is not in the layer table" in reason for path, reason in report.skipped)
    assert np.count_nonzero(model.get_layer("custom").matrix.numpy()) == 32


@pytest.mark.parametrize("data", [(np.zeros((0, 8, 8, 1)), np.zeros(0)), "generator"], ids=["empty", "generator"])
def test_data_for_gradients_is_tried_before_training(digits, data):
    model = small_convnet()
    before = [v.numpy() for v in model.weights]
    schedule = ks.schedules.PolynomialDecay(0.5, begin=5)
    if data == "generator":
        data = (batch for batch in [digits])
    with pytest.raises((ValueError, TypeError), match="`data` is"):
        model.fit(*digits, verbose=0, callbacks=[ks.MagnitudePruning(schedule, criterion="snip", data=data)])
    for variable, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
    assert all(v.constraint is None for v in model.trainable_variables)


def test_an_initial_sparsity_that_the_pattern_does_not_allow():
    with pytest.raises(ValueError, match="allows a sparsity of at most"):
        ks.MagnitudePruning(ks.schedules.PolynomialDecay(0.5, initial=0.7), pattern="2:4")
