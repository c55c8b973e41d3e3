"""Prune in a training loop of your own.

Run it with `python examples/custom_loop.py`, on scikit-learn's handwritten digits, or with
`--dataset mnist`, `fashion_mnist` or `cifar10`.
"""

import datasets
import keras
import tensorflow as tf

import keras_squeeze as ks

options = datasets.arguments(__doc__, epochs=10)
(images, labels), _ = datasets.load(options.dataset)
dataset = tf.data.Dataset.from_tensor_slices((images, labels))
dataset = dataset.shuffle(2000, seed=0).batch(64).repeat(options.epochs)

layers = keras.layers
model = keras.Sequential(
    [keras.Input(images.shape[1:]), layers.Flatten(), layers.Dense(128, activation="relu"), layers.Dense(10)]
)
optimizer = keras.optimizers.Adam()
loss_function = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

pruning = ks.MagnitudePruning(0.9)
pruning.attach(model, optimizer, total_steps=len(dataset))  # before the training step is traced


@tf.function
def train_step(x, y):
    with tf.GradientTape() as tape:
        loss = loss_function(y, model(x, training=True))
    gradients = tape.gradient(loss, model.trainable_variables)
    optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
    return loss


for step, (x, y) in enumerate(dataset, start=1):
    loss = train_step(x, y)
    pruning.update(step)
    if step % 50 == 0:
        print(f"step {step}: loss {float(loss):.3f}, sparsity {pruning.sparsity:.1%}")

pruning.detach()
print(ks.summarize(model))
