"""Quantization-aware training: the schedule, everything that `fit` may do, resuming, and pruning beside it."""

import pathlib
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from networks import count_zeros, expected_zeros, kernels, small_convnet, two_devices
from resumable_quantization import BATCHES_PER_EPOCH, BITS, DELAY, EPOCHS, RAMP

import keras_squeeze as ks
from keras_squeeze.quantization.fake_quantize import FakeQuantize
from keras_squeeze.quantizers import Affine, LearnedStep

BATCH, STEPS = 32, 10  # of an epoch of `some`
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


@pytest.fixture(scope="module")
def trained(digits):
    """Weights of `small_convnet` after training in float, in the precision that tests begin with."""
    keras.config.set_dtype_policy("float32")
    x, y = digits
    model = small_convnet(jit_compile=False)
    model.fit(x, y, epochs=8, batch_size=BATCH, verbose=0)
    return model.get_weights()


@pytest.fixture
def some(digits):
    x, y = digits
    return x[: BATCH * STEPS], y[: BATCH * STEPS]


def network() -> keras.Model:
    """As few layers as can be, since every trace takes time; the same initial weights every time."""
    keras.utils.set_random_seed(1)
    layers = [
        keras.Input((8, 8, 1)),
        keras.layers.Flatten(name="flatten"),
        keras.layers.Dense(16, activation="relu", name="hidden"),
        keras.layers.BatchNormalization(name="norm"),
        keras.layers.Dense(10, name="logits"),
    ]
    return keras.Sequential(layers)


def compiled(model, optimizer="sgd", *, jit_compile=False, **options):
    """Without XLA, which takes seconds for every trace."""
    model.compile(optimizer, LOSS, metrics=["accuracy"], jit_compile=jit_compile, **options)
    return model


def quantized(weights="int8", activations="default", **options):
    return compiled(ks.quantize_aware(network(), weights, activations), **options)


def wrapper(q, name) -> ks.QuantizeAware:
    return next(w for w in q._flatten_layers() if isinstance(w, ks.QuantizeAware) and w.layer.name == name)


def fit(q, data, *callbacks, **options):
    options = {"epochs": 1, "batch_size": BATCH, "shuffle": False, "verbose": 0, **options}
    return q.fit(*data, callbacks=list(callbacks), **options).history


def quantizers(q) -> list[FakeQuantize]:
    return [layer for layer in q._flatten_layers() if isinstance(layer, FakeQuantize)]


def ranges(q) -> list[np.ndarray]:
    return [layer.range_state.numpy() for layer in quantizers(q) if layer.range_state is not None]


def moving_statistics(q) -> list[np.ndarray]:
    norm = q.get_layer("norm")
    return [norm.moving_mean.numpy(), norm.moving_variance.numpy()]


def moved(before, after) -> list[bool]:
    return [not np.array_equal(*pair) for pair in zip(before, after, strict=True)]


def levels(model) -> dict[str, int]:
    """The most distinct values that an output channel of each kernel has."""
    return {
        path.split("/")[-2]: max(len(np.unique(channel)) for channel in kernel.reshape(-1, kernel.shape[-1]).T)
        for path, kernel in kernels(model).items()
    }


def assert_quantized(q, x) -> keras.Model:
    """Nothing is mixed or frozen any more, everything is finite, and the plain model predicts the same."""
    for layer in quantizers(q):
        assert layer.mix.numpy() == 1
        assert not layer.mixing
        assert not layer.frozen
    assert all(np.isfinite(variable.numpy()).all() for variable in q.variables)
    plain = ks.finalize(q)
    np.testing.assert_allclose(plain(x).numpy(), q(x).numpy(), rtol=1e-5, atol=1e-5)
    return plain


class AtEveryStep(keras.callbacks.Callback):
    """Records what a function says of the model and the logs whenever another callback could see them."""

    def __init__(self, look):
        super().__init__()
        self.look, self.seen = look, []

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(self.look(self.model, logs))


def logged(name="quantized"):
    return AtEveryStep(lambda _, logs: logs[name])


# The workflow


def test_the_workflow_keeps_the_accuracy(digits, trained):
    x, y = digits
    model = small_convnet(jit_compile=False)
    model.set_weights(trained)
    accuracy = model.evaluate(x, y, verbose=0)[1]

    q = ks.quantize_aware(model)
    q.compile("adam", model.loss, metrics=["accuracy"])
    schedule = ks.QuantizationSchedule(delay=0.1, freeze=0.8)
    history = q.fit(x, y, epochs=2, batch_size=BATCH, verbose=0, callbacks=[schedule]).history
    plain = assert_quantized(q, x)

    assert history["quantized"] == [1.0, 1.0]
    assert plain.evaluate(x, y, verbose=0)[1] == pytest.approx(q.evaluate(x, y, verbose=0)[1], abs=1e-3)
    assert plain.evaluate(x, y, verbose=0)[1] > accuracy - 0.02
    assert 15 < max(levels(plain).values()) <= 255
    assert model.evaluate(x, y, verbose=0)[1] == accuracy


