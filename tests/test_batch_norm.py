"""Moving statistics of batch normalization follow a network that changes while it trains, and are measured anew."""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from networks import two_devices

import keras_squeeze as ks
from keras_squeeze.training.moving_statistics import STEPS_NEEDED, WINDOW, Change

layers = keras.layers

FEATURES, BATCH, STEPS, EPOCHS = 3, 8, 20, 2  # steps of an epoch
BEGIN, END = 4, 10  # the optimizer steps of the first and the last mask update
OWN = 0.99  # Keras's default momentum


def drifting(size: int = STEPS * BATCH) -> np.ndarray:
    """Examples whose mean and variance are different in every channel and every batch."""
    noise = np.random.default_rng(0).normal(size=(size, FEATURES)) * np.linspace(1, 5, size)[:, np.newaxis]
    return (noise + [0, 2, -4] + np.linspace(0, 10, size)[:, np.newaxis]).astype("float32")


X, Y = drifting(), np.arange(STEPS * BATCH) % 2


def network(momentum=OWN, **options) -> keras.Model:
    """Normalizes its inputs first, so that NumPy knows every statistic; the same initial weights every time."""
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [
            keras.Input((FEATURES,)),
            layers.BatchNormalization(momentum=momentum, name="norm", **options),
            layers.Dense(8, activation="relu", name="hidden"),
            layers.Dense(2, name="logits", dtype="float32"),
        ]
    )


def compiled(model, optimizer=None, *, jit_compile=False, **options) -> keras.Model:
    """With a learning rate of zero: only masks and statistics change. Without XLA, which takes seconds for a trace."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer or keras.optimizers.SGD(0.0), loss, jit_compile=jit_compile, **options)
    return model


def pruning(begin=BEGIN, end=END, **options) -> ks.MagnitudePruning:
    return ks.MagnitudePruning(ks.schedules.PolynomialDecay(0.5, begin=begin, end=end, frequency=2), **options)


def pruning_at_the_window() -> ks.MagnitudePruning:
    """Changes the network so long that the rate is that of the window at every step of `fit`."""
    return pruning(0, EPOCHS * STEPS - STEPS_NEEDED)


def fit(model, *callbacks, x=X, **options):
    options = {"epochs": EPOCHS, "batch_size": BATCH, "shuffle": False, "verbose": 0, **options}
    return model.fit(x, Y, callbacks=list(callbacks), **options).history


def norms(model) -> list[keras.Layer]:
    return [layer for layer in model._flatten_layers() if isinstance(layer, layers.BatchNormalization)]


def statistics(norm) -> np.ndarray:
    return np.stack([norm.moving_mean.numpy(), norm.moving_variance.numpy()])


def assert_close(actual, expected, rtol=1e-5):
    """Means may be near 0, so an absolute tolerance goes with it: float32's, for the values that they come from."""
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=1e-5)


def assert_released(model):
    assert not any("call" in vars(norm) for norm in norms(model))


class EveryStep(keras.callbacks.Callback):
    """Records the statistics of the layer "norm", and the optimizer's count, after every execution."""

    def __init__(self):
        super().__init__()
        self.statistics, self.counts = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.statistics.append(statistics(self.model.get_layer("norm")))
        self.counts.append(int(self.model.optimizer.iterations))


def rate(step, begin=BEGIN, end=END) -> float:
    """The update rate that a change from `begin` to `end` asks for: 5 steps, then a sixteenth of those since."""
    if step < begin:
        return 0.0
    return 1 / 5 if step <= end + 80 else 16 / (step - end)


def simulate(momentum, rates, batches=None) -> np.ndarray:
    """Statistics after every batch, where each is averaged by the layer's own momentum or by a faster rate."""
    if batches is None:
        batches = np.concatenate([X.reshape(STEPS, BATCH, FEATURES)] * EPOCHS)
    mean, variance, found = np.zeros(FEATURES), np.ones(FEATURES), []
    for batch, at_least in zip(batches, rates, strict=True):
        batch = batch.astype("float64")
        share = max(1 - momentum, at_least)
        mean = mean + share * (batch.mean(axis=0) - mean)
        variance = variance + share * (batch.var(axis=0) - variance)
        found.append([mean, variance])
    return np.array(found)


def test_the_update_rate_of_one_change_is_that_of_its_window_and_then_falls():
    change = Change(begin=5, end=50)
    by_hand = {0: 0, 4: 0, 5: 1 / 5, 49: 1 / 5, 50: 1 / 5, 51: 1 / 5, 130: 1 / 5, 131: 16 / 81, 146: 1 / 6}
    by_hand |= {290: 1 / 15, 370: 1 / 20, 1650: 1 / 100, 8050: 1 / 500}
    assert WINDOW == 5
    assert {step: float(change.update_rate(step)) for step in by_hand} == pytest.approx(by_hand)


def test_a_change_at_one_step_has_its_window_from_there_on():
    by_hand = {6: 0, 7: 1 / 5, 87: 1 / 5, 88: 16 / 81}
    assert {step: float(Change(7, 7).update_rate(step)) for step in by_hand} == pytest.approx(by_hand)


def test_after_the_steps_needed_an_eighth_or_less_is_left_of_what_was_before():
    left = np.prod([1 - float(Change(0, 100).update_rate(100 + step)) for step in range(STEPS_NEEDED)])
    assert left < 1 / 8
    assert left / (1 - 1 / 5) ** 2 > 1 / 8


