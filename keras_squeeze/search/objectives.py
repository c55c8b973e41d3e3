"""What makes one compressed model better than another: fronts, volumes, budgets and scalar scores."""

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_SIZES = ("macs", "energy_pj", "latency_ms", "parameters")
_MORE_IS_BETTER = ("accuracy", "auc", "precision", "recall", "score", "iou", "io_u", "similarity", "specificity")
_LESS_IS_BETTER = ("loss", "error")


def is_size(name: str) -> bool:
    """Whether a metric is a cost such as bytes, MACs or milliseconds: positive, and compared by ratio."""
    return name.endswith("_bytes") or name in _SIZES


def direction_of(name: str) -> str:
    """Whether more or less of a metric is better.

    Args:
        name: The metric, with or without `val_`, such as `"val_accuracy"` or `"size_bytes"`.

    Returns:
        `"max"` or `"min"`.

    Raises:
        ValueError: it is a metric that neither this package nor Keras Tuner knows.
    """
    plain = name.removeprefix("val_").lower()
    if is_size(plain) or any(part in plain for part in _LESS_IS_BETTER):
        return "min"
    if any(part in plain for part in _MORE_IS_BETTER):
        return "max"
    direction = _inferred(plain)
    if direction is None:
        raise ValueError(
            f"Nothing is known of {name!r}: is more of it better, or less? Say it with "
            f'`keras_tuner.Objective({name!r}, "max")` or `"min"`. Received: {name!r}'
        )
    return direction


def _inferred(name: str) -> str | None:
    """What Keras Tuner says; it stumbles over metrics that need arguments."""
    from keras_tuner.src.engine.metrics_tracking import infer_metric_direction

    try:
        return infer_metric_direction(name)
    except (TypeError, ValueError):
        return None


def pareto_front(points, directions) -> list[int]:
    """The points that no other point beats: as good in every objective, and better in one.

    Args:
        points: One row for each: sequences of numbers, a 2-d array, or dicts from names to numbers.
        directions: `"max"` or `"min"` for each objective; for dicts, a dict from names to that. What else is in the
            dicts plays no part.

    Returns:
        Indices into `points`, best first by the first objective, ties by the following ones. Of equal points only
        the first is there, and a point with a NaN never is.

    Raises:
        ValueError: a direction is something else, or a point lacks an objective.

    Example:

    ```python
    ks.pareto_front([(0.9, 100), (0.8, 50), (0.7, 60)], ["max", "min"])  # [0, 1]
    ```
    """
    losses = _as_losses(points, directions)
    best = [index for index in np.lexsort(losses.T[::-1]).tolist() if not np.isnan(losses[index]).any()]
    front: list[int] = []
    for index in best:  # a point is beaten only by one that comes before it in this order
        if not front or not (losses[front] <= losses[index]).all(axis=1).any():
            front.append(index)
    return front


def hypervolume(points, directions, reference) -> float:
    """How much of the space between the front and a reference point is dominated: one number for a whole front.

    Args:
        points: As for `pareto_front`.
        directions: As for `pareto_front`.
        reference: A point that is worse than what is of interest. Only points better than it in every objective count.

    Returns:
        The exact volume, in the product of the objectives' units; 0 where no point counts.

    Raises:
        ValueError: as for `pareto_front`, or `reference` does not fit.
    """
    losses = _as_losses(points, directions)
    limit = _as_losses([reference], directions)[0]
    if np.isnan(limit).any():
        raise ValueError(f"`reference` must be numbers. Received: {reference}")
    return _volume(losses[(losses < limit).all(axis=1)], limit)


def knee_point(points, directions) -> int:
    """The point of the front with the best trade-off: past it, a little of one objective costs much of another.

    Each objective of the front is scaled to [0, 1], and the point farthest from the straight line between the two
    ends is taken; of more than two objectives, from the plane on which what one gains another loses. Objectives that
    are compared by ratio, such as bytes, belong here as logarithms.

    Args:
        points: As for `pareto_front`.
        directions: As for `pareto_front`.

    Returns:
        An index into `points`; of equally good ones the first of the front.

    Raises:
        ValueError: as for `pareto_front`, or no point is finite.
    """
    losses = _as_losses(points, directions)
    front = [index for index in pareto_front(points, directions) if np.isfinite(losses[index]).all()]
    if not front:
        raise ValueError(f"There is no knee where no point is finite. Received: points={points}")
    ends = losses[front]
    spread = np.ptp(ends, axis=0)
    scaled = (ends - ends.min(axis=0)) / np.where(spread > 0, spread, 1)
    return front[int(np.argmin(scaled.sum(axis=1)))]


