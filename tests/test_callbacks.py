"""Beside other callbacks: order, logs, early stopping, checkpoints, and the line at the end."""

import csv
import itertools
import warnings

import keras
import numpy as np
import pytest
from networks import ZerosAtEveryStep, count_zeros, expected_zeros, kernels, small_convnet, sparsity

import keras_squeeze as ks

TARGET = 0.8


def fit(model, digits, callbacks, **options):
    x, y = digits
    options = {"epochs": 3, "batch_size": 64, "verbose": 0, "validation_data": (x[:300], y[:300]), **options}
    return model.fit(x[300:], y[300:], callbacks=callbacks, **options).history


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_the_order_of_callbacks_does_not_matter(digits, tmp_path, order):
    model = small_convnet()
    callbacks = [
        ks.MagnitudePruning(ks.schedules.PolynomialDecay(TARGET, end=1.0)),
        keras.callbacks.CSVLogger(tmp_path / "log.csv"),
        keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}-{sparsity:.3f}.keras"),
    ]
    history = fit(model, digits, [callbacks[index] for index in order])
    with open(tmp_path / "log.csv") as file:
        logged = [float(row["sparsity"]) for row in csv.DictReader(file)]
    assert logged == pytest.approx(history["sparsity"])
    for epoch, value in enumerate(history["sparsity"], start=1):
        saved = keras.models.load_model(tmp_path / f"{epoch}-{value:.3f}.keras")
        assert sparsity(saved) == pytest.approx(value)
    assert count_zeros(saved) == expected_zeros(saved, TARGET)


def test_validation_sees_the_pruned_model(digits):
    seen = []

    class Evaluated(keras.callbacks.Callback):
        def on_test_begin(self, logs=None):
            seen.append(sparsity(self.model))

    model = small_convnet()
    history = fit(model, digits, [Evaluated(), ks.MagnitudePruning(TARGET)])
    assert seen == pytest.approx(history["sparsity"])


def test_the_other_logs_are_those_of_keras(digits):
    plain, pruned = small_convnet(), small_convnet()
    keras.utils.set_random_seed(3)
    expected = fit(plain, digits, [])
    keras.utils.set_random_seed(3)
    actual = fit(pruned, digits, [ks.MagnitudePruning(0.0)])
    assert actual.pop("sparsity") == [0.0] * 3
    assert actual.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-5)


