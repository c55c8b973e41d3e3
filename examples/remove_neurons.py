"""Remove half of a network's neurons while it trains, and measure what that brings.

Run it with `python examples/remove_neurons.py`; the data is scikit-learn's handwritten digits.
"""

import keras
import numpy as np
from sklearn.datasets import load_digits

import keras_squeeze as ks

data = load_digits()
images, labels = (data.images[..., np.newaxis] / 16).astype("float32"), data.target

inputs = keras.Input((8, 8, 1))
x = keras.layers.Conv2D(32, 3, padding="same", activation="relu")(inputs)
y = keras.layers.Conv2D(64, 3, padding="same", activation="relu")(x)
y = keras.layers.Conv2D(32, 3, padding="same", activation="relu")(y)
x = keras.layers.Add()([x, y])  # the neurons that a sum joins go together
x = keras.layers.Dense(64, activation="relu")(keras.layers.Flatten()(x))
model = keras.Model(inputs, keras.layers.Dense(10)(x))
model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])

pruning = ks.NeuronPruning(target_macs=0.3, criterion="taylor", data=(images[:512], labels[:512]))
model.fit(images, labels, validation_split=0.2, epochs=15, verbose=2, callbacks=[pruning])

small = ks.shrink(model)
small.fit(images, labels, validation_split=0.2, epochs=3, verbose=2)  # it is compiled; the optimizer goes on

print(f"before: {ks.measure_latency(model)}\nafter:  {ks.measure_latency(small)}")
print(ks.summarize(small))