@dataclass(frozen=True)
class Budgets:
    """Limits that a model must keep; made by `Budgets.of(max_size_bytes=50_000, min_val_accuracy=0.9)`.

    Attributes:
        limits: `(metric, "max" or "min", number)` for each.
    """

    limits: tuple[tuple[str, str, float], ...] = ()

    @classmethod
    def of(cls, **limits) -> "Budgets":
        """Budgets from arguments named `max_<metric>` and `min_<metric>`.

        Raises:
            ValueError: a name begins otherwise, a limit is no finite number, or a minimum is above its maximum.
        """
        budgets = cls(tuple(_limit(name, value) for name, value in limits.items()))
        bounds = {(metric, kind): value for metric, kind, value in budgets.limits}
        for (metric, kind), value in bounds.items():
            if kind == "min" and value > bounds.get((metric, "max"), math.inf):
                raise ValueError(f"No {metric} is at least its minimum and at most its maximum. Received: {limits}")
        return budgets

    def violation(self, metrics: Mapping[str, float]) -> float:
        """How far a model is outside, 0 where it keeps all limits.

        For each limit that is passed by `excess`, `log(1 + excess / |limit|)`: for bytes above a maximum the logarithm
        of their ratio, so that twice too big counts the same for a small and a large model.

        Raises:
            ValueError: a metric is missing.
        """
        missing = [metric for metric, _, _ in self.limits if metric not in metrics]
        if missing:
            names = ", ".join(sorted(metrics)) or "none"
            raise ValueError(f"There is a budget for {', '.join(missing)}, but the metrics are: {names}.")
        return sum(_violation(metrics[metric], kind, limit) for metric, kind, limit in self.limits)

    def met_by(self, metrics: Mapping[str, float]) -> bool:
        """Whether a model keeps all limits."""
        return self.violation(metrics) == 0

    def text(self) -> str:
        """The limits in words, such as `size_bytes <= 50,000`; empty without any."""
        return " and ".join(f"{metric} {'<=' if kind == 'max' else '>='} {x:,}" for metric, kind, x in self.limits)


def goodness(value: float, direction: str) -> float:
    """A metric squeezed into (-1, 2), more is better: an accuracy stays what it is, a loss turns round."""
    if direction == "min":
        return -math.copysign(_squeezed(abs(value)), value)
    if value < 0:
        return -_squeezed(-value)
    return value if not value > 1 else 2 - 1 / value


def score(metrics: Mapping[str, float], metric: str, direction: str, budgets: Budgets) -> float:
    """One number to maximize, for searches with a single objective: the metric, inside hard budgets.

    Every model that keeps the budgets is above every one that does not, and of those the less they miss them the
    better, so that they still show the way.

    Args:
        metrics: What was measured.
        metric: Name of the metric that counts.
        direction: `"max"` or `"min"`.
        budgets: Limits to keep.

    Returns:
        Inside the budgets the metric itself where it is a fraction to maximize, else a monotone function of it in
        [-1, 2]; outside `-1 - violation`. NaN where the metric is NaN.

    Raises:
        ValueError: a metric is missing.
    """
    value = _measured(metrics, metric)
    violation = budgets.violation(metrics)
    if violation > 0:
        return min(-1 - violation, math.nextafter(-1, -2))
    return goodness(value, direction)


