"""Criteria: weights (and gradients) -> one score per weight; the lowest scores are pruned first.

A new criterion is one registered subclass of `Criterion`; its snake-case name is how users name it.
"""

import contextlib
import re
import zlib
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from keras_squeeze import checks
from keras_squeeze.configurable import Configurable, resolve
from keras_squeeze.data import batches
from keras_squeeze.introspection.variables import read


class Criterion(Configurable):
    """Base class: scores every value of a weight; higher means keep.

    Attributes:
        needs_gradients: Whether `scores` wants the gradient of the loss, so that `data` must be given.
        num_batches: Batches of `data` that the gradient is averaged over; None for all.
        zero_is_lowest: Whether no score is ever below that of a weight that is zero. Where it is not so, the
            caller ranks zeros first, so that what is pruned stays pruned.
    """

    needs_gradients = False
    num_batches: int | None = None
    zero_is_lowest = False

    def scores(self, weight: np.ndarray, gradient: np.ndarray | None = None, path: str = "") -> np.ndarray:
        """Scores one weight.

        Args:
            weight: The values, of any shape.
            gradient: The gradient of the mean loss, of the same shape; None unless `needs_gradients`.
            path: Which weight this is.

        Returns:
            float32 array of the weight's shape.
        """
        raise NotImplementedError


@keras.saving.register_keras_serializable("keras_squeeze")
class Magnitude(Criterion):
    """`|w|` (Han et al. 2015)."""

    zero_is_lowest = True

    def scores(self, weight, gradient=None, path=""):
        return np.abs(weight).astype("float32", copy=False)


@keras.saving.register_keras_serializable("keras_squeeze")
class LAMP(Criterion):
    """`w_u^2 / sum of w_v^2 over all v with |w_v| >= |w_u|`: magnitude, comparable between layers.

    For `allocation="global"`: the largest weight of every layer scores 1, so no layer dies.

    Reference: Lee et al. 2021, "Layer-adaptive Sparsity for the Magnitude-based Pruning", equation 2,
        https://arxiv.org/abs/2010.07611
    """

    zero_is_lowest = True

    def scores(self, weight, gradient=None, path=""):
        squares = np.square(weight, dtype="float64").ravel()
        if not np.isfinite(squares.sum()):
            return np.full(np.shape(weight), np.nan, "float32")
        ascending = np.sort(squares)
        sum_from = np.cumsum(ascending[::-1])[::-1]
        denominators = sum_from[np.searchsorted(ascending, squares, side="left")]
        scores = np.divide(squares, denominators, out=np.zeros_like(squares), where=denominators > 0)
        return scores.astype("float32").reshape(np.shape(weight))


@keras.saving.register_keras_serializable("keras_squeeze")
class Random(Criterion):
    """Uniform noise, the baseline that every other criterion must beat; the same for a weight at every update.

    Args:
        seed: Integer.
    """

    def __init__(self, seed: int = 0):
        self.seed = checks.non_negative_int("seed", seed)

    def scores(self, weight, gradient=None, path=""):
        generator = np.random.default_rng([self.seed, zlib.crc32(path.encode())])
        return generator.random(np.shape(weight), dtype="float32")

    def get_config(self):
        return {"seed": self.seed}


class GradientCriterion(Criterion):
    """Base class of the criteria that use the gradient of the loss on `data`.

    Args:
        num_batches: Batches of `data` that every update averages the gradient over, at least 1; None for all.
    """

    needs_gradients = True

    def __init__(self, num_batches: int | None = 8):
        self.num_batches = checks.positive_int("num_batches", num_batches, optional=True)

    def get_config(self):
        return {"num_batches": self.num_batches}


@keras.saving.register_keras_serializable("keras_squeeze")
class Movement(GradientCriterion):
    """`-dL/dw * w`: keeps the weights that gradient descent moves away from zero.

    Reference: Sanh et al. 2020, "Movement Pruning", equation 4, https://arxiv.org/abs/2005.07683 (the gradient
        is taken on `data` at the update, not summed over training)
    """

    def scores(self, weight, gradient=None, path=""):
        return -np.multiply(weight, gradient, dtype="float32")


