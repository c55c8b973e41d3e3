"""`recalibrate_batch_norm`: the moving statistics of batch normalization, measured anew on data."""

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from keras_squeeze import checks
from keras_squeeze.data import batches, inputs_only
from keras_squeeze.introspection.variables import read
from keras_squeeze.training.batch_norm import Moments, StatisticsCall, find_batch_norms
from keras_squeeze.training.moving_statistics import warn_of_ignored

_BATCH_SIZE = 128


def recalibrate_batch_norm(model: keras.Model, data, *, max_examples: int | None = 1024) -> dict[str, float]:
    """Measures the moving statistics of batch normalization anew, in place.

    Use it after anything that changed the network without training it long enough: one-shot pruning, a short
    fine-tuning, weights of another origin. All layers are measured in the same pass, each on inputs that the layers
    before it normalized by the batch; dropout is off. A layer's mean and variance are those over all examples (and
    positions), padding left out where the layer gets a mask.

    Args:
        model: A built Keras model; it need not be compiled. Frozen layers, layers that training calls in inference
            mode, and subclasses with a `call` of their own stay as they are.
        data: Inputs: arrays or tensors, `(x, y)` (targets are not used), nested structures of them, or a dataset of
            batches. Arrays are taken in batches of 128, datasets in their own: use large ones.
        max_examples: The most examples to use, at least 1; None for all.

    Returns:
        `{path of a layer: largest change}`, over its channels and both statistics: the shift of the mean in standard
        deviations, or the relative change of the standard deviation. Empty for a model without batch normalization.

    Raises:
        TypeError, ValueError: `model` is not a built model, or data that is empty or not finite; the statistics are
            then as they were.

    Example:

    ```python
    ks.prune_weights(model, 0.8)
    ks.recalibrate_batch_norm(model, x_train)
    model.evaluate(x_test, y_test)
    ```
    """
    _check_recalibration(model, data, max_examples)
    layers, ignored = find_batch_norms(model)
    warn_of_ignored(model, ignored)
    examples = _first_examples(batches(inputs_only(model, data), None, _BATCH_SIZE), max_examples)
    if not layers:
        next(examples)  # data that cannot be read is an error here, too
        return {}
    before = {path: (np.array(read(x.moving_mean)), np.array(read(x.moving_variance))) for path, x in layers.items()}
    calls = {path: StatisticsCall.of(layer) for path, layer in layers.items()}
    measured: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    try:
        for index, x in enumerate(examples):
            if index == 0:
                _mark_trained(model, x, calls)
            model(x, training=False)
        results = {
            path: call.moments.result() for path, call in calls.items() if call.moments and call.moments.is_known
        }
        _check_finite(results)
        measured = results
    finally:
        for path, call in calls.items():
            mean, variance = measured.get(path, before[path])
            layers[path].moving_mean.assign(mean)
            layers[path].moving_variance.assign(variance)
            call.moments = None
            call.release()
    return {path: _change(*before[path], *now, layers[path].epsilon) for path, now in measured.items()}


def _check_recalibration(model, data, max_examples) -> None:
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a `keras.Model`. Received: {model!r}")
    if not model.built:
        raise ValueError(f"Model '{model.name}' is not built: call it on a batch of data first.")
    if data is None:
        raise ValueError("The statistics are measured on `data`: pass inputs `x`, (x, y) or a dataset. Received: None")
    checks.positive_int("max_examples", max_examples, optional=True)


def _check_finite(measured) -> None:
    bad = [path for path, moments in measured.items() if not all(np.isfinite(part).all() for part in moments)]
    if bad:
        raise ValueError(
            f"The inputs of these layers are NaN or infinite on `data`: {', '.join(bad)}. Check the values of `data` "
            "and the weights. The statistics are as they were."
        )


def _first_examples(triples, max_examples: int | None) -> Iterator[Any]:
    """The inputs of batches, as many examples as wanted."""
    remaining = max_examples
    for x, _, _ in triples:
        size = int(keras.tree.flatten(x)[0].shape[0])
        if remaining is not None and size > remaining:
            x, size = keras.tree.map_structure(lambda array, count=remaining: array[:count], x), remaining
        yield x
        remaining = None if remaining is None else remaining - size
        if remaining == 0:
            return


def _mark_trained(model, x, calls: dict[str, StatisticsCall]) -> None:
    """Measures only layers that training calls in training mode. Leaves no trace: nothing is assigned in the scope."""
    few = keras.tree.map_structure(lambda array: array[:2], x)
    for call in calls.values():
        call.trained = []
    with keras.StatelessScope():
        model(few, training=True)
    for call in calls.values():
        call.moments = Moments() if any(call.trained) else None


def _change(old_mean, old_variance, mean, variance, epsilon: float) -> float:
    deviation, old_deviation = np.sqrt(variance + epsilon), np.sqrt(old_variance + epsilon)
    shift = np.max(np.abs(mean - old_mean) / deviation)
    return float(max(shift, np.max(np.abs(old_deviation / deviation - 1.0))))
