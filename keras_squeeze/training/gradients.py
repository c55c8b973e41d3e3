"""Observers of the gradients that the optimizer gets, inside the compiled training step."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

import keras
import numpy as np

BATCHES = 8
"""Batches just before an update whose gradients count."""


class GradientObserver(ABC):
    """Base class: receives every unscaled gradient that reaches an optimizer; subclasses accumulate statistics of it.

    Only the batches just before an update are recorded, so that the other steps cost nothing. Under a distribution
    strategy the batch of a replica is a batch. The training step must be traced after this is made.

    Args:
        model: The model, for its distribution strategy.
        optimizer: The Keras optimizer that trains it; of one that scales the loss the inner one is observed.
        variables: The weights whose gradients count.
    """

    def __init__(self, model: keras.Model, optimizer, variables: Sequence[keras.Variable]):
        self._optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        self._observed = {id(variable): variable for variable in variables}
        with model.distribute_strategy.scope():
            self._from_count = _counter(np.int64(0))
            self._batches = _counter(np.float32(0))
            self._make_variables()
        self._call = _ObservedApply.of(self._optimizer)
        self._call.observers.append(self)

    @abstractmethod
    def _make_variables(self) -> None:
        """Creates what `_record` adds to."""

    @abstractmethod
    def _record(self, gradients: Mapping[int, Any], weights: Mapping[int, Any]) -> None:
        """Adds one batch, inside the training step.

        Args:
            gradients: `{id of a variable: its gradient, a tensor or tf.IndexedSlices}`; not necessarily all.
            weights: Values of the same variables before the optimizer's update, tensors.
        """

    @abstractmethod
    def _clear(self) -> None:
        """Resets the accumulators of `_record` to zero."""

    @property
    def batches_per_step(self) -> int:
        """Returns the batches that the optimizer accumulates for a step."""
        return getattr(self._optimizer, "gradient_accumulation_steps", None) or 1

    @property
    def batches(self) -> int:
        """Returns the batches recorded since the last `forget`."""
        return round(float(self._batches.numpy()))

    def forget(self) -> None:
        """Discards everything recorded."""
        self._batches.assign(0.0)
        self._clear()

    def record_from(self, count: int) -> None:
        """Starts recording when the optimizer reaches a count of steps."""
        self._from_count.assign(count)

    def detach(self) -> None:
        """Stops observing; recorded values remain readable."""
        self._call.release(self)

    def see(self, gradients: Sequence, variables: Sequence[keras.Variable]) -> None:
        """Records a batch, in the training step, if recording has started."""
        import tensorflow as tf

        of_interest = {
            id(variable): gradient
            for variable, gradient in zip(variables, gradients, strict=True)
            if gradient is not None and id(variable) in self._observed
        }

        # Read out here: a branch that reads variables holds up their updates until all gradients are there, even in
        # steps in which it is not taken.
        weights = {key: keras.ops.convert_to_tensor(self._observed[key]) for key in of_interest}

        def record():
            self._record(of_interest, weights)
            self._batches.assign_add(1.0)

        if of_interest:
            count = tf.cast(keras.ops.convert_to_tensor(self._optimizer.iterations), tf.int64)
            tf.cond(count >= self._from_count, record, lambda: None)


class MeanGradients(GradientObserver):
    """The mean gradient of every weight."""

    def _make_variables(self):
        self._sums = {key: _counter(np.zeros(v.shape, "float32")) for key, v in self._observed.items()}

    def _record(self, gradients, weights):
        import tensorflow as tf

        for key, gradient in gradients.items():
            self._sums[key].assign_add(tf.cast(tf.convert_to_tensor(gradient), tf.float32))

    def _clear(self):
        for total in self._sums.values():
            total.assign(np.zeros(total.shape, "float32"))

    def means(self, variables: Sequence[keras.Variable]) -> list[np.ndarray]:
        """The mean gradients over the recorded batches, float32 arrays of the weights' shapes."""
        return [self._sums[id(variable)].numpy() / max(self.batches, 1) for variable in variables]


class GroupProducts(GradientObserver):
    """The mean over optimizer steps of `|sum of dL/dw * w|` over groups of weights.

    Where the optimizer accumulates gradients over batches, the sum is over those, too, before its absolute value is
    taken.

    Args:
        slices: `(variable, axis, numbers)`: the group of each index along an axis of a weight.
        groups: How many groups there are.
    """

    def __init__(self, model, optimizer, slices: Sequence[tuple[keras.Variable, int, np.ndarray]], groups: int):
        self._slices, self._groups = list(slices), groups
        super().__init__(model, optimizer, [variable for variable, _, _ in slices])

    def _make_variables(self):
        self._total = _counter(np.zeros(self._groups, "float32"))
        self._current = _counter(np.zeros(self._groups, "float32"))  # of an optimizer step that is not over
        self._last_count = _counter(np.int64(-1))

    def _record(self, gradients, weights):
        import tensorflow as tf

        used = [part for part in self._slices if id(part[0]) in gradients]
        sums = [_products(gradients[id(variable)], weights[id(variable)], axis) for variable, axis, _ in used]
        numbers = np.concatenate([numbers for _, _, numbers in used])
        products = tf.math.unsorted_segment_sum(tf.concat(sums, 0), numbers, self._groups)
        count = tf.cast(keras.ops.convert_to_tensor(self._optimizer.iterations), tf.int64)
        is_new = count != self._last_count
        before = tf.convert_to_tensor(self._current)
        self._total.assign_add(tf.where(is_new, tf.abs(before), 0.0))
        self._current.assign(tf.where(is_new, 0.0, before) + products)
        self._last_count.assign(count)

    def _clear(self):
        for variable in (self._total, self._current):
            variable.assign(np.zeros(self._groups, "float32"))

    def values(self) -> np.ndarray:
        """One value per group, float64 of shape (groups,); a common factor depends on how gradients are accumulated."""
        return (self._total.numpy() + np.abs(self._current.numpy())).astype("float64") / max(self.batches, 1)


