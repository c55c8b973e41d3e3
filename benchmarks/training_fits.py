"""The runs of `fit` that `training_overhead.py` times, in Keras 3 and, with tfmot, in tf_keras.

Both sides get the same networks, data, seed, optimizer and steps between mask updates.
"""

import functools
import gc
import os
import time
from dataclasses import dataclass

import numpy as np

SPARSITY = 0.9
TIMED_EPOCHS = 4

_RUN_EXAMPLES = 10 * 50_000
_RUN_UPDATES = 100
_SCHEDULE_SHARE = 0.75
_SHAPES = {"mlp": (784,), "resnet8": (32, 32, 3)}


@dataclass(frozen=True)
class Cell:
    """One row of the table: a network, a batch size, and how long to train.

    A real run is taken to be ten epochs over 50,000 examples, with a hundred mask updates in its first three
    quarters. What is timed is a smaller run of the same proportions: as many steps between updates, and a
    schedule that begins when the timing begins and ends at three quarters of it.

    Attributes:
        network: `"mlp"` or `"resnet8"`.
        batch: Examples in a batch.
        updates: Mask updates in the timed part.
    """

    network: str
    batch: int
    updates: int

    @property
    def frequency(self) -> int:
        """Steps between two mask updates."""
        return int(_RUN_EXAMPLES / self.batch * _SCHEDULE_SHARE) // _RUN_UPDATES

    @property
    def schedule_steps(self) -> int:
        return self.updates * self.frequency

    @property
    def epoch_steps(self) -> int:
        return max(1, round(self.schedule_steps / _SCHEDULE_SHARE / TIMED_EPOCHS))

    @property
    def steps(self) -> int:
        """Steps that are timed; the warm-up epoch before them is not."""
        return self.epoch_steps * TIMED_EPOCHS


@dataclass(frozen=True)
class Times:
    """Seconds of one `fit`: from its second epoch on, and all of it with tracing and warm-up."""

    steady: float
    whole: float


def fit_keras(cell: Cell, pruned: bool) -> Times:
    """Trains in Keras 3, with or without `MagnitudePruning`."""
    import keras

    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    model = _NETWORKS[cell.network](keras)
    callbacks = []
    if pruned:
        import keras_squeeze as ks

        begin, end = cell.epoch_steps, cell.epoch_steps + cell.schedule_steps
        callbacks = [
            ks.MagnitudePruning(ks.schedules.PolynomialDecay(SPARSITY, begin=begin, end=end, frequency=cell.frequency))
        ]
    return _time_fit(keras, model, callbacks, cell, pruned)


def fit_tfmot(cell: Cell, pruned: bool) -> Times:
    """Trains in tf_keras, with or without tfmot's `prune_low_magnitude`."""
    os.environ["TF_USE_LEGACY_KERAS"] = "1"
    import tensorflow_model_optimization as tfmot
    import tf_keras

    tf_keras.backend.clear_session()
    tf_keras.utils.set_random_seed(0)
    model = _NETWORKS[cell.network](tf_keras)
    callbacks = []
    if pruned:
        sparsity = tfmot.sparsity.keras
        begin, end = cell.epoch_steps, cell.epoch_steps + cell.schedule_steps
        schedule = sparsity.PolynomialDecay(0.0, SPARSITY, begin, end, power=3, frequency=cell.frequency)
        model = sparsity.prune_low_magnitude(model, pruning_schedule=schedule)
        callbacks = [sparsity.UpdatePruningStep()]
    return _time_fit(tf_keras, model, callbacks, cell, pruned)


def _time_fit(keras, model, callbacks: list, cell: Cell, pruned: bool) -> Times:
    """Times one `fit` of a fresh model.

    The clock is read once, in an event that every `fit` has. An event for every batch would change how Keras
    treats its logs, and so what is measured.
    """
    model.compile(keras.optimizers.Adam(), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    images, labels = _data(cell)
    warm: list[float] = []

    def read_clock(epoch, logs):
        if epoch == 1:
            warm.append(time.perf_counter())

    clock = keras.callbacks.LambdaCallback(on_epoch_begin=read_clock)
    gc.collect()
    start = time.perf_counter()
    model.fit(
        images,
        labels,
        batch_size=cell.batch,
        epochs=1 + TIMED_EPOCHS,
        verbose=0,
        callbacks=[clock, *callbacks],
    )
    end = time.perf_counter()
    _check(model, pruned)
    return Times(end - warm[0], end - start)


def _check(model, pruned: bool) -> None:
    """A benchmark of pruning must have pruned."""
    kernels = [weight.numpy() for weight in model.trainable_weights if len(weight.shape) > 1]
    sparsity = 1 - sum(map(np.count_nonzero, kernels)) / sum(kernel.size for kernel in kernels)
    expected = SPARSITY if pruned else 0.0
    if abs(sparsity - expected) > 0.005:
        raise RuntimeError(f"The trained weights have a sparsity of {sparsity:.4f}, expected {expected}.")


@functools.lru_cache(maxsize=1)
def _data(cell: Cell):
    """One epoch of noise: the time of a step does not depend on what is learned."""
    rng = np.random.default_rng(0)
    count = cell.epoch_steps * cell.batch
    return rng.random((count, *_SHAPES[cell.network]), dtype="float32"), rng.integers(10, size=count)


def _mlp(keras):
    """784-1024-1024-10: 1.9 million weights."""
    return keras.Sequential(
        [
            keras.Input(_SHAPES["mlp"]),
            keras.layers.Dense(1024, activation="relu"),
            keras.layers.Dense(1024, activation="relu"),
            keras.layers.Dense(10),
        ]
    )


def _resnet8(keras):
    """Three residual blocks of 16, 32 and 64 filters, with batch normalization: 78 thousand weights."""

    def convolve(tensor, filters, size=3, strides=1):
        tensor = keras.layers.Conv2D(filters, size, strides, padding="same", use_bias=False)(tensor)
        return keras.layers.BatchNormalization()(tensor)

    inputs = keras.Input(_SHAPES["resnet8"])
    outputs = keras.layers.ReLU()(convolve(inputs, 16))
    for filters, strides in ((16, 1), (32, 2), (64, 2)):
        shortcut = outputs if strides == 1 else convolve(outputs, filters, 1, strides)
        outputs = keras.layers.ReLU()(convolve(outputs, filters, 3, strides))
        outputs = keras.layers.Add()([convolve(outputs, filters), shortcut])
        outputs = keras.layers.ReLU()(outputs)
    outputs = keras.layers.GlobalAveragePooling2D()(outputs)
    return keras.Model(inputs, keras.layers.Dense(10)(outputs))


_NETWORKS = {"mlp": _mlp, "resnet8": _resnet8}
