"""Prune in a training loop of your own.

Run it with `python examples/custom_loop.py`; the data is scikit-learn's handwritten digits.
"""

import keras
import tensorflow as tf
from sklearn.datasets import load_digits

import keras_squeeze as ks

data = load_digits()
dataset = tf.data.Dataset.from_tensor_slices(((data.data / 16).astype("float32"), data.target))
dataset = dataset.shuffle(2000, seed=0).batch(64).repeat(10)

model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(128, activation="relu"), keras.layers.Dense(10)])
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