def test_without_a_schedule_it_is_quantized_from_the_first_step_on(some):
    q = quantized()
    history = fit(q, some)
    assert "quantized" not in history
    assert max(levels(assert_quantized(q, some[0])).values()) <= 255


# What `fit`, an optimizer or a distribution strategy may do


@pytest.mark.parametrize(
    ("weights", "times", "compile_options"),
    [
        ("int8", (0.1, 0.8), {"jit_compile": False}),
        ("int8", (0.1, 0.8), {"jit_compile": True}),
        ("int8", (0.1, 0.8), {"steps_per_execution": 4}),
        ("int8", (0.1, 0.8), {"run_eagerly": True}),
        ("binary", (0.1, 0.8), {"jit_compile": False}),
        ("binary", (0.0, 1.0), {"jit_compile": True}),
        ("binary", (0.0, 1.0), {"steps_per_execution": 4}),
    ],
    ids=str,
)
def test_compile_options(some, weights, times, compile_options):
    q = quantized(weights, **compile_options)
    history = fit(q, some, ks.QuantizationSchedule(*times), epochs=2)
    assert history["loss"][1] < history["loss"][0]
    assert history["quantized"] == [1.0, 1.0]
    assert_quantized(q, some[0])


def test_with_several_steps_to_an_execution_the_schedule_reacts_after_it(some):
    seen = AtEveryStep(lambda q, logs: (int(q.optimizer.iterations.numpy()), logs["quantized"]))
    fit(quantized(steps_per_execution=4), some, ks.QuantizationSchedule(5, 1.0), seen)
    assert seen.seen == [(4, 0.0), (8, 1.0), (10, 1.0)]


@pytest.mark.parametrize(
    ("policy", "weights"), [("mixed_float16", "int8"), ("mixed_bfloat16", "int8"), ("mixed_float16", "binary")]
)
def test_precision(some, policy, weights):
    keras.config.set_dtype_policy(policy)
    q = quantized(weights)
    history = fit(q, some, ks.QuantizationSchedule(0.1, 0.8), epochs=2)
    assert history["loss"][1] < history["loss"][0]
    assert {state.dtype for state in ranges(q)} == {np.dtype("float32")}
    assert wrapper(q, "hidden").compute_dtype == policy.removeprefix("mixed_")
    assert_quantized(q, some[0])


@pytest.mark.parametrize(("weights", "freeze"), [("int8", 15), (LearnedStep(4), 1.0)], ids=str)
def test_mirrored_over_two_devices(some, weights, freeze):
    strategy = two_devices()
    with strategy.scope():
        q = quantized(weights)
    before = kernels(q)
    history = fit(q, some, ks.QuantizationSchedule(freeze=freeze), epochs=2)
    assert history["loss"][1] < history["loss"][0]
    assert all(moved(before.values(), kernels(q).values()))
    for variable in [*q.trainable_variables, *(v for layer in quantizers(q) for v in layer.variables)]:
        first, second = (copy.numpy() for copy in strategy.experimental_local_results(variable.value))
        np.testing.assert_array_equal(first, second, err_msg=variable.path)
    assert_quantized(q, some[0])


