"""Gradients observed in training against those that a tape gives on the same batches."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from networks import kernels, small_convnet, two_devices

import keras_squeeze as ks
from keras_squeeze.neuron_pruning import neuron_criteria
from keras_squeeze.neuron_pruning.neurons import Neurons
from keras_squeeze.training.gradients import BATCHES, GradientWindow, GroupProducts, MeanGradients
from keras_squeeze.weight_pruning import criteria

BATCH = 16


def network(optimizer="sgd", **options):
    """Two layers for the digits whose weights stay as they are while it trains: the learning rate is 0."""
    keras.utils.set_random_seed(2)
    layers = keras.layers
    hidden = layers.Dense(12, activation="tanh", name="hidden")
    model = keras.Sequential(
        [keras.Input((8, 8, 1)), layers.Flatten(), hidden, layers.Dense(10, name="out")], name="net"
    )
    optimizer = keras.optimizers.SGD(0.0) if optimizer == "sgd" else optimizer
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"], **options)
    return model


def batches_of(digits, first, last):
    x, y = digits
    return [(x[i * BATCH : (i + 1) * BATCH], y[i * BATCH : (i + 1) * BATCH]) for i in range(first, last)]


def fit(model, digits, batches, *callbacks, **options):
    x, y = (array[: batches * BATCH] for array in digits)
    return model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0, callbacks=list(callbacks), **options)


def tape_gradients(model, x, y):
    with tf.GradientTape() as tape:
        loss = model.compute_loss(x, y, model(x, training=True))
    variables = model.trainable_variables
    values = tape.gradient(loss, [variable.value for variable in variables])
    return dict(zip((variable.path for variable in variables), map(np.asarray, values), strict=True))


def mean_gradients(model, pairs):
    found = [tape_gradients(model, x, y) for x, y in pairs]
    return {path: np.mean([gradients[path] for gradients in found], axis=0) for path in found[0]}


def observed_mean(model, digits, batches, **options):
    observer = MeanGradients(model, model.optimizer, model.trainable_variables)
    fit(model, digits, batches, **options)
    paths = [variable.path for variable in model.trainable_variables]
    observer.detach()
    return dict(zip(paths, observer.means(model.trainable_variables), strict=True)), observer


@pytest.mark.parametrize(
    "options", [{}, {"jit_compile": True}, {"run_eagerly": True}, {"steps_per_execution": 3}], ids=str
)
def test_mean_gradients_are_those_of_a_tape(digits, options):
    model = network(**options)
    means, observer = observed_mean(model, digits, 6)
    assert observer.batches == 6
    for path, expected in mean_gradients(model, batches_of(digits, 0, 6)).items():
        np.testing.assert_allclose(means[path], expected, rtol=1e-4, atol=1e-6, err_msg=path)
    assert "apply" not in vars(model.optimizer)


def test_scaled_losses_are_unscaled(digits):
    inner = keras.optimizers.SGD(0.0)
    model = network(keras.optimizers.LossScaleOptimizer(inner, initial_scale=64.0))
    means, _ = observed_mean(model, digits, 4)
    for path, expected in mean_gradients(model, batches_of(digits, 0, 4)).items():
        np.testing.assert_allclose(means[path], expected, rtol=1e-4, atol=1e-6, err_msg=path)
    assert "apply" not in vars(inner)


def test_accumulated_gradients_count_batch_by_batch(digits):
    model = network(keras.optimizers.SGD(0.0, gradient_accumulation_steps=2))
    means, observer = observed_mean(model, digits, 4)
    assert (observer.batches, observer.batches_per_step) == (4, 2)
    for path, expected in mean_gradients(model, batches_of(digits, 0, 4)).items():
        np.testing.assert_allclose(means[path], expected, rtol=1e-4, atol=1e-6, err_msg=path)


def test_over_two_devices_the_batch_of_a_replica_is_a_batch(digits):
    strategy = two_devices()
    with strategy.scope():
        model = network()
    means, observer = observed_mean(model, digits, 4)
    assert observer.batches == 8
    for path, expected in mean_gradients(network(), batches_of(digits, 0, 4)).items():
        # Keras divides the loss of a replica by their number, so that gradients add up.
        np.testing.assert_allclose(means[path], expected / 2, rtol=1e-4, atol=1e-6, err_msg=path)


def test_only_what_is_asked_for_is_recorded(digits):
    model = network()
    observer = MeanGradients(model, model.optimizer, model.trainable_variables)
    observer.record_from(3)
    fit(model, digits, 5)
    assert observer.batches == 2
    kernel = model.get_layer("out").kernel
    expected = mean_gradients(model, batches_of(digits, 3, 5))[kernel.path]
    np.testing.assert_allclose(observer.means([kernel])[0], expected, rtol=1e-4, atol=1e-6)
    observer.forget()
    assert observer.batches == 0
    assert not observer.means([kernel])[0].any()


def test_two_observers_of_one_optimizer(digits):
    model = network()
    first = MeanGradients(model, model.optimizer, model.trainable_variables)
    second = MeanGradients(model, model.optimizer, model.trainable_variables[:1])
    first.detach()
    fit(model, digits, 2)
    assert (first.batches, second.batches) == (0, 2)
    second.detach()
    assert "apply" not in vars(model.optimizer)


# Neurons.


def products_by_hand(gradients, weight_of):
    """`|sum of dL/dw * w|` over the kernel column and the bias of each hidden unit."""
    kernel, bias = "net/hidden/kernel", "net/hidden/bias"
    return np.abs((gradients[kernel] * weight_of[kernel]).sum(axis=0) + gradients[bias] * weight_of[bias])


@pytest.mark.parametrize("accumulated", [1, 2])
def test_group_products_by_hand(digits, accumulated):
    model = network(keras.optimizers.SGD(0.0, gradient_accumulation_steps=accumulated if accumulated > 1 else None))
    hidden = model.get_layer("hidden")
    hidden.bias.assign(np.linspace(-1, 1, 12))
    numbers = np.arange(12)[::-1].copy()
    observer = GroupProducts(model, model.optimizer, [(hidden.kernel, 1, numbers), (hidden.bias, 0, numbers)], 12)
    fit(model, digits, 6)
    observer.detach()
    weights = {variable.path: variable.numpy() for variable in model.trainable_variables}
    steps = []
    for step in range(6 // accumulated):
        pairs = batches_of(digits, step * accumulated, (step + 1) * accumulated)
        gradients = [tape_gradients(model, x, y) for x, y in pairs]
        total = {path: np.sum([part[path] for part in gradients], axis=0) for path in gradients[0]}
        steps.append(products_by_hand(total, weights))
    np.testing.assert_allclose(observer.values()[numbers], np.sum(steps, axis=0) / 6, rtol=1e-3, atol=1e-6)


def test_the_scores_of_training_are_those_of_taylor_on_the_same_data(digits):
    model = network()
    neurons = Neurons(model)
    taylor = neuron_criteria.Taylor(num_batches=BATCHES)
    observer = taylor.observe(neurons, model.optimizer)
    fit(model, digits, BATCHES)
    observer.detach()
    expected = taylor.scores(neurons, tf.data.Dataset.from_tensor_slices(digits).batch(BATCH))
    np.testing.assert_allclose(observer.values(), expected, rtol=1e-3, atol=1e-6)


def test_gradients_of_lookups_are_sparse():
    keras.utils.set_random_seed(3)
    embedding = keras.layers.Embedding(7, 4, name="embedding")
    model = keras.Sequential([keras.Input((5,), dtype="int32"), embedding, keras.layers.GlobalAveragePooling1D()])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    rng = np.random.default_rng(4)
    x, y = rng.integers(7, size=(8, 5)), rng.normal(size=(8, 4)).astype("float32")
    by_column = GroupProducts(model, model.optimizer, [(embedding.embeddings, 1, np.arange(4))], 4)
    by_row = GroupProducts(model, model.optimizer, [(embedding.embeddings, 0, np.arange(7))], 7)
    model.fit(x, y, batch_size=8, verbose=0)
    with tf.GradientTape() as tape:
        loss = model.compute_loss(x, y, model(x))
    gradient = tf.convert_to_tensor(tape.gradient(loss, embedding.embeddings.value)).numpy()
    products = gradient * embedding.embeddings.numpy()
    np.testing.assert_allclose(by_column.values(), np.abs(products.sum(axis=0)), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(by_row.values(), np.abs(products.sum(axis=1)), rtol=1e-4, atol=1e-7)


# What callbacks make of it.


class Pruned(keras.callbacks.Callback):
    """Records what is zero after every batch."""

    def on_train_begin(self, logs=None):
        self.kernels = []

    def on_train_batch_end(self, batch, logs=None):
        self.kernels.append({path: kernel == 0 for path, kernel in kernels(self.model).items()})


def at_step(step, fraction=0.5):
    return ks.schedules.Constant(fraction, begin=step)


def test_neurons_go_by_the_eight_batches_before_the_update(digits):
    """The learning rate is 0: the same scores are those of `Taylor` on these batches."""
    model, other, seen = network(), network(), Pruned()
    fit(model, digits, 24, ks.NeuronPruning(at_step(20), round_to=1), seen)
    data = tf.data.Dataset.from_tensor_slices(digits).batch(BATCH).skip(20 - BATCHES)
    ks.prune_neurons(other, 0.5, criterion=neuron_criteria.Taylor(BATCHES), data=data, round_to=1)
    assert not any(zeros.any() for zeros in seen.kernels[18].values())
    for path, kernel in kernels(other).items():
        np.testing.assert_array_equal(seen.kernels[19][path], kernel == 0)
        np.testing.assert_array_equal(seen.kernels[-1][path], kernel == 0)


@pytest.mark.parametrize("criterion", ["snip", "movement"])
def test_weights_go_by_the_eight_batches_before_the_update(digits, criterion):
    model, other, seen = network(), network(), Pruned()
    fit(model, digits, 24, ks.MagnitudePruning(at_step(20), criterion=criterion, allocation="uniform"), seen)
    data = tf.data.Dataset.from_tensor_slices(digits).batch(BATCH).skip(20 - BATCHES)
    ks.prune_weights(other, 0.5, criterion=criteria.get(criterion), data=data, allocation="uniform")
    assert not any(zeros.any() for zeros in seen.kernels[18].values())
    for path, kernel in kernels(other).items():
        assert (seen.kernels[19][path] != (kernel == 0)).sum() <= 2, path  # sums in another order


@pytest.mark.parametrize("pruning", ["neurons", "weights"])
def test_the_first_update_waits_for_eight_batches(digits, pruning):
    make = {
        "neurons": lambda: ks.NeuronPruning(at_step(0), round_to=1),
        "weights": lambda: ks.MagnitudePruning(at_step(0), criterion="snip"),
    }[pruning]
    model, seen = network(), Pruned()
    fit(model, digits, 12, make(), seen)
    zeros = [sum(int(kernel.sum()) for kernel in at_batch.values()) for at_batch in seen.kernels]
    assert not any(zeros[: BATCHES - 1])
    assert len(set(zeros[BATCHES - 1 :])) == 1
    assert zeros[-1] > 0


def test_a_run_that_is_shorter_uses_what_there_is(digits):
    model, seen = network(), Pruned()
    fit(model, digits, 3, ks.NeuronPruning(at_step(0), round_to=1), seen)
    assert not any(zeros.any() for zeros in seen.kernels[1].values())
    assert (kernels(model)["net/hidden/kernel"] == 0).all(axis=0).sum() == 6


@pytest.mark.filterwarnings("ignore:Your input ran out of data")  # Keras learns the length so
def test_epochs_of_unknown_length(digits):
    def stream():
        yield from batches_of(digits, 0, 5)

    signature = (tf.TensorSpec((None, 8, 8, 1)), tf.TensorSpec((None,), tf.int32))
    data = tf.data.Dataset.from_generator(stream, output_signature=signature)
    model = network()
    pruning = ks.NeuronPruning(ks.schedules.PolynomialDecay(0.5, begin=0, end=8, frequency=4), round_to=1)
    model.fit(data, epochs=2, verbose=0, shuffle=False, callbacks=[pruning])
    assert pruning.reached
    assert (kernels(model)["net/hidden/kernel"] == 0).all(axis=0).sum() == 6


def test_the_same_seed_gives_the_same_masks(digits):
    results = []
    for _ in range(2):
        keras.utils.set_random_seed(5)
        model = small_convnet()
        x, y = digits
        model.fit(x, y, batch_size=64, epochs=1, verbose=0, callbacks=[ks.NeuronPruning(0.5)])
        results.append([kernel == 0 for kernel in kernels(model).values()])
    assert all(np.array_equal(one, other) for one, other in zip(*results, strict=True))
    assert any(zeros.all(axis=tuple(range(zeros.ndim - 1))).any() for zeros in results[0])


def test_a_training_loop_of_ones_own(digits):
    model, twin = network(), network()
    optimizer = keras.optimizers.SGD(0.0)
    pruning = ks.NeuronPruning(at_step(0), round_to=1)
    pruning.attach(model, optimizer, total_steps=12)

    @tf.function
    def train_step(x, y):
        with tf.GradientTape() as tape:
            loss = model.compute_loss(x, y, model(x, training=True))
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

    shares = []
    for step, (x, y) in enumerate(batches_of(digits, 0, 12), start=1):
        train_step(x, y)
        pruning.update(step)
        shares.append(pruning.pruned_neurons)
    pruning.detach()
    assert shares == [0.0] * (BATCHES - 1) + [0.5] * 5
    data = tf.data.Dataset.from_tensor_slices(digits).batch(BATCH)
    ks.prune_neurons(twin, 0.5, criterion=neuron_criteria.Taylor(BATCHES), data=data, round_to=1)
    for path, kernel in kernels(twin).items():
        np.testing.assert_array_equal(kernels(model)[path] == 0, kernel == 0)
    assert "apply" not in vars(optimizer)


@pytest.mark.parametrize("make", [ks.NeuronPruning, lambda s: ks.MagnitudePruning(s, criterion="movement")])
def test_a_step_that_was_traced_too_early_is_reported_with_the_way_out(digits, make):
    model = network()
    optimizer = keras.optimizers.SGD(0.1)

    @tf.function
    def train_step(x, y):
        with tf.GradientTape() as tape:
            loss = model.compute_loss(x, y, model(x, training=True))
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

    pairs = batches_of(digits, 0, 30)
    train_step(*pairs[0])
    pruning = make(at_step(2))
    pruning.attach(model, optimizer, total_steps=30)
    train_step(*pairs[1])
    pruning.update(2)  # it may still come
    with pytest.warns(UserWarning, match="no gradient reached the optimizer"):
        pruning.update(30)
    pruning.detach()


def test_the_window_by_hand():
    class Counting:
        batches_per_step = 1
        batches = 0

        def forget(self):
            self.batches = 0

        def record_from(self, count):
            self.begin = count

    observer = Counting()
    window = GradientWindow(observer, origin=100, steps_per_epoch=50)
    window.open_before(0, None)
    assert observer.begin == 100
    observer.batches = BATCHES - 1
    assert not window.is_ready(7)
    observer.batches = BATCHES
    assert window.is_ready(8)
    window.open_before(30, 0)
    assert observer.begin == 130 - BATCHES
    window.open_before(33, 30)  # closer than eight steps: as many as there are between
    assert observer.begin == 130
    observer.batches = 2
    assert not window.is_ready(33)
    observer.batches = 3
    assert window.is_ready(34)
    observer.batches = 0
    assert not window.is_ready(40)  # an epoch has begun
    assert window.is_ready(33 + 2 * BATCHES)  # nothing is being recorded
    observer.batches = 1
    assert window.is_ready(50)  # an epoch ends
    assert not window.is_ready(40)
    window.end_epoch()
    assert window.is_ready(40)
    window.begin_epoch()
    observer.batches = 1
    assert not window.is_ready(40)
    window.open_before(None, 40)
    assert observer.begin == np.iinfo(np.int64).max
