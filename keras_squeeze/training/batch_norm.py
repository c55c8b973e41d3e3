"""Layers of batch normalization, and what stands in for their `call` while others decide about their statistics."""

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import keras
import numpy as np
from keras import ops

from keras_squeeze.introspection.selection import layers_with_paths


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


def freeze_statistics(layers: Sequence[keras.layers.BatchNormalization], frozen: bool) -> None:
    """Makes batch normalization use its moving statistics in training, too, and leave them as they are; or ends that.

    The training step must be traced anew afterwards.
    """
    for layer in layers:
        call = StatisticsCall.of(layer)
        call.frozen = frozen
        call.release()


class Follower(Protocol):
    """Decides how fast the moving statistics of a layer follow."""

    def update_rate(self):
        """Returns the share of a batch's statistics in the moving ones, a float32 scalar tensor in [0, 1]."""


class Moments:
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


class StatisticsCall:
    """Stands in for the `call` of one batch normalization layer while others decide about its statistics.

    Attributes:
        followers: Objects that set its update rate.
        frozen: Whether training uses the moving statistics and leaves them as they are.
        moments: Where its inputs are measured; None where they are not.
        trained: Whether each call of one forward pass of the model is in training mode, in their order.
    """

    def __init__(self, layer: keras.layers.BatchNormalization):
        self._layer = layer
        self.followers: list[Follower] = []
        self.frozen = False
        self.moments: Moments | None = None
        self.trained: list[bool] = []
        self._calls = 0  # while its inputs are measured
        self._overridden = 0  # calls that are under way with another momentum

    @classmethod
    def of(cls, layer: keras.layers.BatchNormalization) -> "StatisticsCall":
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

    def _measure(self, moments: Moments, inputs, mask) -> None:
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
