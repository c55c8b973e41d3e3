"""Moving statistics of batch normalization that follow a network which changes while it trains."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import keras
from keras import ops

from keras_squeeze.training.batch_norm import StatisticsCall, find_batch_norms

WINDOW = 5
"""Training steps that the moving statistics average over while masks or bits change: a momentum of 0.8."""

SLOWNESS = 16.0
"""Steps after the last change that lengthen the average by one."""

STEPS_NEEDED = 2 * WINDOW
"""Training steps after the last change until the statistics are those of the network as it is."""


@dataclass(frozen=True)
class Change:
    """Period during which a network changes, in optimizer steps.

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
        return self.interval >= WINDOW

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
    statistics of a network that is gone. Where this is attached, a layer's momentum is at most 0.8 while the network
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
        self._calls = [StatisticsCall.of(layer) for layer in followed.values()]
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
        """Restores the momentum of every layer."""
        for call in self._calls:
            call.followers.remove(self)
            call.release()
        self._calls = []


def warn_of_ignored(model: keras.Model, ignored: Sequence[tuple[str, str]]) -> None:
    """Warns of layers whose moving statistics do not follow."""
    if ignored:
        warnings.warn(
            f"Model '{model.name}': moving statistics that do not follow the changes of the network: "
            f"{'; '.join(f'{path}: {reason}' for path, reason in ignored)}.",
            stacklevel=4,
        )
