"""The workflow as a user types it, on real data."""

import gzip
import zipfile

import keras
import numpy as np
import pytest
from networks import count_zeros, expected_zeros, kernels, small_convnet, sparsity

import keras_squeeze as ks


def test_pruned_while_it_trains_and_saved_as_an_ordinary_model(digits, tmp_path, capsys):
    x, y = digits
    model = small_convnet()
    history = model.fit(
        x[:1500],
        y[:1500],
        epochs=25,
        verbose=2,
        callbacks=[ks.MagnitudePruning(0.9)],
        validation_data=(x[1500:], y[1500:]),
    )

    assert count_zeros(model) == expected_zeros(model, 0.9)
    assert history.history["sparsity"][-1] == pytest.approx(0.9, abs=1e-3)
    assert history.history["sparsity"] == sorted(history.history["sparsity"])
    assert history.history["val_accuracy"][-1] > 0.85
    assert "90.0%" in capsys.readouterr().out

    report = ks.summarize(model)
    assert report.total.zeros == count_zeros(model)

    model.save(tmp_path / "small.keras")
    reloaded = keras.models.load_model(tmp_path / "small.keras")
    assert type(reloaded) is keras.Sequential
    assert all(type(layer).__module__.startswith("keras.") for layer in reloaded.layers)
    np.testing.assert_array_equal(reloaded.predict(x, verbose=0), model.predict(x, verbose=0))
    assert sparsity(reloaded) == sparsity(model)


def test_a_pruned_file_compresses_to_less_than_a_dense_one(digits, tmp_path):
    x, y = digits
    sizes = {}
    for name, callbacks in {"dense": [], "pruned": [ks.MagnitudePruning(0.9)]}.items():
        model = small_convnet()
        model.fit(x, y, epochs=2, verbose=0, callbacks=callbacks)
        path = tmp_path / f"{name}.keras"
        model.save(path)
        with zipfile.ZipFile(path) as archive:
            sizes[name] = len(gzip.compress(archive.read("model.weights.h5")))
    assert sizes["pruned"] < 0.75 * sizes["dense"]  # the optimizer's state, two thirds of the file, stays dense


def test_predictions_equal_those_of_a_plain_model_with_the_weights_masked_by_hand(digits):
    x, _ = digits
    model, plain = small_convnet(), small_convnet()
    ks.prune_weights(model, 0.6, allocation="uniform")
    for pruned, dense in zip(model.weights, plain.weights, strict=True):
        if dense.name.endswith("kernel"):
            values = dense.numpy()
            smallest_kept = np.sort(np.abs(values), axis=None)[-round(values.size * 0.4)]
            dense.assign(np.where(np.abs(values) >= smallest_kept, values, 0))
        np.testing.assert_array_equal(pruned.numpy(), dense.numpy())
    np.testing.assert_array_equal(model.predict(x, verbose=0), plain.predict(x, verbose=0))


def test_fine_tuning_keeps_the_zeros(digits):
    x, y = digits
    model = small_convnet()
    ks.prune_weights(model, 0.7)
    zeros = {path: kernel == 0 for path, kernel in kernels(model).items()}
    history = model.fit(x, y, epochs=2, verbose=0, callbacks=[ks.KeepSparsity()])
    for path, kernel in kernels(model).items():
        np.testing.assert_array_equal(kernel == 0, zeros[path])
    assert history.history["sparsity"][-1] == pytest.approx(sparsity(model))


def test_a_later_fit_without_the_callback_trains_every_weight_again(digits):
    x, y = digits
    model = small_convnet()
    model.fit(x, y, epochs=1, verbose=0, callbacks=[ks.MagnitudePruning(0.8)])
    before = count_zeros(model)
    model.fit(x, y, epochs=1, verbose=0)
    assert count_zeros(model) < before / 2


def test_a_custom_training_loop(digits):
    import tensorflow as tf

    x, y = digits
    model = small_convnet()
    optimizer = keras.optimizers.Adam()
    loss_function = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(64).repeat(2)
    total = len(dataset)

    pruning = ks.MagnitudePruning(0.8)
    pruning.attach(model, optimizer, total_steps=total)

    @tf.function
    def train_step(images, labels):
        with tf.GradientTape() as tape:
            loss = loss_function(labels, model(images, training=True))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    seen = []
    for step, (images, labels) in enumerate(dataset, start=1):
        train_step(images, labels)
        pruning.update(step)
        seen.append(count_zeros(model))
    pruning.detach()

    assert seen == sorted(seen)
    assert seen[-1] == expected_zeros(model, 0.8)
    assert all(v.constraint is None for v in model.trainable_variables)
