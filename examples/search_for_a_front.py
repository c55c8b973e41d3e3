"""Search for the best trade-offs between accuracy and size, and take the best model that fits.

Run it with `python examples/search_for_a_front.py`, on scikit-learn's handwritten digits, or with
`--dataset mnist`, `fashion_mnist` or `cifar10`. Run again in the same folder, it goes on where it was, or
shows what was found.
"""

import datasets
import keras

import keras_squeeze as ks

options = datasets.arguments(__doc__, epochs=4, trials=12)
(images, labels), test = datasets.load(options.dataset)
held_out = len(images) // 5  # the search looks at these again and again, so the test data are kept for the end
train, validation = (images[held_out:], labels[held_out:]), (images[:held_out], labels[:held_out])

keras.utils.set_random_seed(0)
model = keras.Sequential(
    [
        keras.Input(images.shape[1:]),
        keras.layers.Conv2D(16, 3, padding="same", activation="relu"),
        keras.layers.Conv2D(32, 3, activation="relu"),
        keras.layers.Flatten(),
        keras.layers.Dense(64, activation="relu"),
        keras.layers.Dense(10),
    ]
)
model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
model.fit(*train, epochs=3 * options.epochs, verbose=0)

space = ks.CompressionSpace(neurons=(0.0, 0.7), sparsity=(0.0, 0.9), bits=(8, 4, 2))
hyper = ks.CompressionHyperModel(model, space, metric="accuracy", artifact="packed")  # size_bytes: of the packed file
oracle = ks.ParetoOracle(["val_accuracy", "size_bytes"], max_trials=options.trials, seed=0)
tuner = ks.CompressionTuner(hyper, oracle=oracle, directory="search")
tuner.search(*train, validation_data=validation, epochs=options.epochs)

tuner.results_summary()
tuner.plot_pareto("front.png")
budget = ks.save_packed(model, "before.squeeze") // 5
best = tuner.best(max_size_bytes=budget)
print(f"The best with at most {budget:,} bytes: {best}")

small = best.load_model()
print(f"On the test data: {(small.predict(test[0], verbose=0).argmax(-1) == test[1]).mean():.1%}")
print(ks.summarize(small))