Observer = TypeVar("Observer", bound=GradientObserver)


class GradientWindow(Generic[Observer]):
    """Decides when an observer records and when an update may use the recorded gradients.

    An update uses the last `BATCHES` batches before it. They are of one epoch, so that a run which is resumed at an
    epoch sees the same: an update that is due within the first batches of an epoch waits for as many as it needs.

    Args:
        observer: What records.
        origin: The optimizer's count at step 0.
        steps_per_epoch: Optimizer steps of an epoch; None where that is not known.
    """

    def __init__(self, observer: Observer, origin: int, steps_per_epoch: int | None):
        self.observer = observer
        self._origin = origin
        self._steps = math.ceil(BATCHES / observer.batches_per_step)
        self._steps_per_epoch = steps_per_epoch
        self._most = min(self._steps, steps_per_epoch or self._steps)
        self._needed = self._most
        self._closing = False
        self._asked: int | None = None  # when the update that is due was first asked for

    def open_before(self, step: int | None, previous: int | None) -> None:
        """Forgets what was recorded, and records what the update at `step` needs.

        Args:
            step: The step of the next update; None if there is none.
            previous: The step of the last update; None before the first, which waits for as many batches as there can
                be.
        """
        self.observer.forget()
        self._asked = None
        if step is None:
            self.observer.record_from(np.iinfo(np.int64).max)
            return
        self._needed = self._most if previous is None else max(min(self._most, step - previous), 1)
        self.observer.record_from(self._origin + max(step - self._steps, previous or 0))

    def begin_epoch(self) -> None:
        """Discards the batches of the previous epoch."""
        self._closing = False
        self.observer.forget()

    def end_epoch(self) -> None:
        """Allows a waiting update to use the available batches, since no more will come."""
        self._closing = True

    @property
    def is_blind(self) -> bool:
        """Whether no gradient was seen: the training step does not go through the optimizer's `apply`."""
        return self.observer.batches == 0

    def is_ready(self, step: int) -> bool:
        """Whether the update that is due can be made at this step, with or without gradients."""
        batches = self.observer.batches
        if self._asked is None:
            self._asked = step
        if batches == 0:
            return step - self._asked >= 2 * self._steps  # nothing is being recorded
        epoch_is_over = self._closing or bool(self._steps_per_epoch and step % self._steps_per_epoch == 0)
        return epoch_is_over or batches >= self._needed


class _ObservedApply:
    """Replaces the `apply` of one optimizer while observers receive its gradients."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        self._own = optimizer.apply
        self.observers: list[GradientObserver] = []

    @classmethod
    def of(cls, optimizer) -> "_ObservedApply":
        """The one that an optimizer has, or a new one in the place of its `apply`."""
        existing = vars(optimizer).get("apply")
        if not isinstance(existing, cls):
            existing = cls(optimizer)
            optimizer.apply = existing
        return existing

    def release(self, observer: GradientObserver) -> None:
        if observer in self.observers:
            self.observers.remove(observer)
        if not self.observers and vars(self._optimizer).get("apply") is self:
            del self._optimizer.apply

    def __call__(self, grads, trainable_variables=None):
        grads = list(grads)
        variables = self._optimizer._trainable_variables if trainable_variables is None else list(trainable_variables)
        for observer in self.observers:
            observer.see(grads, variables)
        return self._own(grads, trainable_variables if trainable_variables is None else variables)


def _counter(value):
    """Creates a variable that every replica adds to separately; its value is the sum over replicas."""
    import tensorflow as tf

    return tf.Variable(
        value,
        trainable=False,
        synchronization=tf.VariableSynchronization.ON_READ,
        aggregation=tf.VariableAggregation.SUM,
    )


def _products(gradient, weight, axis: int):
    """`dL/dw * w` summed over all axes but one, a float32 vector."""
    import tensorflow as tf

    rank = len(weight.shape)
    if isinstance(gradient, tf.IndexedSlices):
        if axis % rank == 0:
            gradient = tf.convert_to_tensor(gradient)
        else:
            gradient, weight = gradient.values, tf.gather(weight, gradient.indices)
    others = [other for other in range(rank) if other != axis % rank]
    return tf.reduce_sum(tf.cast(gradient, tf.float32) * tf.cast(weight, tf.float32), axis=others)
