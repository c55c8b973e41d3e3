"""Remove neurons, quantize, and ship: a file for LiteRT and a packed file, compared with what they came from.

Run it with `python examples/ship_small_files.py`; the data is scikit-learn's handwritten digits.
"""

import keras
import numpy as np
from sklearn.datasets import load_digits

import keras_squeeze as ks

data = load_digits()
images, labels = (data.images[..., np.newaxis] / 16).astype("float32"), data.target
train, test = (images[:1300], labels[:1300]), (images[1300:], labels[1300:])
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

model = keras.Sequential(
    [
        keras.Input((8, 8, 1)),
        keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
        keras.layers.Conv2D(64, 3, activation="relu"),
        keras.layers.Flatten(),
        keras.layers.Dense(64, activation="relu"),
        keras.layers.Dense(10),
    ]
)
for sentence in ks.advise(model, {"neurons": 0.5, "weights": "int8", "activations": "int8"}):
    print("*", sentence)
model.compile("adam", loss, metrics=["accuracy"])
model.fit(*train, epochs=10, verbose=2)

pruned = keras.models.clone_model(model)
pruned.set_weights(model.get_weights())
pruned.compile("adam", loss, metrics=["accuracy"])
pruned.fit(*train, epochs=10, verbose=2, callbacks=[ks.NeuronPruning(0.5)])

small = ks.quantize_aware(ks.shrink(pruned))
small.compile("adam", loss, metrics=["accuracy"])
small.fit(*train, epochs=5, verbose=2, callbacks=[ks.QuantizationSchedule()])

print(ks.export(small, "digits.tflite"))
print(f"digits.squeeze: {ks.save_packed(small, 'digits.squeeze'):,} bytes")
print(ks.summarize(small))  # sparsity, bits and bytes of every layer

table = ks.compare({"float": model, "small": "digits.tflite", "packed": "digits.squeeze"}, data=test)
print(table)
table.plot("compared.png")
