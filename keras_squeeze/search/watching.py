"""Trials that are watched while they train, and ended where the front is far ahead of them."""

from collections.abc import Mapping
from typing import Any

import keras

from keras_squeeze.search.oracle import PROGRESS
from keras_squeeze.search.results import STOPPED_EARLY


class HopelessTrialError(Exception):
    """Raised inside of a trial that has no chance to reach the front.

    Attributes:
        metrics: The last value of the metric, and what the sizes were expected to be.
    """

    def __init__(self, metrics: Mapping[str, float]):
        super().__init__("This trial was ended early: finished trials are better in every objective.")
        self.metrics = dict(metrics)


class Watch(keras.callbacks.Callback):
    """Tells the oracle after each epoch how a trial is doing, and ends the trial where it says so.

    Args:
        oracle: A `ParetoOracle`, or the client of one.
        trial_id: The trial.
        metric: The metric in the logs, with `val_`.
        sizes: What the trial's model will take: bytes, MACs and so on, by name.
        epochs: Of the whole trial.
    """

    def __init__(self, oracle, trial_id: str, metric: str, sizes: Mapping[str, float], epochs: int):
        super().__init__()
        self._oracle, self._trial_id, self._metric = oracle, trial_id, metric
        self._sizes, self._epochs = dict(sizes), epochs

    def on_epoch_end(self, epoch, logs=None):
        value = (logs or {}).get(self._metric)
        if value is None:
            return
        known = {**self._sizes, self._metric: float(value)}
        report: dict[str, Any] = {f"{PROGRESS}{name}": number for name, number in known.items()}
        trial = self._oracle.update_trial(self._trial_id, {**report, f"{PROGRESS}done": (epoch + 1) / self._epochs})
        if trial.status == "STOPPED" and epoch + 1 < self._epochs:
            raise HopelessTrialError({**known, STOPPED_EARLY: 1.0})
