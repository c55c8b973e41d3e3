"""A small search on the digits that several tests run, in this process or, as a script, in processes of their own."""

import os
import pathlib
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras

import keras_squeeze as ks

EPOCHS = 2


def data():
    """`(train, validation)` of the digits, as vectors."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = (digits.data / 16).astype("float32"), digits.target.astype("int32")
    return (x[:500], y[:500]), (x[500:900], y[500:900])


def network(epochs: int = 8) -> keras.Model:
    """A small trained network; the same in every process."""
    keras.utils.set_random_seed(7)
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(32, activation="relu", name="first"),
            keras.layers.Dense(16, activation="relu", name="second"),
            keras.layers.Dense(10, name="logits"),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.003), loss, metrics=["accuracy"])
    model.fit(*data()[0], epochs=epochs, verbose=0)
    return model


def space() -> ks.CompressionSpace:
    return ks.CompressionSpace(neurons=(0.0, 0.6), sparsity=(0.0, 0.9), bits=(8, 4, 1))


def tuner(directory, max_trials: int, **options) -> ks.CompressionTuner:
    hyper = ks.CompressionHyperModel(network(), space(), metric="accuracy", artifact="packed")
    oracle = ks.ParetoOracle(["val_accuracy", "size_bytes"], max_trials, seed=3)
    return ks.CompressionTuner(hyper, oracle, directory=directory, **options)


class Told(keras.callbacks.Callback):
    """Leaves a file where a trial trains, and waits, so that a test can kill the process in the middle."""

    def __init__(self, path: str, seconds: float):
        super().__init__()
        self.path, self.seconds = path, seconds

    def on_train_begin(self, logs=None):
        pathlib.Path(self.path).write_text(str(os.getpid()))
        time.sleep(self.seconds)


def main() -> None:
    """`python search_tasks.py DIRECTORY MAX_TRIALS SECONDS`: searches; waits in each training."""
    directory, max_trials, seconds = sys.argv[1:]
    search = tuner(directory, int(max_trials), dead_after=6.0)
    train, validation = data()
    name = os.environ.get("KERASTUNER_TUNER_ID", "alone")
    told = Told(str(pathlib.Path(directory, f"{name}.running")), float(seconds))
    search.search(*train, validation_data=validation, epochs=EPOCHS, callbacks=[told])


if __name__ == "__main__":
    main()
