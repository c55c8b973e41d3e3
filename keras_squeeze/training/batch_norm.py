"""Statistics of batch normalization: they follow a network that changes while it trains, or are measured anew."""

import contextlib
import inspect
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_squeeze import checks
from keras_squeeze.data import batches, inputs_only
from keras_squeeze.introspection.selection import layers_with_paths
from keras_squeeze.introspection.variables import read

WINDOW = 10
"""Training steps that the moving statistics average over while masks or bits change: a momentum of 0.9."""

SLOWNESS = 16.0
"""Steps after the last change that lengthen the average by one."""

STEPS_NEEDED = 2 * WINDOW
"""Training steps after the last change until the statistics are those of the network as it is."""

_BATCH_SIZE = 128


@dataclass(frozen=True)
class Change:
    """A time in which a network changes, in optimizer steps.

    Attributes:
        begin: The step of the first change.
        end: The step of the last.
        interval: Steps between two changes.
    """

    begin: int
    end: int
    interval: int = 1

    @property
    def jumps(self) -> bool:
        """Whether changes are so far apart that each is a large one: the statistics then begin anew at each."""
        return self.interval >= WINDOW // 2

    def update_rate(self, step):
        """Share of a batch's statistics in the moving ones at a step: 0 before `begin`, where the layer's own applies.

        `1 / WINDOW` until `end`, and `1 / max(WINDOW, (step - end) / SLOWNESS)` after it: while the model trains on,
        its weights go on moving, so that an average over most of the steps since would lag.
        """
        step = ops.cast(step, "float32")
        window = ops.maximum(float(WINDOW), (step - self.end) / SLOWNESS)
        return ops.where(step < self.begin, 0.0, 1.0 / window)


class MovingStatistics:
    """Makes the moving statistics of a model's batch normalization follow changes of the network.

    A momentum of 0.99 averages over the last hundred steps, and a short run has fewer: `evaluate` would see the
    statistics of a network that is gone. Where this is attached, a layer's momentum is at most 0.9 while the network
    changes, and from the last change on it rises to the layer's own. Where changes are far apart, and so large, it is 0
    at the first step after each and then that of the mean of the steps since. It is computed in the training step, from
    the optimizer's count. Layers that are frozen, or that Keras calls in inference mode, keep their statistics.

    Args:
        model: A built model.
        optimizer: The Keras optimizer that trains it.
        changes: When the network changes.
        origin: The optimizer's count at step 0.

    Attributes:
        ignored: `(path, reason)` of layers with moving statistics of another kind, which keep their own momentum.
    """

    def __init__(self, model: keras.Model, optimizer, changes: Sequence[Change], origin: int):
        self._optimizer, self._changes, self._origin = optimizer, tuple(changes), origin
        with model.distribute_strategy.scope():
            self._last_jump = keras.Variable(-1, dtype="int32", trainable=False, name="last_jump")
        followed, self.ignored = find_batch_norms(model)
        self._calls = [_StatisticsCall.of(layer) for layer in followed.values()]
        for call in self._calls:
            call.followers.append(self)

    @property
    def is_used(self) -> bool:
        """Whether the model has a layer whose statistics follow."""
        return bool(self._calls)

    @property
    def end(self) -> int:
        """The step of the last change."""
        return max(change.end for change in self._changes)

    def update_rate(self):
        """The highest update rate of all changes at the optimizer's present step, a float32 scalar tensor."""
        step = ops.convert_to_tensor(self._optimizer.iterations) - self._origin
        rate = self._changes[0].update_rate(step)
        for change in self._changes[1:]:
            rate = ops.maximum(rate, change.update_rate(step))
        last = ops.cast(self._last_jump, "float32")
        since = ops.cast(step, "float32") - last + 1.0  # steps of the network as it is, this one included
        return ops.where(last < 0, rate, ops.maximum(rate, 1.0 / ops.maximum(since, 1.0)))

    def note_change(self, step: int) -> None:
        """Begins the statistics anew after a change that was due at a step, where changes are far apart."""
        if self._calls and any(change.jumps for change in self._changes):
            self._last_jump.assign(step)

    def detach(self) -> None:
        """Gives every layer its own momentum back."""
        for call in self._calls:
            call.followers.remove(self)
            call.release()
        self._calls = []