def test_mirrored_ranges_are_the_mean_over_the_replicas(some):
    """Each replica sees one half of the batch, and one batch begins the range of the inputs."""
    x, y = some[0][:BATCH].copy(), some[1][:BATCH]
    x[: BATCH // 2] *= 3
    with two_devices().scope():
        layers = [keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(10)]
        q = compiled(ks.quantize_aware(keras.Sequential(layers)))
    fit(q, (x, y))
    halves = [x[: BATCH // 2].max(), x[BATCH // 2 :].max()]
    np.testing.assert_allclose(quantizers(q)[0].range_state.numpy(), [0, np.mean(halves)], rtol=1e-6)


@pytest.mark.parametrize("weights", ["int8", "binary", LearnedStep(4)], ids=str)
def test_averaged_weights(some, weights):
    q = quantized(weights, optimizer=keras.optimizers.Adam(use_ema=True, ema_momentum=0.9))
    history = fit(q, some, ks.QuantizationSchedule(), epochs=2)
    assert history["loss"][1] < history["loss"][0]
    assert_quantized(q, some[0])


def test_averaged_weights_are_evaluated_as_finalize_has_them(some):
    q = quantized(optimizer=keras.optimizers.Adam(use_ema=True, ema_momentum=0.9))
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
    history = fit(q, some, ks.QuantizationSchedule(0.2, 0.8), swap, validation_data=some)
    plain = assert_quantized(q, some[0])
    assert history["val_loss"][0] == pytest.approx(plain.evaluate(*some, verbose=0)[0], rel=1e-4)


def test_with_gradient_accumulation_steps_are_those_of_the_optimizer(some):
    q = quantized(optimizer=keras.optimizers.Adam(gradient_accumulation_steps=3))
    seen = logged()
    fit(q, some, ks.QuantizationSchedule(2, 1.0), seen)
    assert seen.seen == [0.0] * 5 + [1.0] * 5
    assert_quantized(q, some[0])


def test_a_generator_with_steps_and_fractions(some):
    x, y = some

    def generate():
        while True:
            yield from ((x[i : i + BATCH], y[i : i + BATCH]) for i in range(0, len(x), BATCH))

    q, seen = quantized(), logged()
    options = {"epochs": 2, "steps_per_epoch": STEPS, "verbose": 0, "shuffle": False}
    q.fit(generate(), callbacks=[ks.QuantizationSchedule(0.25, 1.0), seen], **options)
    assert seen.seen == [0.0] * 4 + [1.0] * 16
    assert_quantized(q, x)


@pytest.mark.filterwarnings("ignore:Your input ran out of data")  # how Keras learns the length
def test_data_of_unknown_length_with_steps_as_ints(some):
    data = tf.data.Dataset.from_tensor_slices(some).batch(BATCH).filter(lambda *_: True)
    q, seen = quantized(), logged()
    schedule = ks.QuantizationSchedule(3, 12, [8, 4])
    q.fit(data, epochs=2, verbose=0, shuffle=False, callbacks=[schedule, seen])
    assert seen.seen == [0.0] * 2 + [1.0] * 18
    assert max(levels(assert_quantized(q, some[0])).values()) <= 15


def test_a_second_fit_begins_anew_and_a_plain_one_stays_quantized(some):
    q, schedule = quantized(), ks.QuantizationSchedule(2, 8, [8, 4])
    for _ in range(2):
        quantized_logs, bits = logged(), logged("num_bits")
        fit(q, some, schedule, quantized_logs, bits)
        assert quantized_logs.seen == [0.0] + [1.0] * 9
        assert bits.seen == [8.0] * 4 + [4.0] * 6
    assert "quantized" not in fit(q, some)
    assert max(levels(assert_quantized(q, some[0])).values()) <= 15


def test_a_model_with_its_own_train_step(some):
    class Own(keras.Model):
        def train_step(self, data):
            images, labels = data
            with tf.GradientTape() as tape:
                loss = LOSS(labels, self(images, training=True))
            self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
            return {"my_loss": loss}

    inner = network()
    q = ks.quantize_aware(Own(inputs=inner.inputs[0], outputs=inner.outputs[0]))
    q.compile("adam")
    seen = logged("my_loss")
    history = fit(q, some, ks.QuantizationSchedule(0.2, 0.8), seen, epochs=2)
    assert history["quantized"] == [1.0, 1.0]
    assert np.mean(seen.seen[10:]) < np.mean(seen.seen[:10])
    assert_quantized(q, some[0])


def test_a_nested_model(some):
    inner = network()
    inputs = keras.Input((8, 8, 1))
    model = keras.Model(inputs, keras.layers.Dense(10, name="top")(inner(inputs)))
    q, seen = compiled(ks.quantize_aware(model)), logged("num_bits")
    fit(q, some, ks.QuantizationSchedule(2, 8, {f"{inner.name}/hidden": [8, 4]}), seen)
    assert seen.seen == pytest.approx([8.0] * 4 + [20 / 3] * 6)  # the mean over three kernels
    plain = assert_quantized(q, some[0])
    assert levels(plain)["hidden"] <= 15 < levels(plain)["logits"]


# The schedule


def test_until_delay_training_and_validation_are_those_of_the_float_model(some):
    delay = 14
    histories, losses, weights = [], [], []
    for q in (compiled(network()), quantized("int2")):
        loss, at_delay = logged("loss"), AtEveryStep(lambda model, _: [v.numpy() for v in kernels_and_biases(model)])
        schedules = [ks.QuantizationSchedule(delay, 1.0)] if quantizers(q) else []
        histories.append(fit(q, some, *schedules, loss, at_delay, epochs=2, validation_data=some))
        losses.append(loss.seen)
        weights.append(at_delay.seen[delay - 1])
    np.testing.assert_allclose(losses[1][:delay], losses[0][:delay], rtol=1e-4)
    assert abs(losses[1][-1] - losses[0][-1]) > 1e-3
    for actual, expected in zip(weights[1], weights[0], strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)
    assert histories[1]["val_loss"][0] == pytest.approx(histories[0]["val_loss"][0], rel=1e-4)
    plain = assert_quantized(q, some[0])
    assert histories[1]["val_loss"][1] == pytest.approx(plain.evaluate(*some, verbose=0)[0], rel=1e-4)


def kernels_and_biases(model):
    return [v for v in model.trainable_variables if v.name in ("kernel", "bias", "gamma", "beta")]


def test_ranges_are_measured_before_delay(some):
    q = quantized()
    with pytest.warns(UserWarning, match="before the quantization schedule: the model is quantized to 0%"):
        history = fit(q, some, ks.QuantizationSchedule(50, 1.0))
    assert history["quantized"] == [0.0]
    assert all(layer.initialized.numpy() == 1 for layer in quantizers(q) if layer.initialized is not None)


@pytest.mark.parametrize("ramp", [0, 2 * STEPS])
def test_a_model_in_the_middle_of_the_schedule_cannot_be_finalized(some, ramp):
    q = quantized("int2")
    with pytest.warns(UserWarning, match="before the quantization schedule"):
        fit(q, some, ks.QuantizationSchedule(0 if ramp else 50, 1.0, ramp=ramp))
    with pytest.raises(ValueError, match="still mixed with float"):
        ks.finalize(q)


@pytest.mark.parametrize(("delay", "ramp"), [(4, 10), (0.2, 0.5)], ids=str)
def test_the_ramp_is_linear(some, delay, ramp):
    seen = logged()
    q = quantized()
    history = fit(q, some, ks.QuantizationSchedule(delay, 1.0, ramp=ramp), seen, epochs=2)
    begin, length = (round(t * 2 * STEPS) if isinstance(t, float) else t for t in (delay, ramp))
    expected = [min(max((step - begin) / length, 0), 1) for step in range(1, 2 * STEPS + 1)]
    assert seen.seen == pytest.approx(expected, abs=1e-3)
    assert history["quantized"] == pytest.approx([expected[STEPS - 1], 1], abs=1e-3)
    assert_quantized(q, some[0])


def test_on_the_ramp_the_model_computes_with_the_mix_of_real_and_rounded_weights(some):
    x, y = some[0].reshape(-1, 64), some[1]
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(10, name="only")])
    q = compiled(ks.quantize_aware(model, Affine(2), None))

    def difference(q, logs):
        only = wrapper(q, "only")
        real, bias = only.layer.kernel.numpy(), only.layer.bias.numpy()
        integers, scale, zero_point = only.to_integers()["kernel"]
        rounded = scale * (integers - zero_point)
        used = real + logs["quantized"] * (rounded - real)
        return np.abs(q.predict_on_batch(x) - (x @ used + bias)).max()

    seen = AtEveryStep(difference)
    fit(q, (x, y), ks.QuantizationSchedule(2, 1.0, ramp=5), seen)
    assert max(seen.seen) < 2e-3  # logs round the mix


def test_bits_anneal_at_even_steps(some):
    q = quantized("int8")

    def look(q, logs):
        ((_, hidden),) = wrapper(q, "hidden").quantized_values()
        return logs["num_bits"], max(len(np.unique(channel)) for channel in hidden.T)

    seen = AtEveryStep(look)
    history = fit(q, some, ks.QuantizationSchedule(0.1, 0.85, [8, 4, 2]), seen, epochs=2)
    assert [bits for bits, _ in seen.seen] == [8] * 6 + [4] * 5 + [2] * 9
    assert history["num_bits"] == [4, 2]
    for bits, found in seen.seen[1:]:  # the first is still in float
        fewest, most = {8: (16, 255), 4: (4, 15), 2: (2, 3)}[bits]
        assert fewest <= found <= most
    plain = assert_quantized(q, some[0])
    assert max(levels(plain).values()) <= 3


def test_bits_by_regular_expression(some):
    q, seen = quantized("int8"), logged("num_bits")
    schedule = ks.QuantizationSchedule(0, 10, {"hid": [8, 6, 4, 3], "hidden|logits": [8, 2]})
    fit(q, some, schedule, seen)
    hidden = [8, 8, 6, 6, 4, 4, 4, 3, 3, 3]  # from steps 0, round(2.5) = 2, 5 and round(7.5) = 8 on
    logits = [8, 8, 8, 8, 2, 2, 2, 2, 2, 2]
    found = [seen.seen[step] for step in (0, 3, 4, 9)]
    assert found == pytest.approx([np.mean([hidden[step], logits[step]]) for step in (0, 3, 4, 9)])
    plain = levels(assert_quantized(q, some[0]))
    assert 3 < plain["hidden"] <= 7
    assert plain["logits"] <= 3


@pytest.mark.parametrize("quantizer", [LearnedStep(8), "fixed8"], ids=str)
def test_bits_of_other_grids_anneal(some, quantizer):
    q = quantized(quantizer)
    history = fit(q, some, ks.QuantizationSchedule(0, 0.7, [8, 3]))
    assert history["num_bits"][-1] == 3
    plain = assert_quantized(q, some[0])
    assert max(levels(plain).values()) <= 8


def test_bits_of_binary_layers_stay(some):
    q = quantized({"hidden": "binary", ".": "int8"})
    history = fit(q, some, ks.QuantizationSchedule(0, 0.7, [8, 4]))
    assert history["num_bits"] == [np.mean([1, 4])]
    plain = levels(assert_quantized(q, some[0]))
    assert plain["hidden"] == 2
    assert plain["logits"] <= 15


def test_from_freeze_on_ranges_and_statistics_stay_and_the_rest_trains(some):
    def look(q, logs):
        return (
            ranges(q),
            moving_statistics(q),
            [v.numpy() for v in kernels_and_biases(q)],
            q.get_layer("norm").call.frozen,
        )

    q, seen = quantized(), AtEveryStep(look)
    x = some[0] * np.linspace(1, 4, len(some[0])).reshape(-1, 1, 1, 1).astype("float32")
    fit(q, (x, some[1]), ks.QuantizationSchedule(1, 6), seen)
    (early, at_freeze, end), frozen = (seen.seen[step - 1][:3] for step in (2, 6, 10)), [s[3] for s in seen.seen]
    assert all(moved(early[1], at_freeze[1]))
    assert any(moved(early[0], at_freeze[0]))
    assert not any(moved(at_freeze[0], end[0]))
    assert not any(moved(at_freeze[1], end[1]))
    assert all(moved(at_freeze[2], end[2]))
    assert frozen == [False] * 5 + [True] * 5


def test_while_frozen_training_computes_what_inference_does(some):
    def difference(q, logs):
        states = [v.numpy() for v in q.variables]
        found = np.abs(q(some[0][:64], training=True).numpy() - q(some[0][:64], training=False).numpy()).max()
        changed = any(moved(states, [v.numpy() for v in q.variables]))
        return found, changed

    seen = AtEveryStep(difference)
    fit(quantized(), some, ks.QuantizationSchedule(1, 6), seen)
    assert all(found > 1e-3 and changed for found, changed in seen.seen[:5])
    assert seen.seen[5:] == [(0.0, False)] * 5


def test_after_fit_freezing_is_undone(some):
    q = quantized()
    fit(q, some, ks.QuantizationSchedule(1, 6))
    norm = q.get_layer("norm")
    assert norm.call.__func__ is keras.layers.BatchNormalization.call
    assert_quantized(q, some[0])
    before = ranges(q), moving_statistics(q)
    fit(q, (2 * some[0], some[1]))
    assert all(moved(before[0], ranges(q)))
    assert all(moved(before[1], moving_statistics(q)))


def test_learned_steps_go_on_learning_after_freeze_and_stay_positive(some):
    q, seen = quantized(LearnedStep(4), LearnedStep(8), optimizer="adam"), AtEveryStep(lambda q, _: ranges(q))
    fit(q, some, ks.QuantizationSchedule(0.2, 0.5), seen)
    assert all(moved(seen.seen[5], seen.seen[9]))
    for each in (wrapper(q, "hidden"), wrapper(q, "logits")):
        assert (each.to_integers()["kernel"][1] > 0).all()
    assert_quantized(q, some[0])


def test_with_freeze_1_nothing_freezes(some):
    seen = AtEveryStep(lambda q, _: (moving_statistics(q), [layer.frozen for layer in quantizers(q)]))
    fit(quantized(), some, ks.QuantizationSchedule(freeze=1.0), seen)
    assert all(moved(seen.seen[-2][0], seen.seen[-1][0]))
    assert not any(any(frozen) for _, frozen in seen.seen)


@pytest.mark.parametrize(
    "schedule",
    [
        ks.QuantizationSchedule(0.9, 1.0),
        ks.QuantizationSchedule(0.2, 1.0, ramp=0.8),
        ks.QuantizationSchedule(0, 18, [8, 6, 4]),
    ],
    ids=["delay", "ramp", "bits"],
)
def test_a_run_that_ends_too_early_says_so(some, schedule):
    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.stop_training = True

    q = quantized()
    with pytest.warns(UserWarning, match="Training ended at step 10, before the quantization schedule"):
        fit(q, some, schedule, Stop(), epochs=2)


def test_a_run_that_ends_in_time_says_nothing(some):
    fit(quantized(), some, ks.QuantizationSchedule(0.5, 1.0, [8, 4], ramp=0.5))  # warnings are errors


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"delay": -1}, ValueError),
        ({"delay": 1.5}, ValueError),
        ({"freeze": "end"}, TypeError),
        ({"ramp": True}, TypeError),
        ({"num_bits": 4}, TypeError),
        ({"num_bits": []}, TypeError),
        ({"num_bits": [8, 1]}, ValueError),
        ({"num_bits": [17]}, ValueError),
        ({"num_bits": [8.0]}, ValueError),
        ({"num_bits": [True]}, ValueError),
        ({"num_bits": {"hidden": 4}}, TypeError),
        ({"num_bits": {"(": [4]}}, ValueError),
    ],
    ids=str,
)
def test_wrong_arguments_are_errors_at_once(arguments, error):
    with pytest.raises(error, match="Received"):
        ks.QuantizationSchedule(**arguments)


