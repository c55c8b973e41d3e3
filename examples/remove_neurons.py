"""Remove half of a network's neurons while it trains, and measure what that brings.

Run it with `python examples/remove_neurons.py`, on scikit-learn's handwritten digits, or with
`--dataset mnist`, `fashion_mnist` or `cifar10`.
"""

import datasets
import keras

import keras_squeeze as ks

options = datasets.arguments(__doc__, epochs=15)
train, _ = datasets.load(options.dataset)

inputs = keras.Input(train[0].shape[1:])
x = keras.layers.Conv2D(32, 3, padding="same", activation="relu")(inputs)
y = keras.layers.Conv2D(64, 3, padding="same", activation="relu")(x)
y = keras.layers.Conv2D(32, 3, padding="same", activation="relu")(y)
x = keras.layers.Add()([x, y])  # the neurons that a sum joins go together
x = keras.layers.Dense(64, activation="relu")(keras.layers.Flatten()(x))
model = keras.Model(inputs, keras.layers.Dense(10)(x))
model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])

pruning = ks.NeuronPruning(target_macs=0.3, criterion="taylor", data=(train[0][:512], train[1][:512]))
model.fit(*train, validation_split=0.2, epochs=options.epochs, verbose=2, callbacks=[pruning])

small = ks.shrink(model)
# It is compiled, and the optimizer goes on.
small.fit(*train, validation_split=0.2, epochs=(options.epochs + 4) // 5, verbose=2)

print(f"before: {ks.measure_latency(model)}\nafter:  {ks.measure_latency(small)}")
print(ks.summarize(small))
