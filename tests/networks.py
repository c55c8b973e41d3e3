"""Small networks and the measurements that several tests share."""

import keras
import numpy as np


def small_convnet(optimizer="adam", **compile_options) -> keras.Model:
    """A convolutional network for the digits, compiled; same initial weights every time."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(8, 3, activation="relu", name="conv"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.Flatten(name="flatten"),
            keras.layers.Dense(32, activation="relu", name="hidden"),
            keras.layers.Dense(10, name="logits"),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"], **compile_options)
    return model


def kernels(model) -> dict[str, np.ndarray]:
    """Every weight of the model that is called a kernel, by its path; found without this package's layer table."""
    return {v.path: v.numpy() for v in model.weights if v.name.endswith("kernel")}


def sparsity(model) -> float:
    """Fraction of zeros over all kernels."""
    arrays = kernels(model).values()
    return sum(int((a == 0).sum()) for a in arrays) / sum(a.size for a in arrays)


def masks(model) -> dict[str, np.ndarray]:
    return {path: kernel != 0 for path, kernel in kernels(model).items()}


def expected_zeros(model, target: float) -> int:
    """Zeros that uniform allocation asks for, from the definition: `round(n * (1 - s))` of n values stay."""
    return sum(a.size - max(round(a.size * (1 - target)), 1) for a in kernels(model).values())


def count_zeros(model) -> int:
    return sum(int((a == 0).sum()) for a in kernels(model).values())


class ZerosAtEveryStep(keras.callbacks.Callback):
    """Records the zeros of the model whenever another callback could see it."""

    def __init__(self):
        super().__init__()
        self.at_batch: list[int] = []
        self.at_epoch: list[int] = []
        self.in_logs: list[float] = []

    def on_train_batch_end(self, batch, logs=None):
        self.at_batch.append(count_zeros(self.model))
        self.in_logs.append(logs["sparsity"])

    def on_epoch_end(self, epoch, logs=None):
        self.at_epoch.append(count_zeros(self.model))
