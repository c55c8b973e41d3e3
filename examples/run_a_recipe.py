"""Write a plan of compression down, run it, and compare what comes out.

Run it with `python examples/run_a_recipe.py`, on scikit-learn's handwritten digits, or with
`--dataset mnist`, `fashion_mnist` or `cifar10`. In a shell, `keras-squeeze run recipe.yaml model.keras --data
data.npz --directory out` does the same.
"""

import datasets
import keras

import keras_squeeze as ks
from keras_squeeze.recipes import steps

options = datasets.arguments(__doc__, epochs=15)
train, test = datasets.load(options.dataset)

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
model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
model.fit(*train, epochs=options.epochs, verbose=2)

# Each step gets its share of the epochs; a regular expression says which layers it is about.
recipe = ks.Recipe(
    [
        steps.PruneNeurons(0.5, share=2),
        steps.PruneWeights({"conv": 0.4, "dense": 0.8}, share=2),
        steps.Quantize({r"dense_1$": "int8", "": "int4"}),
        steps.FineTune(distillation=0.5),
        steps.Export("small.tflite", allow_float=True),
        steps.Export("small.squeeze"),
    ]
)
print(recipe)
recipe.save("recipe.yaml")  # or .json; ks.Recipe.load reads both

small = recipe.fit(model, *train, epochs=2 * options.epochs, validation_data=test, verbose=2)
print(ks.summarize(small))  # sparsity, bits and bytes of every layer
print(ks.compare({"before": model, "small": "small.tflite", "packed": "small.squeeze"}, data=test))
