"""How good the answers of a `.tflite` file are: what it predicts on a user's data, and the metric of that."""

import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_squeeze.data import batches
from keras_squeeze.deployment.inspecting import predict_file

_BATCH = 128
_ACCURACY = "accuracy"

Judge = Callable[[Any, Any], tuple[str, float]]
"""From targets and predictions to the name of a metric and its value."""


def find_judge(metric=None) -> Judge:
    """What judges predictions.

    Args:
        metric: None: the fraction of right answers or, for targets that are no classes, the mean absolute error.
            `"accuracy"`: the former; another string: the Keras metric or loss of that name. Or a
            `keras.metrics.Metric`, a `keras.losses.Loss`, or any function `(y_true, y_pred) -> number`.

    Raises:
        ValueError: there is no such metric.
    """
    if metric is None:
        return _by_kind_of_target
    if metric in (_ACCURACY, "acc"):
        return _accuracy_or_error
    if isinstance(metric, str):
        metric = _keras_metric(metric)
    if isinstance(metric, keras.metrics.Metric):
        return functools.partial(_by_metric, metric)
    if not callable(metric):
        raise ValueError(
            "`metric` must be None, the name of a Keras metric or loss, or a function (y_true, y_pred) -> number. "
            f"Received: metric={metric!r}"
        )
    return functools.partial(_by_function, metric)


def predictions(path, data, on_examples: Callable[[int], None] = lambda number: None) -> tuple[Any, list[np.ndarray]]:
    """What LiteRT computes for all the data.

    Args:
        path: A `.tflite` file.
        data: `(x, y)` or batches of it.
        on_examples: Called with the number of examples that were done.

    Returns:
        `y`, and an array for each output.

    Raises:
        ValueError: the data has no targets, or does not fit the file.
    """
    names = _input_names(path)
    targets, outputs = [], []
    for x, y, weights in batches(data, None, _BATCH):
        if y is None or weights is not None:
            received = "inputs alone" if y is None else "sample weights as well"
            raise ValueError(f"`data` must be inputs and targets: (x, y), or batches of that. Received: {received}")
        arrays = _inputs(x, names)
        try:
            outputs.append(predict_file(path, arrays))
        except (ValueError, RuntimeError) as error:
            shapes = ", ".join(str(array.shape) for array in arrays)
            raise ValueError(f"The inputs do not fit: {error}. Received: a batch of shape {shapes}") from None
        targets.append(keras.tree.map_structure(keras.ops.convert_to_numpy, y))
        on_examples(len(arrays[0]))
    y_true = keras.tree.map_structure(lambda *parts: np.concatenate(parts), *targets)
    return y_true, [np.concatenate(parts) for parts in zip(*outputs, strict=True)]


def _input_names(path) -> list[str]:
    """What a file calls its inputs, without what TensorFlow puts around a name."""
    from ai_edge_litert.interpreter import Interpreter

    details = Interpreter(str(path)).get_input_details()
    return [detail["name"].removeprefix("serving_default_").removesuffix(":0") for detail in details]


def _inputs(x, names: list[str]) -> list[np.ndarray]:
    """A batch as an array for each input: a dict by the names of the inputs or, where it has others, by its keys."""
    by_name = isinstance(x, dict) and set(x) == set(names)
    parts = [x[name] for name in names] if by_name else keras.tree.flatten(x)  # as Keras flattens a model's inputs
    if len(parts) != len(names):
        raise ValueError(f"Expected {len(names)} inputs: {', '.join(names)}. Received: {len(parts)}")
    return [keras.ops.convert_to_numpy(part) for part in parts]


def _by_kind_of_target(y_true, y_pred) -> tuple[str, float]:
    """The fraction of right answers or, for targets that are no classes, the mean absolute error."""
    if not isinstance(y_true, np.ndarray) or not isinstance(y_pred, np.ndarray):
        raise ValueError("For several outputs or targets, say how to judge them: metric=function(y_true, y_pred).")
    truth = _without_last(y_true) if y_true.ndim == y_pred.ndim and y_true.shape != y_pred.shape else y_true
    if truth.shape == y_pred.shape[:-1] and y_pred.shape[-1] > 1:
        if (truth != np.round(truth)).any():
            raise ValueError(
                f"The targets of shape {y_true.shape} are no classes, and the outputs of shape {y_pred.shape} are "
                "several numbers each: pass `metric`."
            )
        return _ACCURACY, float(np.mean(y_pred.argmax(-1) == truth))
    truth, guess = _without_last(y_true), _without_last(y_pred)
    if truth.shape != guess.shape:
        raise ValueError(f"Targets of shape {y_true.shape} do not fit outputs of shape {y_pred.shape}: pass `metric`.")
    if not np.isin(truth, (0, 1)).all():
        return "mean absolute error", float(np.mean(np.abs(guess.astype("float64") - truth)))
    if truth.ndim > 1 and (truth.sum(-1) == 1).all():
        return _ACCURACY, float(np.mean(guess.argmax(-1) == truth.argmax(-1)))
    is_probability = guess.min() >= 0 and guess.max() <= 1
    return _ACCURACY, float(np.mean((guess > (0.5 if is_probability else 0)) == truth))


def _accuracy_or_error(y_true, y_pred) -> tuple[str, float]:
    name, value = _by_kind_of_target(y_true, y_pred)
    if name != _ACCURACY:
        raise ValueError(
            f"The targets are no classes, so there is no accuracy. Received: targets of type {y_true.dtype} and shape "
            f"{y_true.shape}. Leave out `metric`, or pass another one."
        )
    return name, value


def _by_metric(metric: keras.metrics.Metric, y_true, y_pred) -> tuple[str, float]:
    def call(y_true, y_pred):
        metric.reset_state()
        metric.update_state(y_true, y_pred)
        return metric.result()

    return str(metric.name), _number(str(metric.name), _called(call, str(metric.name), y_true, y_pred))


def _by_function(function, y_true, y_pred) -> tuple[str, float]:
    name = str(getattr(function, "name", None) or getattr(function, "__name__", type(function).__name__))
    name = "metric" if name == "<lambda>" else name
    return name, _number(name, _called(function, name, y_true, y_pred))


def _called(function, name: str, y_true, y_pred):
    try:
        return function(y_true, y_pred)
    except Exception as problem:  # TensorFlow's own, of shapes that do not fit, among them
        shapes = " and ".join(str(getattr(part, "shape", type(part).__name__)) for part in (y_true, y_pred))
        raise ValueError(
            f"The metric {name} cannot be computed: {' '.join(str(problem).split())[:200]}. Received: targets and "
            f"outputs of shape {shapes}"
        ) from None


def _number(name: str, value) -> float:
    """Keras's losses, as functions, give a number for every example: then their mean."""
    try:
        return float(np.mean(keras.ops.convert_to_numpy(value)))
    except (TypeError, ValueError):
        raise ValueError(f"`metric` must give a number. Received from {name}: {value!r}") from None


def _keras_metric(name: str):
    for get in (keras.metrics.get, keras.losses.get):
        try:
            return get(name)
        except (ValueError, TypeError):  # not known, or not without arguments
            continue
    raise ValueError(
        f"There is no Keras metric or loss of this name that needs no arguments. Received: metric={name!r}. Names are "
        'such as "mean_squared_error" or "AUC"; or pass the metric itself.'
    )


def _without_last(array: np.ndarray) -> np.ndarray:
    return array[..., 0] if array.ndim > 1 and array.shape[-1] == 1 else array