@pytest.mark.parametrize(
    ("weights", "arguments", "message"),
    [
        ("int8", {"delay": 0.5, "freeze": 0.4}, r"freeze before the model is quantized.*delay=0\.5 \(step 5\)"),
        ("int8", {"delay": 4, "ramp": 4, "freeze": 7}, r"freeze before the model is quantized.*ramp=4"),
        ({".": "binary"}, {"num_bits": [8, 4]}, "no weights whose bits could anneal"),
        ("int8", {"num_bits": {"absent": [8, 4]}}, r"no weights whose bits could anneal|matches"),
    ],
    ids=str,
)
def test_a_schedule_that_does_not_fit_is_an_error_before_the_first_batch(some, weights, arguments, message):
    q = quantized(weights)
    before = [v.numpy() for v in q.variables]
    with pytest.raises(ValueError, match=message):
        fit(q, some, ks.QuantizationSchedule(**arguments))
    assert not any(moved(before, [v.numpy() for v in q.variables]))
    fit(q, some)
    assert_quantized(q, some[0])


def test_a_model_without_quantizers_is_an_error(some):
    with pytest.raises(ValueError, match=r"has no quantizers.*quantize_aware\(model\)"):
        fit(compiled(network()), some, ks.QuantizationSchedule())


@pytest.mark.parametrize("arguments", [{"delay": 0.1}, {"freeze": 0.9}, {"freeze": 1.0, "num_bits": [8, 4]}], ids=str)
def test_fractions_of_data_of_unknown_length_are_an_error(some, arguments):
    data = tf.data.Dataset.from_tensor_slices(some).batch(BATCH).filter(lambda *_: True)
    with pytest.raises(ValueError, match="needs the number of steps"):
        quantized().fit(data, verbose=0, shuffle=False, callbacks=[ks.QuantizationSchedule(**arguments)])


