"""Which of a compiled model's metrics is looked at, and which way it is better."""

import contextlib
from collections.abc import Iterable

import keras

_AGGREGATES = ("mean", "sum")  # metrics of Keras that may be of anything
_MARKS = {"up": "max", "down": "min"}


def check_compiled(model: keras.Model) -> None:
    """Raises a `ValueError` that says how to compile a model, unless it is."""
    if not getattr(model, "compiled", False):
        raise ValueError(
            f"Model '{model.name}' is not compiled, so it has no metric to look at. Call model.compile(optimizer, "
            'loss, metrics=["accuracy"]) first; that leaves the weights as they are.'
        )


def find_metric(model: keras.Model, names: Iterable[str], metric=None) -> tuple[str, str]:
    """The name of a metric, and the direction in which it is better.

    Args:
        model: A compiled model that was evaluated once.
        names: What `model.evaluate(..., return_dict=True)` gave.
        metric: A name, with or without `"val_"`; a `keras_tuner.Objective`, which says the direction, too; or None:
            the first metric that is not a loss or, if there is none, the loss.

    Returns:
        The name as in `names`, and `"max"` or `"min"`.

    Raises:
        TypeError: `metric` is none of these.
        ValueError: the model does not have it, or the direction is not known.
    """
    names = list(names)
    ordered = [name for name in model.get_metrics_result() if name in names]  # those of `evaluate` are sorted
    name = _chosen(model, [*ordered, *(name for name in names if name not in ordered)], metric)
    direction = getattr(metric, "direction", None) or find_direction(model, name)
    if direction not in ("min", "max"):
        raise ValueError(
            f"It is not known whether more or less of the metric {name!r} is better. Say it: "
            f'metric=keras_tuner.Objective({name!r}, "max"), or "min". Received: metric={metric!r}'
        )
    return name, direction


def find_direction(model: keras.Model, name: str) -> str | None:
    """Which way a metric is better: as Keras marks it, else as Keras Tuner knows it by its name.

    Keras Tuner alone would minimize an F1 score, R2 or a cosine similarity.

    Args:
        model: The compiled model.
        name: The metric; of several outputs, it begins with that of the output.

    Returns:
        `"max"`, `"min"`, or None where it is not known.
    """
    objects = [part for found in model.metrics for part in getattr(found, "metrics", [found])]
    for part in sorted(objects, key=lambda part: -len(part.name)):
        mark = getattr(part, "_direction", None)
        if mark in _MARKS and (name == part.name or name.endswith(f"_{part.name}")):
            return _MARKS[mark]
    if name.endswith(("loss", "error")):
        return "min"
    from keras_tuner.src.engine.metrics_tracking import infer_metric_direction

    words = name.split("_")
    for ending in ("_".join(words[first:]) for first in range(len(words))):
        direction = None
        with contextlib.suppress(TypeError):  # of a metric that needs arguments
            direction = None if ending in _AGGREGATES else infer_metric_direction(ending)
        if direction:
            return direction
    return None


def _chosen(model, names: list[str], metric) -> str:
    if metric is None:
        return next((name for name in names if name != "loss" and not name.endswith("_loss")), names[0])
    wanted = getattr(metric, "name", metric)
    if not isinstance(wanted, str):
        raise TypeError(f"`metric` must be a name, a `keras_tuner.Objective`, or None. Received: metric={metric!r}")
    for name in (wanted, wanted.removeprefix("val_")):
        if name in names:
            return name
    raise ValueError(
        f"Model '{model.name}' is not compiled with this metric. It has {', '.join(names)}. Received: metric={wanted!r}"
    )