@keras.saving.register_keras_serializable("keras_squeeze")
class SNIP(GradientCriterion):
    """`|w * dL/dw|`: keeps the weights whose removal changes the loss most, to first order.

    Reference: Lee et al. 2019, "SNIP: Single-shot Network Pruning based on Connection Sensitivity", equation 5,
        https://arxiv.org/abs/1810.02340
    """

    def scores(self, weight, gradient=None, path=""):
        return np.abs(np.multiply(weight, gradient, dtype="float32"))


_BY_NAME = {
    re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower(): cls for cls in (Magnitude, LAMP, Random, Movement, SNIP)
}


def get(identifier) -> Criterion:
    """Turns a name, a config or a `Criterion` into a `Criterion`.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
        TypeError: something else.
    """
    return resolve("criterion", identifier, Criterion, _BY_NAME, "a name or a criterion from keras_squeeze.criteria")


def loss_gradients(
    model: keras.Model, variables: list, data, *, num_batches: int | None = 8, batch_size: int = 32
) -> list[np.ndarray]:
    """The gradient of a compiled model's loss with respect to variables, averaged over batches of `data`.

    The model runs in inference mode: no dropout, and batch normalization neither uses nor updates batch
    statistics.

    Args:
        model: A compiled model.
        variables: The `keras.Variable`s, trainable or not.
        data: `(x, y)` or `(x, y, sample_weight)` arrays (or nested structures of arrays), or a batched
            `tf.data.Dataset` or other iterable of batches.
        num_batches: Batches to use; None for all.
        batch_size: Samples per batch where `data` is arrays.

    Returns:
        One float32 array per variable.

    Raises:
        ValueError: the model is not compiled, `data` is missing or empty, or a variable does not affect the loss.
    """
    sums: list[Any] = [0.0] * len(variables)
    seen = 0
    for gradients in batch_gradients(model, variables, data, num_batches=num_batches, batch_size=batch_size):
        sums = [total + gradient for total, gradient in zip(sums, gradients, strict=True)]
        seen += 1
    return [np.asarray(total / seen, dtype="float32") for total in sums]


@contextlib.contextmanager
def preserve_metrics(model: keras.Model) -> Iterator[None]:
    """Restores the state of a model's metrics afterwards: computing the loss of several outputs updates it."""
    before = {id(variable): np.array(read(variable)) for variable in model.metrics_variables}
    try:
        yield
    finally:
        for variable in model.metrics_variables:
            variable.assign(before.get(id(variable), np.zeros(variable.shape)))


def batch_gradients(
    model: keras.Model, variables: list, data, *, num_batches: int | None = 8, batch_size: int = 32
) -> Iterator[list[np.ndarray]]:
    """The gradients of `loss_gradients`, batch by batch."""
    import tensorflow as tf

    if not getattr(model, "compiled", False):
        raise ValueError(
            f"Model '{model.name}' is not compiled, and a gradient criterion needs its loss. Call "
            "`model.compile(optimizer, loss)` first."
        )
    if data is None:
        raise ValueError(
            "This criterion uses gradients and needs `data`: pass data=(x, y) or data=dataset. Received: data=None"
        )
    with preserve_metrics(model):
        for x, y, sample_weight in batches(data, num_batches, batch_size):
            if y is None:
                raise ValueError("`data` has no targets, and a gradient criterion needs the loss. Pass data=(x, y).")
            with tf.GradientTape() as tape:
                watched = [variable.value for variable in variables]
                tape.watch(watched)
                loss = model.compute_loss(x, y, model(x, training=False), sample_weight)
            gradients = tape.gradient(loss, watched)
            unused = [v.path for v, gradient in zip(variables, gradients, strict=True) if gradient is None]
            if unused:
                raise ValueError(f"These weights do not affect the loss, so they have no gradient: {', '.join(unused)}")
            yield [np.asarray(tf.convert_to_tensor(gradient), dtype="float32") for gradient in gradients]
