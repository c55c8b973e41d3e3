"""Quantization-aware training that can be killed: run by test_quantization_fit.py in a process of its own.

Usage: resumable_quantization.py FOLDER SAVE_FREQ KILL_AFTER_BATCHES
(kill after 0 batches: run to the end, and write final.npz)
"""

import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from networks import small_convnet
from resumable_training import Kill
from sklearn.datasets import load_digits

import keras_squeeze as ks

BATCHES_PER_EPOCH, EPOCHS = 8, 4
BITS = [8, 6, 4]
DELAY, RAMP, FREEZE = 6, 14, 28


class Logs(keras.callbacks.Callback):
    """What the schedule writes to the logs of every batch."""

    def __init__(self):
        super().__init__()
        self.quantized, self.num_bits = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.quantized.append(logs["quantized"])
        self.num_bits.append(logs["num_bits"])


def main(folder, save_freq, kill_after):
    folder = pathlib.Path(folder)
    data = load_digits()
    images = (data.images[: 32 * BATCHES_PER_EPOCH, ..., np.newaxis] / 16).astype("float32")
    dataset = tf.data.Dataset.from_tensor_slices((images, data.target[: len(images)])).batch(32)
    model = small_convnet()
    quantized = ks.quantize_aware(model, {"hidden": ks.quantizers.LearnedStep(BITS[0]), ".": f"int{BITS[0]}"})
    quantized.compile("adam", model.loss, jit_compile=False)
    logs = Logs()
    backup = keras.callbacks.BackupAndRestore(folder / "backup", save_freq if save_freq == "epoch" else int(save_freq))
    schedule = ks.QuantizationSchedule(DELAY, FREEZE, BITS, ramp=RAMP)
    callbacks = [schedule, backup, logs] + ([Kill(kill_after)] if kill_after else [])
    quantized.fit(dataset, epochs=EPOCHS, verbose=0, shuffle=False, callbacks=callbacks)
    variables = {f"{index} {v.path}".replace("/", "."): v.numpy() for index, v in enumerate(quantized.variables)}
    np.savez(folder / "final.npz", quantized=logs.quantized, num_bits=logs.num_bits, **variables)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
