"""Train a network for integers, and ship the integers.

Run it with `python examples/quantize_while_training.py`, on scikit-learn's handwritten digits, or with
`--dataset mnist`, `fashion_mnist` or `cifar10`.
"""

import pathlib
import tempfile

import datasets
import keras

import keras_squeeze as ks

options = datasets.arguments(__doc__, epochs=10)
train, test = datasets.load(options.dataset)

layers = keras.layers
model = keras.Sequential(
    [
        keras.Input(train[0].shape[1:]),
        layers.Conv2D(32, 3, padding="same", use_bias=False),
        layers.BatchNormalization(),
        layers.ReLU(),
        layers.Conv2D(32, 3, use_bias=False),
        layers.BatchNormalization(),
        layers.ReLU(),
        layers.MaxPooling2D(),
        layers.Flatten(),
        layers.Dense(10),
    ]
)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile("adam", loss, metrics=["accuracy"])
model.fit(*train, epochs=options.epochs, verbose=0)
print(f"float: {model.evaluate(*test, verbose=0)[1]:.1%}")

# A copy whose weights and activations are rounded while it trains on.
q = ks.quantize_aware(model)  # or weights="int4", "ternary", "binary", ks.quantizers.LearnedStep(4), ...
q.compile("adam", loss, metrics=["accuracy"])
q.fit(*train, epochs=(options.epochs + 1) // 2, verbose=2, callbacks=[ks.QuantizationSchedule(delay=0.1, freeze=0.8)])
print(f"8 bits: {q.evaluate(*test, verbose=0)[1]:.1%}")
print(ks.summarize(q))

# The file that ships: these integers, checked against `q`.
folder = pathlib.Path(tempfile.mkdtemp())
print(ks.export(model, folder / "float.tflite"))
print(ks.export(q, folder / "int8.tflite", calibration_data=train[0]))

# Binary weights and inputs (XNOR-Net) want this order: batch norm, sign, convolution, pooling.
xnor = keras.Sequential(
    [
        keras.Input(train[0].shape[1:]),
        layers.Conv2D(32, 3, padding="same", use_bias=False),
        layers.BatchNormalization(),
        layers.Conv2D(64, 3, use_bias=False),
        layers.MaxPooling2D(),
        layers.BatchNormalization(),
        layers.Flatten(),
        layers.Dense(10),
    ]
)
xnor = ks.quantize_aware(xnor, "xnor")  # the first and the last layer keep 8 bits
xnor.compile("adam", loss, metrics=["accuracy"])
xnor.fit(*train, epochs=2 * options.epochs, verbose=0)
print(f"XNOR-Net: {xnor.evaluate(*test, verbose=0)[1]:.1%}, {ks.summarize(xnor).total.bits} bits a weight")