def test_tensorboard_gets_the_sparsity(digits, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = fit(small_convnet(), digits, [keras.callbacks.TensorBoard(tmp_path), ks.MagnitudePruning(TARGET)])
    events = EventAccumulator(str(tmp_path / "train")).Reload()
    import tensorflow as tf

    values = [float(tf.make_ndarray(event.tensor_proto)) for event in events.Tensors("epoch_sparsity")]
    assert values == pytest.approx(history["sparsity"])


def early_stopping():
    # The best epoch of a monitor that grows is the first, when nothing is pruned yet.
    return keras.callbacks.EarlyStopping("sparsity", mode="min", patience=10, restore_best_weights=True)


@pytest.mark.parametrize("pruning_first", [True, False])
def test_early_stopping_that_restores_unpruned_weights_is_announced(digits, pruning_first):
    model = small_convnet()
    callbacks = [ks.MagnitudePruning(TARGET), early_stopping()]
    with (
        pytest.warns(UserWarning, match=r"EarlyStopping may pick weights .* keras_squeeze\.AfterTarget"),
        (
            pytest.warns(UserWarning, match="another callback put less pruned weights")
            if not pruning_first
            else _nothing()
        ),
    ):
        history = fit(model, digits, callbacks if pruning_first else callbacks[::-1])
    assert sparsity(model) == pytest.approx(history["sparsity"][0])


def _nothing():
    return warnings.catch_warnings()


@pytest.mark.parametrize("pruning_first", [True, False])
def test_after_target_early_stopping_picks_among_pruned_weights(digits, pruning_first):
    model = small_convnet()
    callbacks = [ks.MagnitudePruning(TARGET), ks.AfterTarget(early_stopping())]
    fit(model, digits, callbacks if pruning_first else callbacks[::-1], epochs=5)
    assert count_zeros(model) == expected_zeros(model, TARGET)


class Recorder(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.events = []

    def on_epoch_begin(self, epoch, logs=None):
        self.events.append(("begin", epoch, sparsity(self.model)))

    def on_batch_end(self, batch, logs=None):  # the old name, which Keras still knows
        self.events.append(("batch", batch, sparsity(self.model)))

    def on_epoch_end(self, epoch, logs=None):
        self.events.append(("end", epoch, sparsity(self.model)))


@pytest.mark.parametrize("pruning_first", [True, False])
def test_after_target_forwards_everything_from_the_target_on_and_nothing_before(digits, pruning_first):
    model, recorder = small_convnet(), Recorder()
    callbacks = [ks.MagnitudePruning(ks.schedules.PolynomialDecay(TARGET, end=0.5)), ks.AfterTarget(recorder)]
    fit(model, digits, callbacks if pruning_first else callbacks[::-1], epochs=3)
    reached = count_zeros(model) / sum(kernel.size for kernel in kernels(model).values())
    assert all(at == pytest.approx(reached) for _, _, at in recorder.events)
    assert [epoch for kind, epoch, _ in recorder.events if kind == "begin"] == [1, 2]
    assert [epoch for kind, epoch, _ in recorder.events if kind == "end"] == [1, 2]
    assert recorder.events[0][0] == "begin"
    assert sum(kind == "batch" for kind, _, _ in recorder.events) > 1797 / 64


def test_after_target_the_best_checkpoint_is_pruned(digits, tmp_path):
    checkpoint = keras.callbacks.ModelCheckpoint(tmp_path / "best.keras", "val_accuracy", save_best_only=True)
    with pytest.warns(UserWarning, match="ModelCheckpoint may pick weights"):
        fit(small_convnet(), digits, [ks.MagnitudePruning(TARGET), checkpoint], epochs=1)
    (tmp_path / "best.keras").unlink()

    checkpoint = keras.callbacks.ModelCheckpoint(tmp_path / "best.keras", "val_accuracy", save_best_only=True)
    fit(small_convnet(), digits, [ks.AfterTarget(checkpoint), ks.MagnitudePruning(TARGET)], epochs=4)
    best = keras.models.load_model(tmp_path / "best.keras")
    assert count_zeros(best) == expected_zeros(best, TARGET)


def test_after_target_forwards_everything_where_nothing_is_compressed(digits):
    stop = early_stopping()
    stop.monitor = "loss"
    fit(small_convnet(), digits, [ks.AfterTarget(stop)])
    assert stop.best_weights is not None


def test_after_target_forwards_only_the_events_that_its_callback_has(digits):
    events = []

    class Listener(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            events.append(epoch)

    wrapped = ks.AfterTarget(Listener())
    assert wrapped.on_train_batch_end._is_default
    schedule = ks.schedules.PolynomialDecay(TARGET, end=0.5)
    fit(small_convnet(), digits, [wrapped, ks.MagnitudePruning(schedule)], epochs=4)
    assert events == [1, 2, 3]  # the target is reached at the end of the second of four epochs


def test_a_run_that_ends_too_early_says_so_with_both_values(digits):
    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.stop_training = True

    model = small_convnet()
    with pytest.warns(UserWarning, match=r"sparsity is 0\.\d+, the target 0\.8") as caught:
        fit(model, digits, [ks.MagnitudePruning(TARGET), Stop()])
    assert any(f"{sparsity(model):.4f}" in str(warning.message) for warning in caught)


def test_the_line_at_the_end_says_what_was_reached(digits, capsys):
    model = small_convnet()
    fit(model, digits, [ks.MagnitudePruning(TARGET)], verbose=2)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("keras_squeeze"))
    assert f"{count_zeros(model):,}" in line
    fit(model, digits, [ks.MagnitudePruning(TARGET)], verbose=0)
    assert "keras_squeeze" not in capsys.readouterr().out


def test_weights_that_diverge_are_reported_and_the_zeros_stay(digits):
    zeros_before = []

    class Diverge(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 0:
                kernel = self.model.get_layer("hidden").kernel
                zeros_before.append(int((kernel.numpy() == 0).sum()))
                kernel.assign(np.where(kernel.numpy() == 0, 0, np.nan))

    model = small_convnet()
    with pytest.warns(UserWarning, match=r"NaN or infinite scores of .*hidden/kernel") as caught:
        fit(model, digits, [ks.MagnitudePruning(TARGET), Diverge()])
    assert sum("NaN" in str(warning.message) for warning in caught) == 1
    kernel = model.get_layer("hidden").kernel.numpy()
    assert (kernel == 0).sum() == zeros_before[0] > 0


def test_keep_sparsity_leaves_an_all_zero_weight_to_train(digits):
    model = small_convnet()
    ks.prune_weights(model, 0.5, layers="hidden")
    model.get_layer("logits").kernel.assign(np.zeros(model.get_layer("logits").kernel.shape))
    before = model.get_layer("hidden").kernel.numpy() == 0
    fit(model, digits, [ks.KeepSparsity()])
    np.testing.assert_array_equal(model.get_layer("hidden").kernel.numpy() == 0, before)
    assert np.count_nonzero(model.get_layer("logits").kernel.numpy()) > 0


def test_a_zero_initialized_kernel_is_not_kept_dead(digits):
    model = small_convnet()
    model.get_layer("logits").kernel.assign(np.zeros(model.get_layer("logits").kernel.shape))
    fit(model, digits, [ks.MagnitudePruning(0.5, allocation="uniform")])
    kernel = model.get_layer("logits").kernel.numpy()
    assert (kernel == 0).mean() == pytest.approx(0.5)


def test_keep_sparsity_and_pruning_together(digits):
    model = small_convnet()
    ks.prune_weights(model, 0.3)
    held = {path: kernel == 0 for path, kernel in kernels(model).items()}
    zeros = ZerosAtEveryStep()
    fit(model, digits, [ks.KeepSparsity(), ks.MagnitudePruning(TARGET), zeros])
    assert count_zeros(model) == expected_zeros(model, TARGET)
    assert min(zeros.at_batch) >= sum(int(mask.sum()) for mask in held.values())
    for path, kernel in kernels(model).items():
        assert (kernel[held[path]] == 0).all()
