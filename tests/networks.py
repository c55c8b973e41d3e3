"""Small networks and the measurements that several tests share."""

import keras
import numpy as np
import tensorflow as tf


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


def residual_convnet(optimizer="adam", **compile_options) -> keras.Model:
    """A residual network for the digits with batch normalization, one of it without scale; compiled."""
    keras.utils.set_random_seed(1)
    layers = keras.layers
    inputs = keras.Input((8, 8, 1))
    x = layers.Conv2D(16, 3, padding="same", use_bias=False, name="stem")(inputs)
    x = shortcut = layers.ReLU(name="relu")(layers.BatchNormalization(name="norm_1")(x))
    x = layers.Conv2D(32, 3, padding="same", name="inner")(x)
    x = layers.Activation("relu")(layers.BatchNormalization(scale=False, name="norm_2")(x))
    x = layers.Conv2D(16, 3, padding="same", name="outer")(x)
    x = layers.Add(name="add")([x, shortcut])
    x = layers.Flatten()(layers.MaxPooling2D(2)(x))
    x = layers.Dense(32, activation="sigmoid", name="hidden")(x)
    model = keras.Model(inputs, layers.Dense(10, name="logits")(x), name="residual")
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
    """Zeros that a target over all kernels asks for, from the definition: `round(n * (1 - s))` of n values stay."""
    size = sum(a.size for a in kernels(model).values())
    return size - round(size * (1 - target))


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
        self.in_logs.append(logs.get("sparsity"))

    def on_epoch_end(self, epoch, logs=None):
        self.at_epoch.append(count_zeros(self.model))


def two_devices() -> tf.distribute.Strategy:
    """Collectives serve models of one size only in a process, so none are used."""
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"], cross_device_ops=tf.distribute.ReductionToOneDevice())
