"""Remove neurons, quantize, and ship: a file for LiteRT and a packed file, compared with what they came from.

Run it with `python examples/ship_small_files.py`, on scikit-learn's handwritten digits, or with
`--dataset mnist`, `fashion_mnist` or `cifar10`.
"""

import datasets
import keras

import keras_squeeze as ks

options = datasets.arguments(__doc__, epochs=10)
train, test = datasets.load(options.dataset)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

model = keras.Sequential(
    [
        keras.Input(train[0].shape[1:]),
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
model.fit(*train, epochs=options.epochs, verbose=2)

pruned = keras.models.clone_model(model)
pruned.set_weights(model.get_weights())
pruned.compile("adam", loss, metrics=["accuracy"])
pruned.fit(*train, epochs=options.epochs, verbose=2, callbacks=[ks.NeuronPruning(0.5)])

small = ks.quantize_aware(ks.shrink(pruned))
small.compile("adam", loss, metrics=["accuracy"])
small.fit(*train, epochs=(options.epochs + 1) // 2, verbose=2, callbacks=[ks.QuantizationSchedule()])

print(ks.export(small, "small.tflite"))
print(f"small.squeeze: {ks.save_packed(small, 'small.squeeze'):,} bytes")
print(ks.summarize(small))  # sparsity, bits and bytes of every layer

table = ks.compare({"float": model, "small": "small.tflite", "packed": "small.squeeze"}, data=test)
print(table)
table.plot("compared.png")
