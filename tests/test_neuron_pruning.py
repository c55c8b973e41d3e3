"""Neuron pruning while a model trains, and in one shot: what a user types, and what `fit` may do to it."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from networks import residual_convnet, two_devices

import keras_squeeze as ks
from keras_squeeze.neuron_pruning import neuron_criteria
from keras_squeeze.neuron_pruning.neurons import Neurons, Savings

FRACTION = 0.5
PRUNABLE = 16 + 32 + 32  # stem and outer are joined by the sum; the logits are frozen


def fit(model, digits, *extra, pruning=None, **options):
    x, y = digits
    options = {"epochs": 2, "batch_size": 64, "verbose": 0, **options}
    return model.fit(x, y, callbacks=[pruning or ks.NeuronPruning(FRACTION), *extra], **options).history


def dead_filters(model, name) -> np.ndarray:
    kernel = model.get_layer(name).kernel.numpy()
    return ~np.any(kernel.reshape(-1, kernel.shape[-1]) != 0, axis=0)


def assert_half_is_gone(model, digits, history=None):
    dead = {name: dead_filters(model, name) for name in ("stem", "inner", "outer", "hidden")}
    np.testing.assert_array_equal(dead["stem"], dead["outer"])
    assert sum(dead[name].sum() for name in ("stem", "inner", "hidden")) == FRACTION * PRUNABLE
    assert all(mask.sum() % 8 == 0 for mask in dead.values())
    assert all(v.constraint is None for v in model.trainable_variables)
    assert all(np.isfinite(v.numpy()).all() for v in model.weights)
    if history:
        assert history["pruned_neurons"][-1] == pytest.approx(FRACTION)
    assert_shrinks(model, digits[0][:200])


def assert_shrinks(model, images, tolerance=1e-4):
    small = ks.shrink(model)
    assert small.count_params() < model.count_params()
    # Called, not `predict`: over several devices, each has moving statistics of its own.
    expected, actual = (each(images, training=False).numpy().astype("float32") for each in (model, small))
    np.testing.assert_allclose(actual, expected, atol=tolerance * np.abs(expected).max())
    return small


def test_pruned_while_it_trains_then_shrunk_and_trained_on(digits, tmp_path, capsys):
    x, y = digits
    model = residual_convnet()
    model.fit(x[:1400], y[:1400], epochs=6, verbose=0)
    before = model.evaluate(x[1400:], y[1400:], verbose=0)[1]
    history = model.fit(x[:1400], y[:1400], epochs=8, verbose=2, callbacks=[ks.NeuronPruning(FRACTION)]).history
    assert history["pruned_neurons"] == sorted(history["pruned_neurons"])
    assert "40 of 80 neurons are zero (50.0%)" in capsys.readouterr().out
    assert_half_is_gone(model, digits, history)

    small = ks.shrink(model)
    accuracy = small.evaluate(x[1400:], y[1400:], verbose=0)[1]
    assert accuracy == pytest.approx(model.evaluate(x[1400:], y[1400:], verbose=0)[1])
    assert accuracy > before - 0.05

    small.save(tmp_path / "small.keras")
    reloaded = keras.models.load_model(tmp_path / "small.keras")
    assert all(type(layer).__module__.startswith("keras.") for layer in reloaded.layers)
    np.testing.assert_array_equal(reloaded.predict(x, verbose=0), small.predict(x, verbose=0))
    assert [layer.name for layer in small.layers] == [layer.name for layer in model.layers]


def test_training_goes_on_in_the_shrunk_model_as_it_would_in_the_masked_one(digits):
    """Oracle: the masked model, with its masks still held, takes the same steps."""
    x, y = digits
    model = residual_convnet(keras.optimizers.Adam(1e-3))
    layers = ["stem", "inner", "outer"]  # a sigmoid's constant becomes part of a bias, and that trains in another way
    fit(model, digits, pruning=ks.NeuronPruning(FRACTION, layers=layers))
    small = ks.shrink(model)
    assert int(small.optimizer.iterations) == int(model.optimizer.iterations) > 0
    pruning = ks.NeuronPruning(ks.schedules.Constant(FRACTION), layers=layers)
    pruning.attach(model, model.optimizer, total_steps=5)
    pruning.update(0)
    for step in range(5):
        batch = slice(64 * step, 64 * step + 64)
        ours = small.train_on_batch(x[batch], y[batch])
        masked = model.train_on_batch(x[batch], y[batch])
        np.testing.assert_allclose(ours, masked, rtol=1e-3)
    pruning.detach()


@pytest.mark.parametrize(
    "compile_options",
    [{}, {"jit_compile": True}, {"run_eagerly": True}, {"steps_per_execution": 4}],
    ids=str,
)
def test_compile_options(digits, compile_options):
    model = residual_convnet(**compile_options)
    assert_half_is_gone(model, digits, fit(model, digits))


OPTIMIZERS = {
    "sgd with momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
    "adam with weight decay": lambda: keras.optimizers.AdamW(weight_decay=0.05),
    "lion": lambda: keras.optimizers.Lion(1e-3),
    "adafactor": lambda: keras.optimizers.Adafactor(1e-2),
    "accumulation": lambda: keras.optimizers.Adam(gradient_accumulation_steps=4),
    "average": lambda: keras.optimizers.Adam(use_ema=True, ema_momentum=0.9),
    "loss scaling": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(use_ema=True)),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers_and_their_state_after_shrinking(digits, optimizer):
    x, y = digits
    model = residual_convnet(OPTIMIZERS[optimizer]())
    assert_half_is_gone(model, digits, fit(model, digits))
    small = ks.shrink(model)
    loss = small.evaluate(x, y, verbose=0)[0]
    assert small.fit(x, y, epochs=2, verbose=0).history["loss"][-1] < loss + 0.1


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_precision(digits, policy):
    keras.config.set_dtype_policy(policy)
    model = residual_convnet()
    fit(model, digits)
    small = assert_shrinks(model, digits[0][:200], tolerance=2e-2)
    assert small.get_layer("inner").dtype_policy.name == policy


def test_mirrored_over_two_devices(digits):
    with two_devices().scope():
        model = residual_convnet()
        fit(model, digits)
        assert_half_is_gone(model, digits)


def test_both_callbacks_at_once(digits):
    x, y = digits
    model = residual_convnet()
    callbacks = [ks.NeuronPruning(FRACTION), ks.MagnitudePruning(0.8)]
    history = model.fit(x, y, epochs=2, verbose=0, callbacks=callbacks).history
    assert history["pruned_neurons"][-1] == pytest.approx(FRACTION)
    assert history["sparsity"][-1] == pytest.approx(0.8, abs=2e-3)
    assert_half_is_gone(model, digits)


def test_a_second_fit_a_new_compile_and_initial_epoch(digits):
    model = residual_convnet()
    pruning = ks.NeuronPruning(FRACTION)
    fit(model, digits, pruning=pruning)
    dead = dead_filters(model, "inner")
    fit(model, digits, pruning=pruning, epochs=3, initial_epoch=2)
    assert_half_is_gone(model, digits)
    np.testing.assert_array_equal(dead_filters(model, "inner"), dead)
    model.compile("sgd", model.loss)
    fit(model, digits)
    assert_half_is_gone(model, digits)


def test_a_checkpoint_at_any_moment_shrinks(digits, tmp_path):
    """Also of a batch norm without scale, whose mean no constraint reaches."""
    model = residual_convnet()
    checkpoint = keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras")
    fit(model, digits, checkpoint, epochs=3)
    for epoch in (1, 2, 3):
        assert_shrinks(keras.models.load_model(tmp_path / f"{epoch}.keras"), digits[0][:100])


def test_frozen_layers_stay(digits):
    model = residual_convnet()
    model.get_layer("outer").trainable = False
    model.compile("adam", model.loss)
    before = model.get_layer("outer").kernel.numpy()
    fit(model, digits)
    np.testing.assert_array_equal(model.get_layer("outer").kernel.numpy(), before)
    assert not dead_filters(model, "stem").any()
    assert dead_filters(model, "inner").any()


@pytest.mark.parametrize("name", neuron_criteria._CRITERIA)
@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_every_criterion(digits, name, allocation):
    model = residual_convnet()
    options = {"layers": ["stem", "outer"]} if name == "batch_norm_scale" else {}
    if name in ("taylor", "apoz", "mean_activation"):
        options["data"] = (digits[0][:256], digits[1][:256])
    report = ks.prune_neurons(model, FRACTION, criterion=name, allocation=allocation, **options)
    if allocation == "uniform":
        assert report.widths["stem"] == (16, 8)
    assert dead_filters(model, "stem").sum() in (0, 8)
    assert_shrinks(model, digits[0][:100])


@pytest.mark.parametrize(
    ("with_data", "criterion", "allocation"), [(True, "taylor", "global"), (False, "l1", "uniform")]
)
def test_what_auto_is_in_one_shot(digits, with_data, criterion, allocation):
    options = {"data": (digits[0][:256], digits[1][:256])} if with_data else {}
    automatic, named = residual_convnet(), residual_convnet()
    ks.prune_neurons(automatic, 0.4, round_to=1, **options)
    ks.prune_neurons(named, 0.4, round_to=1, criterion=criterion, allocation=allocation, **options)
    for weight, expected in zip(automatic.get_weights(), named.get_weights(), strict=True):
        np.testing.assert_array_equal(weight, expected)


def test_auto_in_fit_lets_the_neurons_of_all_layers_compete(digits):
    widths = {}
    for allocation in ("auto", "global", "uniform"):
        model = residual_convnet()
        pruning = ks.NeuronPruning(FRACTION, round_to=1, allocation=allocation)
        fit(model, digits, pruning=pruning)
        widths[allocation] = [int(dead_filters(model, name).sum()) for name in ("stem", "inner", "outer")]
    assert widths["auto"] == widths["global"] != widths["uniform"]


@pytest.mark.parametrize("name", neuron_criteria._CRITERIA)
def test_a_criterion_survives_json(name):
    criterion = neuron_criteria.get(name)
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(criterion)))
    again = neuron_criteria.get(config)
    assert type(again) is type(criterion)
    assert again.get_config() == criterion.get_config()
    with pytest.raises(TypeError, match="`criterion` must be a name"):
        neuron_criteria.get(keras.saving.serialize_keras_object(keras.losses.MeanSquaredError()))


def test_budgets_are_met_and_the_report_says_what_shrink_saves(digits):
    for kind in ("macs", "params"):
        model = residual_convnet()
        report = ks.prune_neurons(model, **{f"target_{kind}": 0.4})
        small = ks.shrink(model)
        whole, left = ks.summarize(model).total, ks.summarize(small).total
        ratio = left.macs / whole.macs if kind == "macs" else left.parameters / whole.parameters
        assert ratio <= 0.4
        assert f"{left.parameters:,} of {whole.parameters:,} parameters and {left.macs:,} of {whole.macs:,}" in str(
            report
        )
        assert small.get_layer("inner").filters == report.widths["inner"][1]


def test_a_budget_in_fit(digits):
    model = residual_convnet()
    fit(model, digits, pruning=ks.NeuronPruning(target_macs=0.5))
    small = assert_shrinks(model, digits[0][:100])
    assert ks.summarize(small).total.macs <= 0.5 * ks.summarize(model).total.macs


def test_the_first_to_go_are_those_with_the_lowest_score():
    """By hand: three filters of norms 1, 2, 3 and a Dense of norms 10, 20, 30, 40; the means make them comparable."""
    inputs = keras.Input((4, 4, 1))
    convolution = keras.layers.Conv2D(3, 1, use_bias=False, name="conv")
    dense = keras.layers.Dense(4, use_bias=False, name="wide")
    hidden = dense(keras.layers.GlobalMaxPooling2D()(convolution(inputs)))
    model = keras.Model(inputs, keras.layers.Dense(2)(hidden))
    convolution.kernel.assign(np.reshape([1.0, 2.0, 3.0], (1, 1, 1, 3)))
    dense.kernel.assign([[10.0, 20.0, 30.0, 40.0], [0.0] * 4, [0.0] * 4])
    # Relative scores: 0.5, 1, 1.5 and 0.4, 0.8, 1.2, 1.6.
    ks.prune_neurons(model, 3 / 7, round_to=1)
    np.testing.assert_array_equal(dead_filters(model, "conv"), [True, False, False])
    np.testing.assert_array_equal(dead_filters(model, "wide"), [True, True, False, False])


def test_scores_by_hand(digits):
    model = residual_convnet()
    data = (digits[0][:64], digits[1][:64])
    neurons = Neurons(model)
    kernel = model.get_layer("inner").kernel.numpy().reshape(-1, 32)
    (inner,) = (group for group in neurons.groups if group.paths == ("inner",))

    def scores(name, data=None):
        return neuron_criteria.get(name).scores(neurons, data)[inner.neurons]

    np.testing.assert_allclose(scores("l1"), np.abs(kernel).sum(axis=0), rtol=1e-5)
    np.testing.assert_allclose(scores("l2"), np.linalg.norm(kernel, axis=0), rtol=1e-5)
    distances = np.linalg.norm(kernel[:, :, None] - kernel[:, None, :], axis=0)
    np.testing.assert_allclose(scores("geometric_median"), distances.sum(axis=0), rtol=1e-4)

    reader = keras.Model(model.input, model.get_layer("outer").input)
    activations = np.concatenate([reader(data[0][i : i + 32]).numpy() for i in (0, 32)]).reshape(-1, 32)
    np.testing.assert_allclose(scores("apoz", data), (activations != 0).mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(scores("mean_activation", data), np.abs(activations).mean(axis=0), rtol=1e-4)

    weights = [model.get_layer("inner").kernel, model.get_layer("inner").bias, model.get_layer("norm_2").beta]
    expected = np.zeros(32)
    for batch in (slice(0, 32), slice(32, 64)):
        with tf.GradientTape() as tape:
            tape.watch([w.value for w in weights])
            loss = model.compute_loss(None, data[1][batch], model(data[0][batch], training=False))
        gradients = tape.gradient(loss, [w.value for w in weights])
        products = [
            (g.numpy() * w.numpy()).reshape(-1, 32).sum(axis=0) for g, w in zip(gradients, weights, strict=True)
        ]
        expected += np.abs(sum(products)) / 2
    np.testing.assert_allclose(scores("taylor", data), expected, rtol=1e-3, atol=1e-6)


def test_what_is_left_is_counted_as_the_shrunk_model_counts_it():
    model = residual_convnet()
    neurons = Neurons(model)
    pruned = np.zeros(neurons.count, bool)
    for group in neurons.groups:
        pruned[group.neurons[::3]] = True
    for variable, mask in neurons.masks(pruned):
        variable.assign(np.where(mask, variable.numpy(), 0))
    total = ks.summarize(ks.shrink(model)).total
    assert Savings(neurons).left(pruned) == (total.parameters, total.macs)


def test_limits_of_a_layer(digits):
    model = residual_convnet()
    report = ks.prune_neurons(model, 0.99, round_to=1, min_neurons=5)
    assert report.widths["inner"][1] == 5
    model = residual_convnet()
    report = ks.prune_neurons(model, 0.99, round_to=1, max_layer_fraction=0.5)
    assert report.widths["inner"][1] == 16
    model = residual_convnet()
    assert all(left % 8 == 0 for _, left in ks.prune_neurons(model, 0.99).widths.values())


def test_layers_too_narrow_for_the_rounding_are_named():
    def model(*widths):
        dense = [keras.layers.Dense(width, name=f"dense_of_{width}") for width in widths]
        return keras.Sequential([keras.Input((4,)), *dense, keras.layers.Dense(2)])

    report = ks.prune_neurons(model(6, 16), 0.5)
    assert report.widths == {"dense_of_6": (6, 6), "dense_of_16": (16, 8)}
    assert any(path == "dense_of_6" and "too narrow for round_to=8" in reason for path, reason in report.frozen)
    with pytest.raises(ValueError, match="dense_of_6: too narrow for round_to=8"):
        ks.prune_neurons(model(6), 0.5)
    assert ks.prune_neurons(model(6), 0.5, round_to=1).widths == {"dense_of_6": (6, 3)}


def test_the_reasons_of_what_stays(digits):
    report = ks.prune_neurons(residual_convnet(), 0.5)
    assert ("logits", "output of the model") in report.frozen
    report = ks.prune_neurons(residual_convnet(), 0.5, layers="inner")
    assert ("hidden", "not selected") in report.frozen
    assert set(report.widths) == {"inner"}


BAD = {
    "fraction": ({"fraction": 1.0}, ValueError, r"`fraction` must be in \[0, 1\)"),
    "percent": ({"fraction": 50}, ValueError, "for 50 % pass 0.5"),
    "no target": ({}, ValueError, "Give one target"),
    "two targets": ({"fraction": 0.5, "target_macs": 0.5}, ValueError, "Give one target"),
    "budget of zero": ({"target_macs": 0.0}, ValueError, r"in \(0, 1\]. Received: target_macs=0.0"),
    "budget out of reach": ({"target_params": 0.001}, ValueError, r"smallest that is reachable is 0\.\d+"),
    "criterion": ({"fraction": 0.5, "criterion": "magnitude"}, ValueError, "must be one of 'l1'"),
    "no data": ({"fraction": 0.5, "criterion": "taylor"}, ValueError, "needs `data`"),
    "a generator": ({"fraction": 0.5, "criterion": "apoz", "data": iter([])}, TypeError, "read at every update"),
    "allocation": ({"fraction": 0.5, "allocation": "erk"}, ValueError, "must be one of 'auto', 'global', 'uniform'"),
    "round_to": ({"fraction": 0.5, "round_to": 0}, ValueError, "`round_to` must be an int, at least 1"),
    "min_neurons": ({"fraction": 0.5, "min_neurons": 0.5}, ValueError, "`min_neurons` must be an int"),
    "max_layer_fraction": ({"fraction": 0.5, "max_layer_fraction": 0}, ValueError, r"must be in \(0, 1\]"),
    "layers": ({"fraction": 0.5, "layers": "nothing"}, ValueError, "Compressible layers: stem"),
    "no scale": ({"fraction": 0.5, "criterion": "batch_norm_scale"}, ValueError, "None behind: inner, hidden"),
    "only the output": ({"fraction": 0.5, "layers": "logits"}, ValueError, "no neuron that can be pruned"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_changes_nothing(case):
    options, error, message = BAD[case]
    model = residual_convnet()
    before = [v.numpy() for v in model.weights]
    with pytest.raises(error, match=message):
        ks.prune_neurons(model, **options)
    for variable, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)


def test_bad_input_to_the_callback(digits):
    with pytest.raises(ValueError, match="Give one target"):
        ks.NeuronPruning()
    with pytest.raises(ValueError, match="Give one target"):
        ks.NeuronPruning(0.5, target_params=0.5)
    model = residual_convnet()
    with pytest.raises(ValueError, match="Nothing would be pruned"):
        fit(model, digits, pruning=ks.NeuronPruning(ks.schedules.PolynomialDecay(0.5, begin=9999, end=99999)))
    assert all(v.constraint is None for v in model.trainable_variables)


def test_a_subclassed_model_has_no_graph():
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(8)

        def call(self, x):
            return self.dense(x)

    model = Own()
    model(np.zeros((1, 4)))
    for function in (lambda: ks.prune_neurons(model, 0.5), lambda: ks.shrink(model)):
        with pytest.raises(ValueError, match=r"'own' of class Own is subclassed.*functional"):
            function()
    with pytest.raises(ValueError, match="is not built"):
        ks.shrink(keras.Sequential([keras.layers.Dense(3)]))
    with pytest.raises(TypeError, match=r"must be a `keras\.Model`"):
        ks.shrink("model.keras")


def test_weights_that_diverge_are_reported(digits):
    class Diverge(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            kernel = self.model.get_layer("hidden").kernel
            kernel.assign(np.where(kernel.numpy() == 0, 0, np.nan))

    with pytest.warns(UserWarning, match="NaN or infinite scores of the neurons of") as caught:
        fit(residual_convnet(), digits, Diverge())
    assert sum("NaN" in str(warning.message) for warning in caught) == 1