# Beside other callbacks


@pytest.mark.parametrize("schedule_first", [True, False])
def test_after_target_early_stopping_picks_among_quantized_weights(some, schedule_first):
    stop = keras.callbacks.EarlyStopping("num_bits", mode="max", patience=10, restore_best_weights=True)
    q = quantized()
    callbacks = [ks.QuantizationSchedule(0.1, 0.5, [8, 4]), ks.AfterTarget(stop)]
    fit(q, some, *callbacks[:: 1 if schedule_first else -1], epochs=4)
    assert {int(w.num_bits.numpy()) for w in quantizers(q) if w.channels is not None} == {4}
    assert max(levels(assert_quantized(q, some[0])).values()) <= 15


def test_early_stopping_that_may_restore_weights_from_before_is_announced(some):
    stop = keras.callbacks.EarlyStopping("loss", patience=10, restore_best_weights=True)
    with pytest.warns(UserWarning, match=r"EarlyStopping may pick weights .* keras_squeeze\.AfterTarget"):
        fit(quantized(), some, ks.QuantizationSchedule(0.3, 0.8), stop, epochs=2)


def test_weights_restored_from_before_the_target_agree_with_what_is_computed(some, tmp_path):
    """Without `AfterTarget` Keras puts back all variables, those for bits and mixing included."""
    stop = keras.callbacks.EarlyStopping("num_bits", mode="max", patience=10, restore_best_weights=True)
    q = quantized()
    with pytest.warns(UserWarning, match="EarlyStopping may pick weights"):
        fit(q, some, ks.QuantizationSchedule(3, 19, [8, 4]), stop, epochs=2)
    q.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded(some[0]).numpy(), q(some[0]).numpy(), rtol=1e-5, atol=1e-5)