def warn_of_ignored(model: keras.Model, ignored: Sequence[tuple[str, str]]) -> None:
    """Says which layers have moving statistics that do not follow."""
    if ignored:
        warnings.warn(
            f"Model '{model.name}': moving statistics that do not follow the changes of the network: "
            f"{'; '.join(f'{path}: {reason}' for path, reason in ignored)}.",
            stacklevel=4,
        )


def freeze_statistics(layers: Sequence[keras.layers.BatchNormalization], frozen: bool) -> None:
    """Makes batch normalization use its moving statistics in training, too, and leave them as they are; or ends that.

    The training step must be traced anew afterwards.
    """
    for layer in layers:
        call = _StatisticsCall.of(layer)
        call.frozen = frozen
        call.release()


def find_batch_norms(
    model: keras.Model,
) -> tuple[dict[str, keras.layers.BatchNormalization], list[tuple[str, str]]]:
    """The trainable batch normalization layers of a model.

    Returns:
        `{path: layer}`, and `(path, reason)` of layers with moving statistics that are not plain batch normalization.
    """
    plain: dict[str, keras.layers.BatchNormalization] = {}
    ignored = []
    for path, layer in layers_with_paths(model):
        reason = _peculiarity(layer)
        if reason:
            ignored.append((path, reason))
        elif isinstance(layer, keras.layers.BatchNormalization) and layer.trainable and layer.built:
            plain[path] = layer
    return plain, ignored


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
    if not layers:
        return {}
    examples = _first_examples(batches(inputs_only(model, data), None, _BATCH_SIZE), max_examples)
    before = {path: (np.array(read(x.moving_mean)), np.array(read(x.moving_variance))) for path, x in layers.items()}
    calls = {path: _StatisticsCall.of(layer) for path, layer in layers.items()}
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


