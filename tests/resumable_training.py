"""A training script that can be killed: run by test_resume.py in a process of its own.

Usage: resumable_training.py FOLDER SAVE_FREQ KILL_AFTER_BATCHES weights|neurons|snip|budget
(kill after 0 batches: run to the end, and write final.npz)
"""

import os
import pathlib
import signal
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from networks import ZerosAtEveryStep, kernels, residual_convnet, small_convnet
from sklearn.datasets import load_digits

import keras_squeeze as ks

BATCHES_PER_EPOCH, EPOCHS, TARGET = 15, 4, 0.8


class Kill(keras.callbacks.Callback):
    def __init__(self, after):
        super().__init__()
        self.left = after

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder, save_freq, kill_after, kind):
    folder = pathlib.Path(folder)
    data = load_digits()
    images = (data.images[: 64 * BATCHES_PER_EPOCH, ..., np.newaxis] / 16).astype("float32")
    dataset = tf.data.Dataset.from_tensor_slices((images, data.target[: len(images)])).batch(64)
    model = (small_convnet if kind in ("weights", "snip") else residual_convnet)()
    zeros = ZerosAtEveryStep()
    backup = keras.callbacks.BackupAndRestore(folder / "backup", save_freq if save_freq == "epoch" else int(save_freq))
    schedule = ks.schedules.PolynomialDecay(TARGET, frequency=7)
    pruning = {
        "weights": lambda: ks.MagnitudePruning(schedule, allocation="uniform"),
        "neurons": lambda: ks.NeuronPruning(schedule),
        "snip": lambda: ks.MagnitudePruning(schedule, criterion="snip"),
        "budget": lambda: ks.NeuronPruning(target_params=0.4, allocation="global", round_to=1),
    }[kind]()
    callbacks = [pruning, backup, zeros] + ([Kill(kill_after)] if kill_after else [])
    model.fit(dataset, epochs=EPOCHS, verbose=0, shuffle=False, callbacks=callbacks)
    values = {path.replace("/", "."): kernel for path, kernel in kernels(model).items()}
    statistics = {v.path.replace("/", "."): v.numpy() for v in model.weights if v.name.startswith("moving_")}
    np.savez(folder / "final.npz", zeros=zeros.at_batch, **values, **statistics)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
