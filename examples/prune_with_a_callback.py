"""Prune a network while it trains, keep early stopping honest, and look at the result.

Run it with `python examples/prune_with_a_callback.py`, on scikit-learn's handwritten digits, or with
`--dataset mnist`, `fashion_mnist` or `cifar10`.
"""

import datasets
import keras

import keras_squeeze as ks

options = datasets.arguments(__doc__, epochs=20)
train, _ = datasets.load(options.dataset)

model = keras.Sequential(
    [
        keras.Input(train[0].shape[1:]),
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
callbacks = [pruning, ks.AfterTarget(stopping)]
model.fit(*train, validation_split=0.2, epochs=options.epochs, verbose=2, callbacks=callbacks)

print(ks.summarize(model))
