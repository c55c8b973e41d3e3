"""Pruning holds under everything that `fit`, an optimizer or a distribution strategy may do."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from networks import ZerosAtEveryStep, count_zeros, expected_zeros, kernels, small_convnet, two_devices

import keras_squeeze as ks

TARGET = 0.8


def fit(model, digits, *extra, pruning=None, **options):
    x, y = digits
    options = {"epochs": 2, "batch_size": 64, "verbose": 0, **options}
    pruning = pruning or ks.MagnitudePruning(TARGET)
    return model.fit(x, y, callbacks=[pruning, *extra], **options).history


def assert_on_target(model, history=None, target=TARGET):
    assert count_zeros(model) == expected_zeros(model, target)
    assert all(np.isfinite(kernel).all() for kernel in kernels(model).values())
    assert all(v.constraint is None for v in model.trainable_variables)
    if history:
        assert history["sparsity"][-1] == pytest.approx(target, abs=2e-3)


@pytest.mark.parametrize(
    "compile_options",
    [
        {},
        {"jit_compile": True},
        {"run_eagerly": True},
        {"steps_per_execution": 4},
        {"steps_per_execution": 11, "jit_compile": True},
    ],
    ids=str,
)
def test_compile_options(digits, compile_options):
    model = small_convnet(**compile_options)
    zeros = ZerosAtEveryStep()
    assert_on_target(model, fit(model, digits, zeros))
    assert zeros.at_batch == sorted(zeros.at_batch)
    size = sum(kernel.size for kernel in kernels(model).values())
    np.testing.assert_allclose(zeros.in_logs, np.array(zeros.at_batch) / size)


def test_steps_per_execution_above_frequency(digits):
    model = small_convnet(steps_per_execution=10)
    pruning = ks.MagnitudePruning(ks.schedules.PolynomialDecay(TARGET, frequency=3))
    assert_on_target(model, fit(model, digits, pruning=pruning))


OPTIMIZERS = {
    "sgd with momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True),
    "adam with weight decay": lambda: keras.optimizers.AdamW(weight_decay=0.05),
    "lion": lambda: keras.optimizers.Lion(1e-3),
    "accumulation": lambda: keras.optimizers.Adam(gradient_accumulation_steps=4),
    "average": lambda: keras.optimizers.Adam(use_ema=True, ema_momentum=0.9),
    "average overwrites": lambda: keras.optimizers.Adam(use_ema=True, ema_overwrite_frequency=5),
    "clipping": lambda: keras.optimizers.Adam(global_clipnorm=1.0),
    "loss scaling": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(use_ema=True)),
}
if hasattr(keras.optimizers, "Muon"):
    OPTIMIZERS["muon"] = lambda: keras.optimizers.Muon(1e-3)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers(digits, optimizer):
    model = small_convnet(OPTIMIZERS[optimizer]())
    zeros = ZerosAtEveryStep()
    assert_on_target(model, fit(model, digits, zeros))
    assert zeros.at_batch == sorted(zeros.at_batch)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "bfloat16"])
def test_precision(digits, policy):
    keras.config.set_dtype_policy(policy)
    model = small_convnet()
    assert_on_target(model, fit(model, digits))


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
@pytest.mark.parametrize("use_ema", [False, True])
def test_mirrored_over_two_devices(digits, policy, use_ema):
    keras.config.set_dtype_policy(policy)
    strategy = two_devices()
    with strategy.scope():
        model = small_convnet(keras.optimizers.Adam(use_ema=use_ema))
    assert_on_target(model, fit(model, digits))
    for variable in model.trainable_variables:
        first, second = (copy.numpy() for copy in strategy.experimental_local_results(variable.value))
        np.testing.assert_array_equal(first, second)


def test_mirrored_with_a_gradient_criterion(digits):
    with two_devices().scope():
        model = small_convnet()
    schedule = ks.schedules.PolynomialDecay(TARGET, frequency=20)
    assert_on_target(model, fit(model, digits, pruning=ks.MagnitudePruning(schedule, criterion="snip", data=digits)))


@pytest.mark.parametrize("swap_on_epoch", [False, True])
@pytest.mark.parametrize("pruning_first", [False, True])
def test_averaged_weights_in_evaluation_and_checkpoints_are_pruned(digits, tmp_path, swap_on_epoch, pruning_first):
    x, y = digits
    model = small_convnet(keras.optimizers.Adam(use_ema=True, ema_momentum=0.9))
    seen = []

    class Evaluated(keras.callbacks.Callback):
        def on_test_batch_end(self, batch, logs=None):
            seen.append(count_zeros(self.model))

    pruning = ks.MagnitudePruning(ks.schedules.Constant(TARGET))
    others = [
        keras.callbacks.SwapEMAWeights(swap_on_epoch),
        keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras"),
    ]
    order = [pruning, *others] if pruning_first else [*others, pruning]
    model.fit(x, y, epochs=2, verbose=0, callbacks=[*order, Evaluated()], validation_data=(x[:64], y[:64]))

    assert_on_target(model)
    assert set(seen) == {expected_zeros(model, TARGET)}
    for epoch in (1, 2):
        assert_on_target(keras.models.load_model(tmp_path / f"{epoch}.keras"))


@pytest.mark.parametrize("data_form", ["tf.data", "PyDataset", "generator with steps"])
def test_forms_of_data(digits, data_form):
    x, y = digits
    batches = [(x[i : i + 64], y[i : i + 64]) for i in range(0, len(x), 64)]

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return len(batches)

        def __getitem__(self, index):
            return batches[index]

    def generate():
        while True:
            yield from batches

    model = small_convnet()
    pruning = ks.MagnitudePruning(TARGET)
    data, options = {
        "tf.data": (tf.data.Dataset.from_tensor_slices((x, y)).batch(64), {}),
        "PyDataset": (Batches(), {}),
        "generator with steps": (generate(), {"steps_per_epoch": len(batches)}),
    }[data_form]
    model.fit(data, epochs=2, verbose=0, callbacks=[pruning], shuffle=False, **options)
    assert_on_target(model)


@pytest.mark.filterwarnings("ignore:Your input ran out of data")  # how Keras learns the length
def test_data_of_unknown_length_with_steps_as_ints(digits):
    x, y = digits
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(64).filter(lambda *_: True)
    model = small_convnet()
    schedule = ks.schedules.PolynomialDecay(TARGET, begin=5, end=40)
    model.fit(data, epochs=2, verbose=0, callbacks=[ks.MagnitudePruning(schedule)], shuffle=False)
    assert_on_target(model)


def test_class_weights(digits):
    model = small_convnet()
    assert_on_target(model, fit(model, digits, class_weight={label: 1.0 + label for label in range(10)}))


def test_the_mask_in_force_equals_the_smallest_weights_of_that_step(digits):
    """Oracle: a plain loop with the same data, which zeroes the smallest weights after the same steps by hand."""
    x, y = digits
    steps = 12
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(64).take(steps)
    schedule = ks.schedules.PolynomialDecay(TARGET, begin=0, end=10, frequency=4)
    model = small_convnet("sgd")
    model.fit(
        dataset, epochs=1, verbose=0, callbacks=[ks.MagnitudePruning(schedule, allocation="uniform")], shuffle=False
    )

    plain = small_convnet("sgd")
    pruned_at = {step: schedule(step) for step in (0, 4, 8, 10)}
    masks = {v.path: np.ones(v.shape, bool) for v in plain.trainable_variables if v.name.endswith("kernel")}
    for step, (images, labels) in enumerate(dataset, start=1):
        plain.train_on_batch(images, labels)
        for variable in plain.trainable_variables:
            if variable.path in masks:
                values = np.where(masks[variable.path], variable.numpy(), 0)
                if step in pruned_at:
                    order = np.argsort(-np.abs(values), axis=None, kind="stable")
                    kept = order[: max(round(values.size * (1 - pruned_at[step])), 1)]
                    masks[variable.path] = np.isin(np.arange(values.size), kept).reshape(values.shape)
                variable.assign(np.where(masks[variable.path], values, 0))

    for actual, expected in zip(model.trainable_variables, plain.trainable_variables, strict=True):
        np.testing.assert_array_equal(actual.numpy() == 0, expected.numpy() == 0)
        np.testing.assert_allclose(actual.numpy(), expected.numpy(), rtol=1e-4, atol=1e-6)


def test_nothing_is_pruned_before_begin(digits):
    x, y = digits
    model = small_convnet()
    zeros = ZerosAtEveryStep()
    schedule = ks.schedules.PolynomialDecay(TARGET, initial=0.3, begin=20, end=40)
    model.fit(x, y, epochs=2, batch_size=64, verbose=0, callbacks=[ks.MagnitudePruning(schedule), zeros])
    assert zeros.at_batch[18] == 0
    assert zeros.at_batch[19] == expected_zeros(model, 0.3)


def test_a_second_fit_and_a_new_compile(digits):
    model = small_convnet()
    pruning = ks.MagnitudePruning(0.5)
    assert_on_target(model, fit(model, digits, pruning=pruning), 0.5)
    assert_on_target(model, fit(model, digits, pruning=pruning), 0.5)
    model.compile("sgd", model.loss, metrics=["accuracy"])
    assert_on_target(model, fit(model, digits), TARGET)


def test_the_schedule_of_a_second_fit_begins_anew(digits):
    model = small_convnet()
    schedule = ks.schedules.PolynomialDecay(TARGET, begin=10)
    fit(model, digits)
    zeros = ZerosAtEveryStep()
    fit(model, digits, zeros, pruning=ks.MagnitudePruning(schedule))
    assert max(zeros.in_logs[:9]) == 0
    assert zeros.in_logs[-1] == pytest.approx(TARGET, abs=2e-3)


def test_initial_epoch_goes_on_with_the_schedule(digits):
    model = small_convnet()
    first, second = ZerosAtEveryStep(), ZerosAtEveryStep()
    pruning = ks.MagnitudePruning(ks.schedules.PolynomialDecay(TARGET, end=1.0))
    with pytest.warns(UserWarning, match="before the end of the pruning schedule"):
        fit(model, digits, first, pruning=ks.MagnitudePruning(ks.schedules.PolynomialDecay(TARGET, begin=0, end=87)))
    assert_on_target(model, fit(model, digits, second, pruning=pruning, epochs=3, initial_epoch=2))
    assert second.at_batch[0] >= first.at_batch[-1]
    assert second.at_batch[-1] > first.at_batch[-1]


def test_frozen_layers_stay_as_they_are(digits):
    model = small_convnet()
    model.get_layer("hidden").trainable = False
    model.compile("adam", model.loss)
    before = model.get_layer("hidden").kernel.numpy()
    fit(model, digits, pruning=ks.MagnitudePruning(TARGET, allocation="uniform"))
    np.testing.assert_array_equal(model.get_layer("hidden").kernel.numpy(), before)
    for name in ("conv", "logits"):
        kernel = model.get_layer(name).kernel.numpy()
        assert (kernel == 0).sum() == kernel.size - round(kernel.size * (1 - TARGET))


def test_several_callbacks_on_different_layers(digits):
    x, y = digits
    model = small_convnet()
    callbacks = [
        ks.MagnitudePruning(0.5, layers="conv"),
        ks.MagnitudePruning(0.9, layers=["hidden", "logits"], allocation="uniform"),
    ]
    zeros = ZerosAtEveryStep()
    model.fit(x, y, epochs=2, verbose=0, callbacks=[*callbacks, zeros])
    for name, target in {"conv": 0.5, "hidden": 0.9, "logits": 0.9}.items():
        kernel = model.get_layer(name).kernel.numpy()
        assert (kernel == 0).sum() == kernel.size - round(kernel.size * (1 - target)), name
    size = sum(kernel.size for kernel in kernels(model).values())
    assert zeros.in_logs[-1] == pytest.approx(count_zeros(model) / size)


def test_a_schedule_for_each_layer(digits):
    model = small_convnet()
    schedule = {"conv": 0.25, "hidden": ks.schedules.Cosine(0.9), ".": 0.5}
    fit(model, digits, pruning=ks.MagnitudePruning(schedule))
    for name, target in {"conv": 0.25, "hidden": 0.9, "logits": 0.5}.items():
        kernel = model.get_layer(name).kernel.numpy()
        assert (kernel == 0).sum() == kernel.size - round(kernel.size * (1 - target)), name


def test_two_callbacks_on_the_same_layer_compose(digits):
    x, y = digits
    model = small_convnet()
    callbacks = [ks.MagnitudePruning(0.5), ks.MagnitudePruning(TARGET)]
    history = model.fit(x, y, epochs=2, verbose=0, callbacks=callbacks).history
    assert_on_target(model, history)


def test_a_users_own_constraint_works_and_comes_back(digits):
    class AtMost(keras.constraints.Constraint):
        def __call__(self, w):
            return keras.ops.clip(w, -0.05, 0.05)

    model = small_convnet()
    kernel = model.get_layer("hidden").kernel
    kernel.constraint = AtMost()
    fit(model, digits, pruning=ks.MagnitudePruning(TARGET, allocation="uniform"))
    assert np.abs(kernel.numpy()).max() <= 0.05
    assert (kernel.numpy() == 0).sum() == expected_zeros_of(kernel.numpy())
    assert type(kernel.constraint) is AtMost


def expected_zeros_of(kernel):
    return kernel.size - round(kernel.size * (1 - TARGET))


def test_an_interrupted_fit_leaves_nothing_that_a_new_one_would_trip_over(digits):
    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            raise KeyboardInterrupt

    model = small_convnet()
    with pytest.raises(KeyboardInterrupt):
        fit(model, digits, Stop(), pruning=ks.MagnitudePruning(ks.schedules.Constant(0.95)))
    fit(model, digits, pruning=ks.MagnitudePruning(0.5))
    # Not exactly: a neuron that 95 % sparsity killed gets no gradient, so its weights stay zero unasked.
    assert expected_zeros(model, 0.5) <= count_zeros(model) < expected_zeros(model, 0.6)
    assert all(v.constraint is None for v in model.trainable_variables)


def test_a_plain_fit_after_an_interrupted_one_prunes_nothing(digits):
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 20:
                raise KeyboardInterrupt

    x, y = digits
    model = small_convnet()
    with pytest.raises(KeyboardInterrupt):
        fit(model, digits, Stop())
    before = count_zeros(model)
    history = model.fit(x, y, epochs=2, batch_size=64, verbose=0).history
    assert "sparsity" not in history
    assert count_zeros(model) < before / 2
    assert all(v.constraint is None for v in model.trainable_variables)


@pytest.mark.filterwarnings("ignore:Your input ran out of data")  # how Keras learns the length
def test_a_generator_of_unknown_length(digits):
    x, y = digits

    def generate():
        for start in range(0, len(x), 64):
            yield x[start : start + 64], y[start : start + 64]

    model = small_convnet()
    schedule = ks.schedules.PolynomialDecay(TARGET, begin=5, end=20)
    model.fit(generate(), epochs=1, verbose=0, shuffle=False, callbacks=[ks.MagnitudePruning(schedule)])
    assert_on_target(model)


@pytest.mark.parametrize("wrapped", [False, True])
def test_averaged_weights_in_a_custom_loop(digits, wrapped):
    """The optimizer is not built yet when the masks are attached."""
    x, _ = digits
    model = small_convnet()
    optimizer = keras.optimizers.Adam(use_ema=True, ema_momentum=0.5)
    if wrapped:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    pruning = ks.MagnitudePruning(ks.schedules.Constant(TARGET))
    pruning.attach(model, optimizer, total_steps=4)
    pruning.update(0)
    for step in range(1, 5):
        with tf.GradientTape() as tape:
            loss = keras.ops.mean(keras.ops.square(model(x[:64], training=True)))
            loss = optimizer.scale_loss(loss)
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        pruning.update(step)
    optimizer.finalize_variable_values(model.trainable_variables)
    pruning.detach()
    assert_on_target(model)
    assert pruning.sparsity == pytest.approx(TARGET, abs=2e-3)
    assert pruning.reached


def test_metrics_over_replicas_are_those_of_keras(digits):
    x, y = digits
    histories = []
    for callbacks in ([], [ks.MagnitudePruning(0.0)]):
        with two_devices().scope():
            model = small_convnet("sgd")
        options = {"batch_size": 50, "epochs": 1, "verbose": 0, "shuffle": False}  # the last batch is uneven
        histories.append(model.fit(x, y, callbacks=callbacks, **options).history)
    assert histories[1]["accuracy"] == pytest.approx(histories[0]["accuracy"], abs=1e-6)


def test_a_gan_like_model_with_its_own_train_step(digits):
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.hidden = keras.layers.Dense(16, activation="relu")
            self.head = keras.layers.Dense(10)

        def call(self, inputs):
            return self.head(self.hidden(keras.ops.reshape(inputs, (-1, 64))))

        def train_step(self, data):
            images, labels = data
            with tf.GradientTape() as tape:
                loss = keras.ops.mean(
                    keras.losses.sparse_categorical_crossentropy(labels, self(images, training=True), from_logits=True)
                )
            self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
            return {"my_loss": loss}

    x, _ = digits
    model = Own()
    model(x[:1])
    model.compile("adam")
    history = fit(model, digits)
    assert_on_target(model, history)
    assert "my_loss" in history


@pytest.mark.parametrize("pattern", ["2:4", (4, 4), (1, 8)], ids=str)
def test_patterns_follow_the_schedule(digits, pattern):
    x, y = digits
    model = small_convnet()
    zeros = ZerosAtEveryStep()
    pruning = ks.MagnitudePruning(0.5, layers="hidden", pattern=pattern)
    model.fit(x, y, epochs=2, verbose=0, callbacks=[pruning, zeros])
    kernel = model.get_layer("hidden").kernel.numpy()
    if pattern == "2:4":
        assert ((kernel != 0).reshape(-1, 4, kernel.shape[1]).sum(axis=1) == 2).all()
    else:
        rows, columns = pattern
        blocks = (kernel != 0).reshape(kernel.shape[0] // rows, rows, kernel.shape[1] // columns, columns)
        assert set(np.unique(blocks.sum(axis=(1, 3)))) == {0, rows * columns}
        assert (kernel == 0).mean() == pytest.approx(0.5, abs=rows * columns / kernel.size)
    assert len(set(zeros.at_batch)) > 7


@pytest.mark.parametrize("criterion", ["lamp", "random", "movement", "snip"])
@pytest.mark.parametrize("allocation", ["uniform", "global", "erk"])
def test_criteria_and_allocations(digits, criterion, allocation):
    model = small_convnet()
    schedule = ks.schedules.PolynomialDecay(TARGET, frequency=10)
    pruning = ks.MagnitudePruning(schedule, criterion=criterion, allocation=allocation, data=digits)
    fit(model, digits, pruning=pruning)
    size = sum(kernel.size for kernel in kernels(model).values())
    assert count_zeros(model) == pytest.approx(TARGET * size, abs=2)