def test_checkpoints_in_the_middle_of_the_schedule_compute_what_the_model_did(some, tmp_path):
    predictions = {}

    class Save(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch in (0, 3, 5, 9):  # float, mixing, annealed, frozen
                self.model.save(tmp_path / f"{batch}.keras")
                predictions[batch] = self.model(some[0][:64]).numpy()

    q = quantized(LearnedStep(8), "int8")
    fit(q, some, ks.QuantizationSchedule(2, 8, [8, 4], ramp=3), Save())
    for batch, expected in predictions.items():
        loaded = keras.models.load_model(tmp_path / f"{batch}.keras")
        np.testing.assert_allclose(loaded(some[0][:64]).numpy(), expected, rtol=1e-5, atol=1e-5, err_msg=str(batch))


def test_an_interrupted_fit_leaves_nothing_frozen_for_the_next(some):
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 7:
                raise KeyboardInterrupt

    q = quantized()
    for callbacks in ([], [ks.QuantizationSchedule(freeze=1.0)]):
        with pytest.raises(KeyboardInterrupt):
            fit(q, some, ks.QuantizationSchedule(freeze=4), Stop())
        before = ranges(q), moving_statistics(q)
        fit(q, (2 * some[0], some[1]), *callbacks)
        assert all(moved(before[0], ranges(q)))
        assert all(moved(before[1], moving_statistics(q)))
        assert_quantized(q, some[0])


# A training loop of one's own


def train_step_of(q, optimizer):
    def train_step(x, y):
        with tf.GradientTape() as tape:
            loss = LOSS(y, q(x, training=True))
        optimizer.apply(tape.gradient(loss, q.trainable_variables), q.trainable_variables)
        return loss

    return train_step


def test_a_custom_loop_ends_where_fit_ends(some):
    def new_schedule():
        return ks.QuantizationSchedule(3, 7, [8, 4])

    expected = quantized()
    fit(expected, some, new_schedule())

    q, optimizer, schedule = quantized(), keras.optimizers.SGD(), new_schedule()
    schedule.attach(q, optimizer, total_steps=STEPS)
    schedule.update(0)
    for step, (x, y) in enumerate(tf.data.Dataset.from_tensor_slices(some).batch(BATCH), start=1):
        train_step_of(q, optimizer)(x, y)
        schedule.update(step)
        assert schedule.reached == (step >= 5)
    schedule.detach()

    for actual, wanted in zip(q.variables, expected.variables, strict=False):
        np.testing.assert_allclose(actual.numpy(), wanted.numpy(), rtol=1e-3, atol=1e-4, err_msg=actual.path)
    assert max(levels(assert_quantized(q, some[0])).values()) <= 15


@pytest.mark.parametrize("graph", [False, True])
def test_a_custom_loop_as_documented_trains_in_float_until_delay(some, graph):
    """`attach`, a training step, `update(1)`, ...: as in the docstring of the callbacks."""
    delay, losses = 4, []
    for q in (network(), quantized("int2")):
        optimizer, schedule = keras.optimizers.SGD(), ks.QuantizationSchedule(delay, 1.0)
        losses.append([])
        if quantizers(q):
            schedule.attach(q, optimizer, total_steps=STEPS)
        train_step = train_step_of(q, optimizer)
        train_step = tf.function(train_step) if graph else train_step
        for step, (x, y) in enumerate(tf.data.Dataset.from_tensor_slices(some).batch(BATCH).take(delay), start=1):
            losses[-1].append(float(train_step(x, y)))
            schedule.update(step)
        schedule.detach()
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


# Saving, loading, resuming


def test_weights_of_an_annealed_model_bring_their_bits(some, tmp_path):
    path = tmp_path / "annealed.weights.h5"
    q = quantized(LearnedStep(8))
    fit(q, some, ks.QuantizationSchedule(0, 0.7, [8, 4]))
    q.save_weights(path)
    fresh = quantized(LearnedStep(8))
    fit(fresh, some[:1] + some[1:], epochs=1, steps_per_epoch=1)  # so that there is an optimizer to load as well
    fresh.load_weights(path)
    assert {w.quantizer.bits for w in quantizers(fresh) if w.channels is not None} == {4}
    assert max(levels(assert_quantized(fresh, some[0])).values()) <= 15
    np.testing.assert_allclose(fresh(some[0]).numpy(), q(some[0]).numpy(), rtol=1e-5, atol=1e-5)


def test_weights_saved_on_the_ramp_bring_their_mix(some, tmp_path):
    path = tmp_path / "mixed.weights.h5"
    q = quantized()
    with pytest.warns(UserWarning, match="quantized to 50%"):
        fit(q, some, ks.QuantizationSchedule(0, 1.0, ramp=2 * STEPS))
    q.save_weights(path)
    fresh = ks.quantize_aware(network())
    fresh.load_weights(path)
    assert {float(layer.mix.numpy()) for layer in quantizers(fresh)} == {0.5}
    assert not any(moved(ranges(q), ranges(fresh)))
    np.testing.assert_allclose(fresh(some[0]).numpy(), q(some[0]).numpy(), rtol=1e-5, atol=1e-5)


SCRIPT = pathlib.Path(__file__).with_name("resumable_quantization.py")


def train(folder, save_freq, kill_after=0):
    folder.mkdir(exist_ok=True)
    command = [sys.executable, str(SCRIPT), str(folder), save_freq, str(kill_after)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def finish(folder, save_freq):
    done = train(folder, save_freq)
    assert done.returncode == 0, done.stderr
    with np.load(folder / "final.npz") as arrays:
        return dict(arrays)


def test_saved_every_epoch_a_killed_run_ends_where_an_uninterrupted_one_ends(tmp_path):
    epochs = 2  # on the ramp, and while bits anneal
    whole = finish(tmp_path / "whole", "epoch")
    assert 0 < whole["quantized"][epochs * BATCHES_PER_EPOCH] < 1
    assert BITS[0] > whole["num_bits"][epochs * BATCHES_PER_EPOCH] > BITS[-1]
    assert train(tmp_path / "killed", "epoch", epochs * BATCHES_PER_EPOCH + 3).returncode == -signal.SIGKILL
    resumed = finish(tmp_path / "killed", "epoch")
    for name in ("quantized", "num_bits"):
        assert len(resumed[name]) == (EPOCHS - epochs) * BATCHES_PER_EPOCH
        np.testing.assert_array_equal(resumed.pop(name), whole[name][epochs * BATCHES_PER_EPOCH :])
    for name, value in resumed.items():
        np.testing.assert_allclose(value, whole[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_saved_every_few_batches_a_killed_run_goes_on_from_there(tmp_path):
    assert train(tmp_path / "killed", "5", BATCHES_PER_EPOCH + 6).returncode == -signal.SIGKILL
    resumed = finish(tmp_path / "killed", "5")
    saved = (BATCHES_PER_EPOCH + 6) // 5 * 5
    assert resumed["quantized"][0] == pytest.approx((saved + 1 - DELAY) / RAMP, abs=1e-3)
    assert resumed["quantized"][-1] == 1
    np.testing.assert_array_equal(resumed["quantized"], np.sort(resumed["quantized"]))
    np.testing.assert_array_equal(resumed["num_bits"], -np.sort(-resumed["num_bits"]))
    assert resumed["num_bits"][-1] == BITS[-1]


# Pruning beside it

GRIDS = ["int8", Affine(4, symmetric=False), LearnedStep(4), "ternary", "fixed8"]
TARGET = 0.7


def assert_zeros(q, x):
    """As many as asked for, and zero on the grid as well."""
    assert count_zeros(q) == expected_zeros(q, TARGET)
    plain = assert_quantized(q, x)
    for real, rounded in zip(kernels(q).values(), kernels(plain).values(), strict=True):
        assert (rounded[real == 0] == 0).all()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_pruned_then_quantized(some, grid):
    model = network()
    ks.prune_weights(model, TARGET)
    q = compiled(ks.quantize_aware(model, grid))
    before = [kernel == 0 for kernel in kernels(model).values()]
    history = fit(q, some, ks.KeepSparsity(), ks.QuantizationSchedule(freeze=1.0))
    assert history["quantized"] == [1.0]
    assert not any(moved(before, [kernel == 0 for kernel in kernels(q).values()]))
    assert_zeros(q, some[0])


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_quantized_then_pruned(some, grid):
    q = quantized(grid)
    history = fit(q, some, ks.MagnitudePruning(TARGET))
    assert history["sparsity"] == pytest.approx([TARGET], abs=2e-3)
    assert_zeros(q, some[0])


@pytest.mark.parametrize(("grid", "pruning_first"), [*((grid, True) for grid in GRIDS), ("int8", False)], ids=str)
def test_pruned_and_quantized_in_one_fit(some, grid, pruning_first):
    q = quantized(grid)
    callbacks = [ks.MagnitudePruning(TARGET), ks.QuantizationSchedule(0.2, 1.0)]
    zeros = AtEveryStep(lambda q, logs: (count_zeros(q), logs["sparsity"], logs["quantized"]))
    fit(q, some, *callbacks[:: 1 if pruning_first else -1], zeros)
    size = sum(kernel.size for kernel in kernels(q).values())
    assert [found / size for found, _, _ in zeros.seen] == pytest.approx([logs for _, logs, _ in zeros.seen])
    assert [quantized for _, _, quantized in zeros.seen] == [0.0] + [1.0] * 9
    assert_zeros(q, some[0])


def test_pruned_while_bits_anneal(some):
    q = quantized()
    fit(q, some, ks.MagnitudePruning(TARGET), ks.QuantizationSchedule(0, 0.8, [8, 4, 2]), epochs=2)
    assert_zeros(q, some[0])
    assert max(levels(ks.finalize(q)).values()) <= 3


@pytest.mark.parametrize("weights", ["binary", {".": "binary_connect"}], ids=str)
def test_binary_weights_refuse_a_pruned_model_and_name_its_layers(weights):
    model = small_convnet()
    ks.prune_weights(model, TARGET, allocation="uniform")
    named = ["hidden"] if weights == "binary" else ["conv", "hidden", "logits"]  # the ends keep 8 bits
    with pytest.raises(ValueError, match=rf"{'.*'.join(f'{name}/kernel' for name in named)}.*ternary"):
        ks.quantize_aware(model, weights)