class _Moments:
    """Mean and variance of each channel over all batches that it is given, in float64."""

    def __init__(self):
        self._count: Any = 0.0
        self._mean: Any = 0.0
        self._deviations: Any = 0.0  # sum of squared deviations from the mean

    @property
    def is_known(self) -> bool:
        """Whether every channel has had values."""
        return bool(np.all(self._count > 0))

    def add(self, values: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Adds a batch, with the channels along the last axis and a weight of 0 for what is padding.

        Returns:
            Mean and variance of the batch alone.
        """
        axes = tuple(range(values.ndim - 1))
        count = weights.sum(axis=axes)
        own_count = np.maximum(count, 1e-12)
        mean = (weights * values).sum(axis=axes) / own_count
        deviations = (weights * (values - mean) ** 2).sum(axis=axes)
        whole = np.maximum(self._count + count, 1e-12)
        shift = mean - self._mean
        self._deviations = self._deviations + deviations + shift**2 * self._count * count / whole
        self._mean = self._mean + shift * count / whole
        self._count = self._count + count
        return mean, deviations / own_count

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        return self._mean, self._deviations / self._count


class _StatisticsCall:
    """Stands in for the `call` of one batch normalization layer while others decide about its statistics.

    Attributes:
        followers: Those that set its update rate.
        frozen: Whether training uses the moving statistics and leaves them as they are.
        moments: Where its inputs are measured; None where they are not.
        trained: Whether each call of one forward pass of the model is in training mode, in their order.
    """

    def __init__(self, layer: keras.layers.BatchNormalization):
        self._layer = layer
        self.followers: list[MovingStatistics] = []
        self.frozen = False
        self.moments: _Moments | None = None
        self.trained: list[bool] = []
        self._calls = 0  # while its inputs are measured
        self._overridden = 0  # calls that are under way with another momentum

    @classmethod
    def of(cls, layer: keras.layers.BatchNormalization) -> "_StatisticsCall":
        """The one that a layer has, or a new one in the place of its `call`."""
        existing = vars(layer).get("call")
        if not isinstance(existing, cls):
            existing = cls(layer)
            layer.call = existing
        return existing

    def release(self) -> None:
        """Gives the layer its own `call` back if nobody needs this one any more."""
        unused = not self.followers and not self.frozen and self.moments is None
        if unused and vars(self._layer).get("call") is self:
            del self._layer.call

    def __call__(self, *args, **kwargs):
        layer = self._layer
        call = inspect.signature(type(layer).call).bind(layer, *args, **kwargs)
        training = call.arguments.get("training")
        if self.moments is not None:
            self._calls += 1
            if self.trained[(self._calls - 1) % len(self.trained)]:
                self._measure(self.moments, call.arguments["inputs"], call.arguments.get("mask"))
            return type(layer).call(*call.args, **call.kwargs)
        self.trained.append(bool(training))
        if self.frozen and training:
            call.arguments["training"] = False
        if not call.arguments.get("training") or not layer.trainable or not self.followers:
            return type(layer).call(*call.args, **call.kwargs)
        variables = (layer.moving_mean, layer.moving_variance)
        before = [ops.copy(variable) for variable in variables]
        with self._momentum_of_zero():  # the statistics become those of the batch
            outputs = type(layer).call(*call.args, **call.kwargs)
        momentum = self._momentum()
        for variable, old in zip(variables, before, strict=True):
            old, new = (ops.cast(value, _at_least_float32(variable)) for value in (old, ops.copy(variable)))
            weight = ops.cast(momentum, new.dtype)
            variable.assign(ops.cast(old * weight + new * (1.0 - weight), variable.dtype))
        return outputs

    @contextlib.contextmanager
    def _momentum_of_zero(self) -> Iterator[None]:
        """Makes the layer keep nothing of its statistics; replicas may be in it together."""
        if not self._overridden:
            self._own_momentum = self._layer.momentum
            self._layer.momentum = 0.0
        self._overridden += 1
        try:
            yield
        finally:
            self._overridden -= 1
            if not self._overridden:
                self._layer.momentum = self._own_momentum

    def _momentum(self):
        """The lowest of the layer's own momentum and those of the followers, a float32 scalar tensor."""
        momentum = ops.convert_to_tensor(self._own_momentum, "float32")
        for follower in self.followers:
            momentum = ops.minimum(momentum, 1.0 - follower.update_rate())
        return momentum

    def _measure(self, moments: _Moments, inputs, mask) -> None:
        """Adds inputs up, and makes the moving statistics theirs."""
        layer = self._layer
        values = np.asarray(ops.convert_to_numpy(inputs)).astype("float64")
        weights = np.ones_like(values)
        if mask is not None:  # of all axes but the last
            weights *= np.asarray(ops.convert_to_numpy(mask))[..., np.newaxis].astype(bool)
        mean, variance = moments.add(np.moveaxis(values, layer.axis, -1), np.moveaxis(weights, layer.axis, -1))
        layer.moving_mean.assign(mean)
        layer.moving_variance.assign(variance)


def _at_least_float32(variable: keras.Variable) -> str:
    return keras.backend.result_type(variable.dtype, "float32")


def _peculiarity(layer: keras.Layer) -> str | None:
    """Why a layer's moving statistics are left alone; None where they follow, or where it has none."""
    if not isinstance(layer, keras.layers.BatchNormalization):
        own = [variable.name for variable in layer._non_trainable_variables if variable.name.startswith("moving_")]
        return f"{type(layer).__name__} keeps {' and '.join(own)} in its own way" if own else None
    if type(layer).call is not keras.layers.BatchNormalization.call:
        return f"{type(layer).__name__} has a `call` of its own"
    if getattr(layer, "renorm", False):
        return "it uses renorm, which normalizes by them in training"
    if layer.momentum >= 1.0:
        return f"momentum={layer.momentum:g} never updates them"
    return None


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


def _mark_trained(model, x, calls: dict[str, _StatisticsCall]) -> None:
    """Measures only layers that training calls in training mode. Leaves no trace: nothing is assigned in the scope."""
    few = keras.tree.map_structure(lambda array: array[:2], x)
    for call in calls.values():
        call.trained = []
    with keras.StatelessScope():
        model(few, training=True)
    for call in calls.values():
        call.moments = _Moments() if any(call.trained) else None


def _change(old_mean, old_variance, mean, variance, epsilon: float) -> float:
    deviation, old_deviation = np.sqrt(variance + epsilon), np.sqrt(old_variance + epsilon)
    shift = np.max(np.abs(mean - old_mean) / deviation)
    return float(max(shift, np.max(np.abs(old_deviation / deviation - 1.0))))