def forgiving_score(
    metrics: Mapping[str, float],
    metric: str,
    direction: str,
    size: str,
    reference_size: float,
    *,
    percent: float = 8.0,
    rate: float = 2.0,
) -> float:
    """AutoQKeras's forgiving factor: a model may lose some of its metric for being smaller.

    The metric is multiplied by `1 + percent / 100 * log(reference_size / size) / log(rate)`, so that with the defaults
    half the size makes up for 8 % of the accuracy. Of a metric to minimize, the same fraction is taken off.

    Args:
        metrics: What was measured.
        metric: Name of the metric that counts.
        direction: `"max"` or `"min"`.
        size: Name of the size, such as `"size_bytes"`.
        reference_size: Size of the model that nothing is forgiven, such as the float model.
        percent: How much of the metric is forgiven for every `rate`-fold reduction.
        rate: The reduction that `percent` is for; above 1.

    Returns:
        One number to maximize.

    Raises:
        ValueError: a metric is missing, or a number is out of range.

    Reference: Coelho et al., Automatic heterogeneous quantization of deep neural networks,
    https://arxiv.org/abs/2006.10159
    """
    value, actual = _measured(metrics, metric), _measured(metrics, size)
    if not (reference_size > 0 and actual > 0 and rate > 1):
        raise ValueError(
            f"Sizes must be positive and `rate` above 1. Received: {size}={actual}, reference_size={reference_size}, "
            f"rate={rate}"
        )
    forgiven = percent / 100 * math.log(reference_size / actual) / math.log(rate)
    return (value if direction == "max" else -value) + abs(value) * forgiven


def _as_losses(points, directions) -> np.ndarray:
    """One row for each point, less is better."""
    if isinstance(directions, Mapping):
        names = list(directions)
        points = [_row(point, names, index) for index, point in enumerate(points)]
        directions = list(directions.values())
    if isinstance(directions, str) or not len(directions) or any(x not in ("max", "min") for x in directions):
        raise ValueError(f'`directions` must be "max" or "min" for each objective. Received: {directions}')
    rows = [tuple(point) for point in points]
    wrong = [index for index, row in enumerate(rows) if len(row) != len(directions)]
    if wrong:
        raise ValueError(
            f"Every point needs {len(directions)} values, one for each direction. Received: {rows[wrong[0]]} at index "
            f"{wrong[0]}"
        )
    signs = np.where(np.asarray(directions) == "max", -1.0, 1.0)
    return np.asarray(rows, "float64").reshape(-1, len(signs)) * signs


def _row(point: Any, names: Sequence[str], index: int) -> list[float]:
    """The objectives of a point; where it is no dict, in the order of the directions."""
    if not isinstance(point, Mapping):
        return list(point)
    missing = [name for name in names if name not in point]
    if missing:
        raise ValueError(f"Point {index} lacks {', '.join(missing)}. Received: {dict(point)}")
    return [point[name] for name in names]


def _volume(losses: np.ndarray, limit: np.ndarray) -> float:
    """The volume between points and a limit: slices along the last objective, each with the points that reach it."""
    if not len(losses):
        return 0.0
    if len(limit) == 1:
        return float(limit[0] - losses.min())
    losses = losses[np.argsort(losses[:, -1], kind="stable")]
    heights = np.diff(np.append(losses[:, -1], limit[-1]))
    slices = ((_volume(losses[: i + 1, :-1], limit[:-1]), height) for i, height in enumerate(heights) if height > 0)
    return float(sum(area * height for area, height in slices))


def _limit(name: str, value: Any) -> tuple[str, str, float]:
    kind, _, metric = name.partition("_")
    if kind not in ("max", "min") or not metric:
        raise ValueError(
            f"A budget is named `max_<metric>` or `min_<metric>`, such as max_size_bytes. Received: {name}={value!r}"
        )
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"A budget must be a finite number. Received: {name}={value!r}")
    return metric, kind, int(value) if isinstance(value, numbers.Integral) else float(value)


def _violation(value: float, kind: str, limit: float) -> float:
    excess = value - limit if kind == "max" else limit - value
    if math.isnan(excess):
        return math.inf
    return math.log1p(excess / (abs(limit) or 1)) if excess > 0 else 0.0


def _squeezed(value: float) -> float:
    """From [0, infinity) to [0, 1)."""
    return 1.0 if math.isinf(value) else value / (1 + value)


def _measured(metrics: Mapping[str, float], name: str) -> float:
    if name not in metrics:
        raise ValueError(f"There is no {name!r} among the metrics: {', '.join(sorted(metrics)) or 'none'}.")
    return metrics[name]