@pytest.mark.parametrize("momentum", [0.99, 0.93, 0.8, 0.5, 0.0])
def test_statistics_of_every_step_equal_a_simulation(momentum):
    """0.93 is slower than the window throughout; 0.8 and below are fast enough."""
    model, seen = compiled(network(momentum)), EveryStep()
    history = fit(model, pruning(), seen)
    assert history["sparsity"][-1] == pytest.approx(0.5, abs=0.02)
    expected = simulate(momentum, [rate(step) for step in range(EPOCHS * STEPS)])
    assert_close(seen.statistics, expected)
    plain = simulate(momentum, [0] * EPOCHS * STEPS)
    assert np.allclose(expected, plain) == (momentum <= 0.8)


def test_after_a_large_change_statistics_begin_anew():
    """Updates at steps 4, 13 and 22, none before: the mean of the batches since the last one, at most of five."""
    model, seen = compiled(network()), EveryStep()
    schedule = ks.schedules.PolynomialDecay(0.5, initial=0.1, begin=4, end=22, frequency=9)
    fit(model, ks.MagnitudePruning(schedule), seen)
    last = {step: max(update for update in (4, 13, 22) if update <= step) for step in range(4, EPOCHS * STEPS)}
    rates = [0.0] * 4 + [1 / min(step - update + 1, 5) for step, update in last.items()]
    assert_close(seen.statistics, simulate(OWN, rates))
    batches = np.concatenate([X.reshape(STEPS, BATCH, FEATURES)] * EPOCHS)
    assert_close(seen.statistics[17][0], batches[13:18].mean(axis=(0, 1)))
    assert_released(model)


