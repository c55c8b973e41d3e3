"""Prune a network while it trains, keep early stopping honest, and look at the result.

Run it with `python examples/prune_with_a_callback.py`; the data is scikit-learn's handwritten digits.
"""

import keras
import numpy as np
from sklearn.datasets import load_digits

import keras_squeeze as ks

data = load_digits()
images, labels = (data.images[..., np.newaxis] / 16).astype("float32"), data.target

model = keras.Sequential(
    [
        keras.Input((8, 8, 1)),
        keras.layers.Conv2D(32, 3, activation="relu"),
        keras.layers.Flatten(),
        keras.layers.Dense(64, activation="relu"),
        keras.layers.Dense(10),
    ]
)
model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])

# Convolutions hold few weights and matter more, so they are pruned less.
pruning = ks.MagnitudePruning({"conv": 0.5, "dense": ks.schedules.PolynomialDecay(0.9, end=0.6)})
stopping = keras.callbacks.EarlyStopping("val_accuracy", patience=5, restore_best_weights=True)
model.fit(images, labels, validation_split=0.2, epochs=20, verbose=2, callbacks=[pruning, ks.AfterTarget(stopping)])

print(ks.summarize(model))
