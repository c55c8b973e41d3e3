"""The runs of `fit` that `training_overhead.py` times, in Keras 3 and, with tfmot, in tf_keras.

Both sides get the same networks, data, seed, optimizer and steps between mask updates.
"""

import functools
import gc
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from networks import build_resnet8

SPARSITY = 0.9

_RUN_EXAMPLES = 10 * 50_000
_RUN_UPDATES = 100
_SCHEDULE_SHARE = 0.75
FIT_SHAPES = {"mlp": (784,), "resnet8": (32, 32, 3)}


@dataclass(frozen=True)
class Cell:
    """One row of the table: a network, a batch size, and how long to train.

    A real run is taken to be ten epochs over 50,000 examples, with a hundred mask updates in its first three quarters.
    What is timed is a stretch of it: epochs as long as it is between two updates, with one update in each.

    Attributes:
        network: `"mlp"` or `"resnet8"`.
        batch: Examples in a batch.
        updates: Epochs that are timed, and mask updates in them.
    """

    network: str
    batch: int
    updates: int

    @property
    def frequency(self) -> int:
        """Steps between two mask updates, and of an epoch."""
        return int(_RUN_EXAMPLES / self.batch * _SCHEDULE_SHARE) // _RUN_UPDATES

    @property
    def span(self) -> tuple[int, int]:
        """The steps at which the schedule begins, after the first epoch, and ends."""
        return self.frequency, self.frequency * (1 + self.updates)


Pair = tuple[float, float]
"""Seconds of one epoch, plain and pruned."""


def fit_keras(cell: Cell) -> list[Pair]:
    """Trains in Keras 3, with and without `MagnitudePruning`."""
    import keras

    import keras_squeeze as ks

    begin, end = cell.span
    schedule = ks.schedules.PolynomialDecay(SPARSITY, begin=begin, end=end, frequency=cell.frequency)
    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    plain, pruned = FIT_NETWORKS[cell.network](keras), FIT_NETWORKS[cell.network](keras)
    return fit_in_turn(keras, plain, pruned, ks.MagnitudePruning(schedule), cell)


def fit_tfmot(cell: Cell) -> list[Pair]:
    """Trains in tf_keras, with and without tfmot's `prune_low_magnitude`."""
    os.environ["TF_USE_LEGACY_KERAS"] = "1"
    import tensorflow_model_optimization as tfmot
    import tf_keras

    sparsity = tfmot.sparsity.keras
    tf_keras.backend.clear_session()
    tf_keras.utils.set_random_seed(0)
    plain, pruned = FIT_NETWORKS[cell.network](tf_keras), FIT_NETWORKS[cell.network](tf_keras)
    schedule = sparsity.PolynomialDecay(0.0, SPARSITY, *cell.span, power=3, frequency=cell.frequency)
    pruned = sparsity.prune_low_magnitude(pruned, pruning_schedule=schedule)
    return fit_in_turn(tf_keras, plain, pruned, sparsity.UpdatePruningStep(), cell)


def fit_in_turn(keras, plain, pruned, callback, cell: Cell) -> list[Pair]:
    """Runs two `fit`s at the same time, of which only one moves: they take turns, an epoch each.

    So what is compared is never more than an epoch apart, and a machine that is slower for a while is slower for both.
    The first epoch, which traces, is left out. The clock is read between epochs only: an event for every batch would
    change how Keras treats its logs, and so what is measured.
    """
    images, labels = _data(cell)
    turn = threading.Semaphore(1), threading.Semaphore(0)
    seconds: tuple[list[float], list[float]] = ([], [])

    def fit(side: int, model, callbacks: list) -> None:
        begun: list[float] = []

        def hand_over(*_) -> None:
            now = time.perf_counter()
            if begun:
                seconds[side].append(now - begun.pop())
                turn[1 - side].release()

        def take_over(*_) -> None:
            hand_over()
            turn[side].acquire()
            begun.append(time.perf_counter())

        clock = keras.callbacks.LambdaCallback(on_epoch_begin=take_over, on_train_end=hand_over)
        model.compile(keras.optimizers.Adam(), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        model.fit(
            images,
            labels,
            batch_size=cell.batch,
            epochs=1 + cell.updates,
            verbose=0,
            callbacks=[clock, *callbacks],
        )

    gc.collect()
    with ThreadPoolExecutor(2) as pool:
        for job in [pool.submit(fit, 0, plain, []), pool.submit(fit, 1, pruned, [callback])]:
            job.result()
    _check(plain, False)
    _check(pruned, True)
    return list(zip(*seconds, strict=True))[1:]


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
    count = cell.frequency * cell.batch
    return rng.random((count, *FIT_SHAPES[cell.network]), dtype="float32"), rng.integers(10, size=count)


def _mlp(keras):
    """784-1024-1024-10: 1.9 million weights."""
    return keras.Sequential(
        [
            keras.Input(FIT_SHAPES["mlp"]),
            keras.layers.Dense(1024, activation="relu"),
            keras.layers.Dense(1024, activation="relu"),
            keras.layers.Dense(10),
        ]
    )


def _resnet8(keras):
    """The network of the bars, for color pictures of 10 classes."""
    return build_resnet8(keras, FIT_SHAPES["resnet8"], classes=10)


FIT_NETWORKS = {"mlp": _mlp, "resnet8": _resnet8}
