"""A program written for tfmot, with one import changed; and a trained tf_keras model brought over.

Run it with `python examples/migrating_from_tfmot.py`; the data is scikit-learn's handwritten digits. Old and new calls
side by side are in `examples/migrating_from_tfmot.md`.
"""

import importlib.util

import keras
import numpy as np
from sklearn.datasets import load_digits

import keras_squeeze as ks

# import tensorflow_model_optimization as tfmot
from keras_squeeze import tfmot_compat as tfmot

data = load_digits()
images, labels = (data.images[..., np.newaxis] / 16).astype("float32"), data.target
train, test = (images[500:], labels[500:]), (images[:500], labels[:500])


def network(library):
    layers = library.layers
    return library.Sequential(
        [
            library.Input((8, 8, 1)),
            layers.Conv2D(16, 3, activation="relu"),
            layers.Flatten(),
            layers.Dense(32, activation="relu"),
            layers.Dense(10),
        ]
    )


def train_on(title, model, epochs, library=keras, **options):
    loss = library.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"])
    model.fit(*train, epochs=epochs, verbose=0, **options)
    print(f"{title}: {model.evaluate(*test, verbose=0)[1]:.1%}")


model = network(keras)
train_on("dense", model, 10)

# Pruning. Steps: 10 epochs of 41 batches.
schedule = tfmot.sparsity.keras.PolynomialDecay(0.0, 0.8, begin_step=0, end_step=300, frequency=10)
pruned = tfmot.sparsity.keras.prune_low_magnitude(model, pruning_schedule=schedule)
train_on("pruned", pruned, 10, callbacks=[tfmot.sparsity.keras.UpdatePruningStep()])
final = tfmot.sparsity.keras.strip_pruning(pruned)
print(ks.summarize(final))

# Quantization-aware training that keeps the zeros.
annotated = tfmot.quantization.keras.quantize_annotate_model(final)
q = tfmot.quantization.keras.quantize_apply(
    annotated, tfmot.experimental.combine.Default8BitPrunePreserveQuantizeScheme()
)
train_on("pruned and quantized", q, 3)
print(ks.summarize(q))
print(ks.export(q, "digits.tflite", calibration_data=test[0]))

# A model that was trained in tf_keras; a path of an .h5, a .keras or a SavedModel does as well.
if importlib.util.find_spec("tf_keras"):
    import tf_keras

    old = network(tf_keras)
    train_on("in tf_keras", old, 5, tf_keras)
    new = tfmot.from_tf_keras(old)
    difference = np.abs(new.predict(test[0], verbose=0) - old.predict(test[0], verbose=0)).max()
    print(f"largest difference after the move: {difference:.2g}")

# The native way is shorter: no wrappers, nothing to strip, the model stays the model.
native = network(keras)
train_on("pruned by the callback alone", native, 20, callbacks=[ks.MagnitudePruning(0.8)])