def test_statistics_of_a_layer_behind_pruned_weights_equal_a_simulation():
    keras.utils.set_random_seed(1)
    first, norm = layers.Dense(4, name="first"), layers.BatchNormalization(name="norm")
    model = keras.Sequential([keras.Input((FEATURES,)), first, norm, layers.Dense(2)])
    seen, weights = EveryStep(), []

    class Weights(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            weights.append(first.kernel.numpy())

    fit(compiled(model), pruning(layers="first"), seen, Weights())
    assert np.count_nonzero(weights[BEGIN]) > np.count_nonzero(weights[END])
    batches = np.concatenate([X.reshape(STEPS, BATCH, FEATURES)] * EPOCHS)
    mean, variance = np.zeros(4), np.ones(4)
    for step, (batch, kernel) in enumerate(zip(batches, weights, strict=True)):
        outputs, share = batch.astype("float64") @ kernel, max(1 - OWN, rate(step))
        mean += share * (outputs.mean(axis=0) - mean)
        variance += share * (outputs.var(axis=0) - variance)
        assert_close(seen.statistics[step], [mean, variance], rtol=1e-4)


def test_the_momentum_that_users_and_files_see_is_the_layers_own(tmp_path):
    model, plain = compiled(network()), network()
    seen = []

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            norm = self.model.get_layer("norm")
            seen.append((norm.momentum, norm.get_config()))

    fit(model, pruning(), Look(), keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras"))
    own = plain.get_layer("norm").get_config()
    assert own["momentum"] == OWN
    assert seen == [(OWN, own)] * EPOCHS * STEPS
    assert model.get_layer("norm").get_config() == own
    assert_released(model)
    for epoch in range(1, EPOCHS + 1):
        saved = keras.models.load_model(tmp_path / f"{epoch}.keras").get_layer("norm")
        assert saved.get_config() == own
        expected = simulate(OWN, [rate(step) for step in range(EPOCHS * STEPS)])[epoch * STEPS - 1]
        assert_close(statistics(saved), expected)
        assert "call" not in vars(saved)


def test_a_plain_fit_afterwards_has_the_layers_own_momentum():
    model = compiled(network())
    fit(model, pruning())
    before = statistics(model.get_layer("norm"))
    fit(model, epochs=1, x=np.zeros_like(X))
    assert_close(statistics(model.get_layer("norm")), before * OWN**STEPS)


def test_a_second_fit_counts_its_steps_from_its_own_start():
    model, seen = compiled(network()), EveryStep()
    fit(model)
    model.get_layer("norm").moving_mean.assign(np.zeros(FEATURES))
    model.get_layer("norm").moving_variance.assign(np.ones(FEATURES))
    fit(model, pruning(), seen)
    assert seen.counts[0] == EPOCHS * STEPS + 1
    assert_close(seen.statistics, simulate(OWN, [rate(s) for s in range(EPOCHS * STEPS)]))


@pytest.mark.parametrize(
    ("options", "per_execution", "per_step"),
    [
        ({"jit_compile": True}, 1, 1),
        ({"run_eagerly": True}, 1, 1),
        ({"steps_per_execution": 4}, 4, 1),
        ({"optimizer": lambda: keras.optimizers.SGD(0.0, gradient_accumulation_steps=2)}, 1, 2),
        ({"optimizer": lambda: keras.optimizers.SGD(0.0, use_ema=True)}, 1, 1),
        ({"optimizer": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.0))}, 1, 1),
    ],
    ids=["XLA", "eager", "steps per execution", "accumulation", "averaged weights", "loss scale"],
)
def test_statistics_under_the_conditions_of_compile(options, per_execution, per_step):
    options = dict(options)
    optimizer = options.pop("optimizer", lambda: None)()
    model, seen = compiled(network(), optimizer, **options), EveryStep()
    begin, end = 2, 6  # so that the rate falls in a run of half as many optimizer steps
    fit(model, pruning(begin, end), seen)
    expected = simulate(OWN, [rate(step // per_step, begin, end) for step in range(EPOCHS * STEPS)])
    assert_close(seen.statistics, expected[per_execution - 1 :: per_execution])
    assert_released(model)


def test_mixed_precision():
    keras.config.set_dtype_policy("mixed_float16")
    model, seen = compiled(network()), EveryStep()
    assert model.compute_dtype == "float16"
    fit(model, pruning(), seen)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    batches = np.concatenate([X.astype("float16").reshape(STEPS, BATCH, FEATURES)] * EPOCHS)
    expected = simulate(OWN, [rate(step) for step in range(EPOCHS * STEPS)], batches)
    assert_close(seen.statistics, expected, rtol=1e-4)


def test_steps_that_the_loss_scale_skips_do_not_count():
    keras.config.set_dtype_policy("mixed_float16")
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.0), initial_scale=2.0**40)
    model, seen = compiled(network(), optimizer), EveryStep()
    with pytest.warns(UserWarning, match="steps before the end"):
        fit(model, pruning(0, END), seen)
    before = [0, *seen.counts[:-1]]
    assert before[5] == 0
    assert before[-1] > END
    batches = np.concatenate([X.astype("float16").reshape(STEPS, BATCH, FEATURES)] * EPOCHS)
    expected = simulate(OWN, [rate(step, 0, END) for step in before], batches)
    assert_close(seen.statistics, expected, rtol=1e-4)


def test_statistics_of_a_float64_layer():
    model, seen = compiled(network(dtype="float64")), EveryStep()
    assert model.get_layer("norm").moving_mean.dtype == "float64"
    fit(model, pruning(), seen)
    expected = simulate(OWN, [rate(step) for step in range(EPOCHS * STEPS)])
    assert_close(seen.statistics, expected)


@pytest.mark.parametrize("synchronized", [False, True])
def test_mirrored_over_two_devices(synchronized):
    """A layer of momentum 0.8 in a plain fit averages as the window does. Only synchronized replicas are equal."""
    found = {}
    for momentum, callbacks in {OWN: [pruning_at_the_window()], 0.8: []}.items():
        strategy = two_devices()
        with strategy.scope():
            model = compiled(network(momentum, synchronized=synchronized))
        fit(model, *callbacks)
        norm = model.get_layer("norm")
        variables = (norm.moving_mean.value, norm.moving_variance.value)
        copies = [strategy.experimental_local_results(variable) for variable in variables]
        found[momentum] = np.array([[copy.numpy() for copy in each] for each in copies])
        assert (found[momentum][:, 0] == found[momentum][:, 1]).all() == synchronized
        assert_released(model)
    assert_close(found[OWN], found[0.8])


def nested(momentum):
    inner = keras.Sequential([keras.Input((FEATURES,)), layers.BatchNormalization(momentum=momentum, name="norm")])
    inputs = keras.Input((FEATURES,))
    return keras.Model(inputs, layers.Dense(2)(inner(inputs)))


def shared(momentum):
    inputs = keras.Input((FEATURES,))
    norm = layers.BatchNormalization(momentum=momentum, name="norm")
    return keras.Model(inputs, layers.Dense(2)(norm(inputs) + norm(3 * inputs + 1)))


def time_distributed(momentum):
    inputs = keras.Input((FEATURES,))
    norm = layers.TimeDistributed(layers.BatchNormalization(momentum=momentum, name="norm"))
    return keras.Model(inputs, layers.Dense(2)(norm(keras.ops.expand_dims(inputs, 2))[:, :, 0]))


def quantized(momentum):
    return ks.quantize_aware(network(momentum))


class Subclassed(keras.Model):
    def __init__(self, momentum):
        super().__init__()
        self.norm, self.head = layers.BatchNormalization(momentum=momentum), layers.Dense(2)
        self(X[:2])

    def call(self, inputs, training=None):
        return self.head(self.norm(inputs, training=training))


@pytest.mark.parametrize("build", [nested, shared, time_distributed, quantized, Subclassed])
def test_wherever_the_layer_is_the_statistics_are_those_of_a_plain_fit_with_the_windows_momentum(build):
    found = {}
    for momentum, callbacks in {OWN: [pruning_at_the_window()], 0.8: []}.items():
        keras.utils.set_random_seed(2)
        model = compiled(build(momentum))
        fit(model, *callbacks)
        (norm,) = norms(model)
        found[momentum] = statistics(norm)
        assert_released(model)
    assert_close(found[OWN], found[0.8])


class InInferenceMode(keras.Model):
    """With one layer that training calls with `training=False`, one that is frozen, and one that is neither."""

    def __init__(self):
        super().__init__()
        self.inference = layers.BatchNormalization(name="inference")
        self.frozen = layers.BatchNormalization(name="frozen", trainable=False)
        self.norm, self.head = layers.BatchNormalization(name="norm"), layers.Dense(2)
        self(X[:2])

    def call(self, inputs, training=None):
        x = self.frozen(self.inference(inputs, training=False), training=training)
        return self.head(self.norm(x, training=training))


def test_layers_in_inference_mode_and_frozen_ones_keep_their_statistics():
    model = compiled(InInferenceMode())
    before = {norm.name: statistics(norm) for norm in norms(model)}
    fit(model, pruning())
    changed = {norm.name for norm in norms(model) if (statistics(norm) != before[norm.name]).any()}
    assert changed == {"norm"}
    assert_released(model)


def test_training_false_in_a_functional_model_is_what_keras_takes_it_for():
    """Keras 3.15 passes the `training` of `fit` on to such a layer all the same."""
    changed = []
    for callbacks in ([], [pruning()]):
        inputs = keras.Input((FEATURES,))
        norm = layers.BatchNormalization()
        model = compiled(keras.Model(inputs, layers.Dense(2)(norm(inputs, training=False))))
        fit(model, *callbacks)
        changed.append((statistics(norm) != [np.zeros(FEATURES), np.ones(FEATURES)]).any())
    assert changed[0] == changed[1]


@pytest.mark.parametrize("traced", [False, True])
def test_a_training_loop_of_ones_own(traced):
    model, optimizer, callback = network(), keras.optimizers.SGD(0.0), pruning()
    norm, batches = model.get_layer("norm"), X.reshape(STEPS, BATCH, FEATURES)
    variables = model.trainable_variables

    def step(batch):
        with tf.GradientTape() as tape:
            loss = keras.ops.mean(model(batch, training=True) ** 2)
        optimizer.apply(tape.gradient(loss, variables), variables)

    for batch in batches[:7]:  # the optimizer's count does not begin at 0
        step(batch)
    norm.moving_mean.assign(np.zeros(FEATURES))
    norm.moving_variance.assign(np.ones(FEATURES))
    seen = []
    callback.attach(model, optimizer, total_steps=EPOCHS * STEPS)
    train = tf.function(step) if traced else step
    callback.update(0)
    for index, batch in enumerate(np.concatenate([batches] * EPOCHS), start=1):
        train(tf.constant(batch))
        callback.update(index)
        seen.append(statistics(norm))
    callback.detach()
    assert_close(seen, simulate(OWN, [rate(s) for s in range(EPOCHS * STEPS)]))
    assert_released(model)
    step(np.zeros_like(batch))
    assert_close(statistics(norm), OWN * seen[-1])


@pytest.mark.parametrize("order", [1, -1])
def test_of_two_callbacks_the_faster_rate_holds(order):
    model, seen = compiled(network(0.95)), EveryStep()
    schedule = ks.schedules.PolynomialDecay(0.5, begin=12, end=16, frequency=2)
    neurons = ks.NeuronPruning(schedule, criterion="l2", round_to=1)
    fit(model, *[pruning(2, 3), neurons][::order], seen, epochs=3)
    rates = [max(rate(step, 2, 3), rate(step, 12, 16)) for step in range(3 * STEPS)]
    batches = np.concatenate([X.reshape(STEPS, BATCH, FEATURES)] * 3)
    assert_close(seen.statistics, simulate(0.95, rates, batches))
    assert_released(model)


@pytest.mark.parametrize("order", [1, -1])
def test_a_freeze_stops_the_statistics_whatever_follows_them(order):
    plain, q, seen = network(), compiled(ks.quantize_aware(network(), activations=None)), EveryStep()
    freeze = 17
    fit(q, *[pruning(), ks.QuantizationSchedule(delay=2, freeze=freeze)][::order], seen)
    rates = [max(rate(step, BEGIN, END), rate(step, 2, 2)) for step in range(freeze)]
    batches = np.concatenate([X.reshape(STEPS, BATCH, FEATURES)] * EPOCHS)[:freeze]
    assert_close(seen.statistics[:freeze], simulate(OWN, rates, batches))
    for later in seen.statistics[freeze:]:
        np.testing.assert_array_equal(later, seen.statistics[freeze - 1])
    assert q.get_layer("norm").get_config() == plain.get_layer("norm").get_config()
    assert_released(q)
    fit(q, epochs=1, x=np.zeros_like(X))
    assert_close(statistics(q.get_layer("norm")), OWN**STEPS * seen.statistics[-1])


class Interrupt(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == 12:
            raise KeyboardInterrupt


@pytest.mark.parametrize("how", ["fit", "train_on_batch", "fit with pruning"])
def test_after_an_interrupted_fit_the_momentum_is_the_layers_own(how):
    model, twin = compiled(network()), compiled(network())
    with pytest.raises(KeyboardInterrupt):
        fit(model, pruning(), Interrupt())
    twin.set_weights(model.get_weights())
    for each in (model, twin):
        if how == "train_on_batch":
            for start in range(0, len(X), BATCH):
                each.train_on_batch(X[start : start + BATCH], Y[start : start + BATCH])
        else:
            fit(each, *[pruning()] * (how == "fit with pruning"))
    assert_close(statistics(model.get_layer("norm")), statistics(twin.get_layer("norm")))
    assert_released(model)


class Own(layers.BatchNormalization):
    """Takes its own decisions, so this package does not take them."""

    def call(self, inputs, training=None, mask=None):
        return super().call(inputs, training=training, mask=mask)


class RunningMean(layers.Layer):
    def build(self, shape):
        self.moving_mean = self.add_weight(shape=shape[1:], trainable=False, name="moving_mean")

    def call(self, inputs, training=None):
        if training:
            self.moving_mean.assign(0.99 * self.moving_mean + 0.01 * keras.ops.mean(inputs, axis=0))
        return inputs - self.moving_mean


def model_with_others() -> keras.Model:
    others = [Own(name="own"), RunningMean(name="running"), layers.BatchNormalization(momentum=1.0, name="never")]
    inner = keras.Sequential([keras.Input((FEATURES,)), *others], name="inner")
    inputs = keras.Input((FEATURES,))
    norm = layers.BatchNormalization(name="norm")
    return keras.Model(inputs, layers.Dense(2)(norm(inputs) + inner(inputs)))


def test_layers_with_statistics_of_another_kind_are_left_alone_and_named_in_one_warning():
    model, seen = compiled(model_with_others()), EveryStep()
    with pytest.warns(UserWarning, match="not follow") as caught:
        fit(model, pruning_at_the_window(), pruning_at_the_window(), seen)
    (message,) = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    assert "inner/never: momentum=1 never updates them" in message
    assert "inner/own: Own has a `call` of its own" in message
    assert "inner/running: RunningMean keeps moving_mean in its own way" in message
    assert message.count(";") == 2
    assert_close(seen.statistics, simulate(OWN, [0.2] * EPOCHS * STEPS))

    own, running, never = model.get_layer("inner").layers
    assert_close(statistics(own), simulate(OWN, [0] * EPOCHS * STEPS)[-1])
    np.testing.assert_array_equal(statistics(never), [np.zeros(FEATURES), np.ones(FEATURES)])
    assert running.moving_mean.numpy().any()
    assert_released(model)


def test_batch_renormalization_keeps_its_own_momentum():
    if "renorm" not in layers.BatchNormalization().get_config():
        pytest.skip("this Keras has no batch renormalization")
    found = []
    for callbacks in ([pruning_at_the_window()], []):
        model = compiled(network(renorm=True))
        with pytest.warns(UserWarning, match=r"norm: it uses renorm") if callbacks else contextlib.nullcontext():
            fit(model, *callbacks)
        found.append([v.numpy() for v in model.get_layer("norm").non_trainable_variables])
    for actual, expected in zip(*found, strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_a_run_that_broke_off_and_was_resumed_has_the_statistics_of_an_uninterrupted_one(tmp_path):
    class Break(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.epoch = epoch

        def on_train_batch_end(self, batch, logs=None):
            if (self.epoch, batch) == (2, 4):
                raise RuntimeError("broken")

    def run(folder, *callbacks):
        keras.utils.set_random_seed(1)
        norm = layers.BatchNormalization(name="norm")
        parts = [layers.Dense(8, name="hidden"), norm, layers.ReLU(), layers.Dense(2, name="logits")]
        model = compiled(keras.Sequential([keras.Input((FEATURES,)), *parts]), "adam")
        backup, seen = keras.callbacks.BackupAndRestore(tmp_path / folder), EveryStep()
        fit(model, pruning(5, 2 * STEPS + 8), backup, seen, *callbacks, epochs=4)  # it ends in the third epoch
        return seen.statistics

    whole = run("whole")
    with pytest.raises(RuntimeError, match="broken"):
        run("broken", Break())
    resumed = run("broken")
    assert len(resumed) == 2 * STEPS
    np.testing.assert_allclose(resumed, whole[2 * STEPS :], rtol=1e-4, atol=1e-5)


def measured(x, axes=(0,)) -> np.ndarray:
    x = x.astype("float64")
    return np.stack([x.mean(axis=axes), x.var(axis=axes)])


def assert_measured(norm, x, axes=(0,)):
    np.testing.assert_allclose(statistics(norm), measured(x, axes), rtol=1e-5)


def one_layer(shape=(FEATURES,), **options) -> keras.Model:
    return keras.Sequential([keras.Input(shape), layers.BatchNormalization(name="norm", **options)])


MANY = drifting(300) + 20  # three batches of 128, the last one shorter; no mean near 0
TARGETS = np.arange(300) % 2


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        part = slice(100 * index, 100 * index + 100)
        return MANY[part], TARGETS[part]


def generated():
    while True:
        yield MANY[:250]


FORMS = {
    "array": lambda: MANY,
    "tensor": lambda: tf.constant(MANY),
    "targets": lambda: (MANY, TARGETS),
    "targets in a list": lambda: [MANY, TARGETS],
    "sample weights": lambda: (MANY, TARGETS, np.zeros(300)),
    "dataset": lambda: tf.data.Dataset.from_tensor_slices(MANY).batch(70),
    "dataset with targets": lambda: tf.data.Dataset.from_tensor_slices((MANY, TARGETS)).batch(300),
    "PyDataset": Batches,
    "list of batches": lambda: iter([(MANY[:1], TARGETS[:1]), (MANY[1:], TARGETS[1:])]),
    "endless dataset": lambda: tf.data.Dataset.from_tensor_slices((MANY, TARGETS)).repeat().batch(90),
    "endless generator": generated,
}


@pytest.mark.parametrize("max_examples", [300, 200, 128, 1], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_measured_statistics_are_those_of_all_examples_in_any_form(form, max_examples):
    if form == "endless generator" and max_examples == 300:
        expected = np.concatenate([MANY[:250], MANY[:50]])
    else:
        expected = MANY[:max_examples]
    model = one_layer()
    ks.recalibrate_batch_norm(model, FORMS[form](), max_examples=max_examples)
    assert_measured(model.get_layer("norm"), expected)


def test_without_a_limit_all_examples_are_used_and_by_default_1024():
    x, model = drifting(1500) + 20, one_layer()
    ks.recalibrate_batch_norm(model, x, max_examples=None)
    assert_measured(model.get_layer("norm"), x)
    ks.recalibrate_batch_norm(model, x)
    assert_measured(model.get_layer("norm"), x[:1024])


SEVERAL = ["dict", "dict and targets", "list", "list and targets", "tuple and targets", "dataset"]


@pytest.mark.parametrize("form", SEVERAL)
def test_several_inputs(form):
    a, b = MANY, MANY[:, :2] ** 2
    inputs = {"a": keras.Input((FEATURES,), name="a"), "b": keras.Input((2,), name="b")}
    norm_a, norm_b = layers.BatchNormalization(name="norm_a"), layers.BatchNormalization(name="norm_b")
    outputs = layers.Concatenate()([norm_a(inputs["a"]), norm_b(inputs["b"])])
    model = keras.Model(inputs if form.startswith(("dict", "dataset")) else list(inputs.values()), outputs)
    data = {
        "dict": {"a": a, "b": b},
        "dict and targets": ({"a": a, "b": b}, TARGETS),
        "list": [a, b],
        "list and targets": ([a, b], TARGETS),
        "tuple and targets": ((a, b), TARGETS),
        "dataset": tf.data.Dataset.from_tensor_slices({"a": a, "b": b}).batch(64),
    }[form]
    assert set(ks.recalibrate_batch_norm(model, data, max_examples=290)) == {"norm_a", "norm_b"}
    assert_measured(norm_a, a[:290])
    assert_measured(norm_b, b[:290])


@pytest.mark.parametrize("form", ["array", "list", "list of one"])
def test_a_subclassed_model_takes_the_same_forms(form):
    class Sum(keras.Model):
        def __init__(self):
            super().__init__()
            self.norm = layers.BatchNormalization(name="norm")

        def call(self, inputs, training=None):
            return self.norm(sum(inputs) if form == "list" else inputs, training=training)

    model, data = Sum(), {"array": MANY, "list": [MANY, 2 * MANY], "list of one": [MANY]}[form]
    model([MANY[:2], MANY[:2]] if form == "list" else MANY[:2])
    ks.recalibrate_batch_norm(model, data)
    assert_measured(model.norm, 3 * MANY if form == "list" else MANY)


@pytest.mark.parametrize(("shape", "axis"), [((5, 3), -1), ((5, 3), 1), ((4, 5, 3), 2), ((4, 5, 3), -3)], ids=str)
def test_statistics_are_over_all_axes_but_the_layers(shape, axis):
    x = np.random.default_rng(0).normal(3, 2, (300, *shape)) + np.arange(shape[-1])
    model = one_layer(shape, axis=axis)
    ks.recalibrate_batch_norm(model, x.astype("float32"))
    rank = len(shape) + 1
    assert_measured(model.get_layer("norm"), x, tuple(each for each in range(rank) if each != axis % rank))


def test_padding_is_left_out():
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, (300, 6, 2)).astype("float32")
    lengths = rng.integers(0, 7, 300)  # some have no position that counts
    present = np.arange(6) < lengths[:, np.newaxis]
    x[~present] = 0
    model = keras.Sequential([keras.Input((6, 2)), layers.Masking(), layers.BatchNormalization(name="norm")])
    ks.recalibrate_batch_norm(model, x)
    assert_measured(model.get_layer("norm"), x[present])


@pytest.mark.parametrize("channels", [6, 2])
def test_padding_where_the_layer_normalizes_over_channels(channels):
    """The layer itself is the oracle: with momentum 0 it keeps those of the last batch."""
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, (100, 6, channels)).astype("float32")
    x[np.arange(6) >= rng.integers(1, 7, 100)[:, np.newaxis]] = 0
    norm = layers.BatchNormalization(axis=1, momentum=0.0)
    model = keras.Sequential([keras.Input((6, channels)), layers.Masking(), norm])
    model(x, training=True)
    expected = statistics(norm)
    ks.recalibrate_batch_norm(model, x)
    np.testing.assert_allclose(statistics(norm), expected, rtol=1e-4)


def test_a_batch_that_is_all_padding_counts_for_nothing():
    x = np.random.default_rng(0).normal(3, 2, (200, 6, 2)).astype("float32")
    x[128:] = 0  # the second batch
    model = keras.Sequential([keras.Input((6, 2)), layers.Masking(), layers.BatchNormalization(name="norm")])
    ks.recalibrate_batch_norm(model, x)
    assert_measured(model.get_layer("norm"), x[:128], (0, 1))


def deep(**options) -> keras.Model:
    """Two layers of batch normalization, one of them in a nested model, with dropout before and between."""
    keras.utils.set_random_seed(1)
    parts = [layers.Dropout(0.5), layers.Dense(4, name="first"), layers.BatchNormalization(name="bn")]
    encoder = keras.Sequential([keras.Input((FEATURES,)), *parts], name="encoder")
    inputs = keras.Input((FEATURES,))
    x = layers.Dropout(0.5)(layers.ReLU()(encoder(inputs)))
    x = layers.BatchNormalization(name="norm", **options)(layers.Dense(5, name="second")(x))
    return keras.Model(inputs, layers.Dense(2)(x))


def test_each_layer_is_measured_on_what_the_layers_before_it_normalized_by_the_batch():
    model = deep()
    dense, bn = (model.get_layer("encoder").get_layer(name) for name in ("first", "bn"))
    gamma, beta = np.array([1, 2, -1, 0.5], "float32"), np.array([0, 1, -1, 3], "float32")
    bn.gamma.assign(gamma)
    bn.beta.assign(beta)
    ks.recalibrate_batch_norm(model, MANY)
    first = MANY.astype("float64") @ dense.kernel.numpy()
    assert_measured(bn, first)
    second = []
    for start in range(0, 300, 128):
        x = first[start : start + 128]
        x = gamma * (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + bn.epsilon) + beta
        second.append(np.maximum(x, 0) @ model.get_layer("second").kernel.numpy())
    assert_close(statistics(model.get_layer("norm")), measured(np.concatenate(second)), rtol=1e-4)


def test_the_changes_are_by_path_and_as_documented():
    model = deep(epsilon=1e-9)
    norm, bn = model.get_layer("norm"), model.get_layer("encoder").get_layer("bn")
    x = MANY[:100]  # one batch, so that the second time finds everything as it is
    first = ks.recalibrate_batch_norm(model, x)
    assert set(first) == {"encoder/bn", "norm"}
    assert ks.recalibrate_batch_norm(model, x) == pytest.approx({"encoder/bn": 0, "norm": 0}, abs=1e-5)
    mean, variance = statistics(norm)
    deviation = np.sqrt(variance)

    norm.moving_mean.assign(mean + deviation * np.array([0.1, 0, -0.7, 0.2, 0]))
    assert ks.recalibrate_batch_norm(model, x) == pytest.approx({"encoder/bn": 0, "norm": 0.7}, rel=1e-4, abs=1e-5)
    norm.moving_variance.assign((deviation * np.array([1, 1.5, 0.2, 1, 1])) ** 2)
    assert ks.recalibrate_batch_norm(model, x)["norm"] == pytest.approx(0.8, rel=1e-4)
    norm.moving_variance.assign((deviation * np.array([1, 3.5, 0.2, 1, 1])) ** 2)
    norm.moving_mean.assign(mean - 0.9 * deviation)
    assert ks.recalibrate_batch_norm(model, x)["norm"] == pytest.approx(2.5, rel=1e-4)
    np.testing.assert_allclose(statistics(norm), [mean, variance], rtol=1e-5)
    assert bn.epsilon == 1e-3


def test_recalibrated_statistics_are_what_training_converges_to():
    """The plain layer is the oracle: with momentum 0 it keeps those of the last batch."""
    plain, model = deep(momentum=0.0), deep()
    plain.get_layer("encoder").get_layer("bn").momentum = 0.0
    for layer in plain._flatten_layers():
        if isinstance(layer, layers.Dropout):
            layer.rate = 0.0
    plain(MANY[:128], training=True)
    ks.recalibrate_batch_norm(model, MANY[:128])
    for actual, expected in zip(norms(model), norms(plain), strict=True):
        np.testing.assert_allclose(statistics(actual), statistics(expected), rtol=1e-4, atol=1e-6)


def snapshot(model) -> dict[str, bytes]:
    moving = {id(variable) for norm in norms(model) for variable in (norm.moving_mean, norm.moving_variance)}
    seeds = [layer.seed_generator.state for layer in model._flatten_layers() if isinstance(layer, layers.Dropout)]
    optimizer = model.optimizer.variables if getattr(model, "optimizer", None) else []
    variables = [*model.variables, *model.metrics_variables, *seeds, *optimizer]
    return {f"{v.path} {id(v)}": v.numpy().tobytes() for v in variables if id(v) not in moving}


@pytest.mark.parametrize("kind", ["not compiled", "trained", "quantized", "mixed precision"])
def test_nothing_else_changes(kind):
    if kind == "mixed precision":
        keras.config.set_dtype_policy("mixed_float16")
    model = deep()
    if kind == "quantized":
        model = ks.quantize_aware(model)
    if kind != "not compiled":
        compiled(model, "adam", metrics=["accuracy"])
        fit(model, epochs=1)
    before, calls = snapshot(model), [vars(norm).get("call") for norm in norms(model)]
    assert before
    assert all(change > 0 for change in ks.recalibrate_batch_norm(model, MANY).values())
    assert snapshot(model) == before
    assert [vars(norm).get("call") for norm in norms(model)] == calls
    if kind != "not compiled":
        state = [statistics(norm) for norm in norms(model)]
        fit(model, epochs=1)
        assert all((statistics(norm) != old).any() for norm, old in zip(norms(model), state, strict=True))


def test_predictions_of_a_traced_model_follow():
    model = compiled(one_layer())
    before = model.predict(MANY, verbose=0)
    ks.recalibrate_batch_norm(model, MANY)
    after = model.predict(MANY, verbose=0)
    assert not np.allclose(before, after)
    mean, variance = measured(MANY)
    np.testing.assert_allclose(after, (MANY - mean) / np.sqrt(variance + 1e-3), rtol=1e-3, atol=1e-4)


def test_layers_that_training_does_not_update_are_not_measured():
    model = InInferenceMode()
    before = {norm.name: statistics(norm) for norm in norms(model)}
    assert set(ks.recalibrate_batch_norm(model, MANY)) == {"norm"}
    changed = {norm.name for norm in norms(model) if (statistics(norm) != before[norm.name]).any()}
    assert changed == {"norm"}


def test_layers_of_another_kind_are_not_measured_and_named():
    model = model_with_others()
    before = [v.numpy() for v in model.get_layer("inner").variables]
    with pytest.warns(UserWarning, match=r"inner/own.*inner/running.*inner/never"):
        assert set(ks.recalibrate_batch_norm(model, MANY)) == {"norm"}
    for variable, old in zip(model.get_layer("inner").variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), old)
    assert_measured(model.get_layer("norm"), MANY)


def test_a_model_without_batch_normalization_has_no_changes():
    model = keras.Sequential([keras.Input((FEATURES,)), layers.Dense(2), layers.LayerNormalization()])
    assert ks.recalibrate_batch_norm(model, MANY) == {}
    frozen = one_layer(trainable=False)
    assert ks.recalibrate_batch_norm(frozen, MANY) == {}


@pytest.mark.parametrize("bad", ["nan", "infinite", "later batch", "exception"])
def test_data_that_cannot_be_measured_leaves_the_statistics_as_they_were(bad):
    model = deep()
    ks.recalibrate_batch_norm(model, MANY[:50])
    before, calls = [statistics(norm) for norm in norms(model)], [vars(norm).get("call") for norm in norms(model)]
    x = MANY.copy()
    x[{"nan": 0, "infinite": 5, "later batch": 299, "exception": 0}[bad], 1] = np.inf if bad == "infinite" else np.nan

    def broken():
        yield MANY[:10]
        raise KeyboardInterrupt

    if bad == "exception":
        with pytest.raises(KeyboardInterrupt):
            ks.recalibrate_batch_norm(model, broken())
    else:
        named = pytest.raises(ValueError, match=r"encoder/bn, norm.*The statistics are as they were")
        with named, np.errstate(all="ignore"):
            ks.recalibrate_batch_norm(model, x)
    np.testing.assert_array_equal(statistics(norms(model)[0]), before[0])
    np.testing.assert_array_equal(statistics(norms(model)[1]), before[1])
    assert [vars(norm).get("call") for norm in norms(model)] == calls


BAD_INPUT = {
    "not a model": (lambda: (layers.BatchNormalization(), MANY), {}, TypeError, r"must be a `keras\.Model`"),
    "not built": (lambda: (keras.Sequential([layers.Dense(2)]), MANY), {}, ValueError, "is not built"),
    "no data": (lambda: (one_layer(), None), {}, ValueError, "Received: None"),
    "empty array": (lambda: (one_layer(), MANY[:0]), {}, ValueError, "empty"),
    "empty list": (lambda: (one_layer(), []), {}, ValueError, "empty"),
    "text": (lambda: (one_layer(), "x"), {}, TypeError, "Received: 'x'"),
    "a number": (lambda: (one_layer(), 3), {}, TypeError, "Received: 3"),
    "unequal lengths": (lambda: (one_layer(), (MANY, TARGETS[:7])), {}, ValueError, "different lengths: 7, 300"),
}
for value in (0, -1, True, 1.5, "a"):
    options = {"max_examples": value}
    BAD_INPUT[f"max_examples={value!r}"] = (
        lambda: (one_layer(), MANY),
        options,
        ValueError,
        f"Received: max_examples={value!r}",
    )


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused(case):
    make, options, error, message = BAD_INPUT[case]
    model, data = make()
    with pytest.raises(error, match=message):
        ks.recalibrate_batch_norm(model, data, **options)
    if getattr(model, "built", False) and isinstance(model, keras.Model):
        np.testing.assert_array_equal(statistics(norms(model)[0]), [np.zeros(FEATURES), np.ones(FEATURES)])
        assert_released(model)


@pytest.mark.parametrize("data", [MANY[:0], [], "x", 3, (MANY, TARGETS[:7])])
def test_bad_data_is_refused_without_batch_normalization_too(data):
    model = keras.Sequential([keras.Input((FEATURES,)), layers.Dense(2)])
    with pytest.raises((TypeError, ValueError), match="`data`"):
        ks.recalibrate_batch_norm(model, data)


def small_digits_model(norm=layers.BatchNormalization, **compile_options) -> keras.Model:
    """For the digits; the same initial weights every time."""
    keras.utils.set_random_seed(1)
    parts = [
        keras.Input((8, 8, 1)),
        layers.Conv2D(8, 3, strides=2, use_bias=False, name="conv"),
        norm(name="norm"),
        layers.ReLU(),
        layers.Flatten(),
        layers.Dense(16, name="hidden"),
        norm(name="second_norm"),
        layers.ReLU(),
        layers.Dense(10, name="logits"),
    ]
    return compiled(keras.Sequential(parts), "adam", metrics=["accuracy"], **compile_options)


def test_after_a_short_pruning_evaluate_says_what_the_model_can(digits):
    """Beside it the same run of layers whose statistics the package leaves alone: the weights become the same ones."""
    x, y = digits
    train, test = (x[:1280], y[:1280]), (x[1280:], y[1280:])
    trained = small_digits_model()
    trained.optimizer.learning_rate = 0.01
    trained.fit(*train, epochs=5, shuffle=False, verbose=0)

    def accuracy(model):
        return model.evaluate(*test, verbose=0)[1]

    def pruned(norm):
        model = small_digits_model(norm)
        model.optimizer.learning_rate = 0.005
        model.set_weights(trained.get_weights())
        callback = ks.MagnitudePruning(ks.schedules.PolynomialDecay(0.9, end=0.6))
        model.fit(*train, batch_size=64, epochs=3, shuffle=False, verbose=0, callbacks=[callback])
        assert callback.sparsity == pytest.approx(0.9, abs=0.01)
        return model

    model = pruned(layers.BatchNormalization)
    with pytest.warns(UserWarning, match="do not follow"):
        left_alone = pruned(Own)
    for one, other in zip(model.trainable_variables, left_alone.trainable_variables, strict=True):
        np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=1e-3, atol=1e-4)
    at_the_end, too_late = accuracy(model), accuracy(left_alone)
    ks.recalibrate_batch_norm(model, train[0], max_examples=None)
    recalibrated = accuracy(model)
    assert abs(at_the_end - recalibrated) < 0.05
    assert too_late < recalibrated - 0.15
