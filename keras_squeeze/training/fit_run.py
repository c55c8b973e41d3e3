"""Base class of the compression callbacks, and the run of `fit` that they share: clock, logs, training step."""

import pathlib
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar

import keras

from keras_squeeze.introspection.running_fit import callback_lists
from keras_squeeze.introspection.variables import require_tensorflow
from keras_squeeze.training.moving_statistics import STEPS_NEEDED, Change, MovingStatistics, warn_of_ignored

_ORIGIN_FILE = "keras_squeeze_origin.txt"


class CompressionCallback(keras.callbacks.Callback, ABC):
    """Base class of the callbacks that compress a model while it trains.

    A subclass says what happens at a step; when a step is over is found out here. In a custom training loop the
    same object is driven by hand:

    ```python
    pruning.attach(model, optimizer, total_steps=1000)   # before the training step is traced
    for step, (x, y) in enumerate(dataset, start=1):
        train_step(x, y)
        pruning.update(step)
    pruning.detach()
    ```
    """

    tells_validation: ClassVar[bool] = False
    """Whether a line about the validation metric goes with what `finish` prints."""

    _run: Any = None  # the FitRun, during `fit`
    _statistics: MovingStatistics | None = None

    @abstractmethod
    def attach(self, model: keras.Model, optimizer, total_steps: int | None = None) -> None:
        """Checks all arguments and attaches to the model. Weights are not modified.

        Args:
            model: A built model.
            optimizer: The Keras optimizer that trains it.
            total_steps: Optimizer steps that will run; needed where a time is a fraction of the run.
        """

    @abstractmethod
    def update(self, step: int) -> None:
        """Makes the updates due after `step` optimizer steps, counted from `attach`; cheap if there are none."""

    @abstractmethod
    def detach(self) -> None:
        """Detaches from the model. Weights are not modified."""

    @property
    @abstractmethod
    def next_update(self) -> int | None:
        """Step of the next update; None after the last."""

    @property
    @abstractmethod
    def reached(self) -> bool:
        """Returns whether the target is reached."""

    @abstractmethod
    def progress(self) -> dict[str, dict[Hashable, tuple[int, int]]]:
        """Returns the values for `logs`: name -> {what is compressed: (part, whole)}.

        Callbacks of one `fit` are added up; where two compress the same thing, the larger part counts, since what one
        has compressed the other counts in.
        """

    def begin_epoch(self) -> None:
        """Called before the first batch of every epoch of `fit`, after `attach`."""

    def finish(self, step: int, verbose: bool) -> None:
        """Called once when `fit` ends, before `detach`."""

    def end_epoch(self) -> None:
        """Called after the last batch of every epoch of `fit`, before `update`."""

    def follow_statistics(self, model: keras.Model, optimizer, changes: Sequence[Change]) -> None:
        """Makes batch normalization follow the changes that this callback makes, until `release_statistics`."""
        self.release_statistics()
        if optimizer is None or not changes:
            return
        self._statistics = MovingStatistics(model, optimizer, changes, self.origin(optimizer))
        if self._run is None or self._run.callbacks[0] is self:
            warn_of_ignored(model, self._statistics.ignored)

    def note_change(self, step: int) -> None:
        """Notifies the statistics of a change that was due at a step."""
        if self._statistics is not None:
            self._statistics.note_change(step)

    def release_statistics(self) -> None:
        """Restores the momentum of batch normalization."""
        if self._statistics is not None:
            self._statistics.detach()
            self._statistics = None

    def warn_of_late_end(self, step: int) -> None:
        """Warns where training ended before the statistics had followed the last change."""
        statistics = self._statistics
        if statistics is None or not statistics.is_used:
            return
        steps = step - statistics.end
        if 0 <= steps < STEPS_NEEDED:
            warnings.warn(
                f"The target was reached {steps} steps before the end of training, and the moving statistics of batch "
                f"normalization need about {STEPS_NEEDED} to follow: `evaluate` may say less than the model can. "
                "Measure them anew with keras_squeeze.recalibrate_batch_norm(model, x), train longer, or let the "
                "schedule end earlier.",
                stacklevel=3,
            )

    def origin(self, optimizer) -> int:
        """Returns the optimizer's count at step 0."""
        if self._run is not None:
            return self._run.origin
        return int(keras.ops.convert_to_numpy(optimizer.iterations))

    def on_train_begin(self, logs=None):
        require_tensorflow()
        self._run = FitRun.join(self)

    def on_epoch_begin(self, epoch, logs=None):
        self._run.start(epoch)
        self.begin_epoch()

    def on_epoch_end(self, epoch, logs=None):
        self.end_epoch()
        self._run.catch_up()  # a model with a `fit` of its own may never call its `train_function`
        self._run.note_validation(epoch, logs)

    def on_train_end(self, logs=None):
        self._run.leave(self)


class FitRun:
    """One run of `fit`, shared by its compression callbacks.

    Masks and bits must change right after an optimizer step, before any other callback sees the model, and
    their values must be in the logs that every callback gets. A callback's own events allow neither: they come in
    the order of the list, and Keras may call them from another thread. So the run wraps the model's
    `train_function` for its duration.

    Callbacks of one `fit` are recognized by `params`, the one dictionary that Keras hands to all of them.
    """

    _runs: ClassVar[weakref.WeakValueDictionary] = weakref.WeakValueDictionary()  # by the identity of `params`

    def __init__(self, callback: CompressionCallback):
        self.callbacks: list[CompressionCallback] = []
        self._model = callback.model
        self._params = callback.params
        self._beside: list[keras.callbacks.Callback] = next(
            (found.callbacks for found in callback_lists() if callback in found.callbacks), []
        )
        self._started = False
        self._origin = 0  # the optimizer's count when this run, or the one that it resumes, began
        self._step = 0  # known for sure
        self._batches = 0  # executed since `_step` was known
        self._logs: dict[str, float] | None = None  # as long as nothing changes
        self._validation: dict[str, Mapping[str, float]] = {}  # logs by when they were written
        self._iterator: Any = None
        self._train_function: Any = None
        self._hook()

    @classmethod
    def join(cls, callback: CompressionCallback) -> "FitRun":
        """Adds a callback to the run that its `fit` belongs to."""
        run = cls.of(callback)
        if run is None:
            run = cls._runs[id(callback.params)] = cls(callback)
        run.callbacks.append(callback)
        return run

    @staticmethod
    def of(callback: keras.callbacks.Callback) -> "FitRun | None":
        """Returns the run that a callback of `fit` belongs to; None if nothing is compressed."""
        return FitRun._runs.get(id(callback.params))

    @property
    def origin(self) -> int:
        """The optimizer's count when this run, or the one that it resumes, began."""
        return self._origin

    @property
    def steps_per_epoch(self) -> int | None:
        """Returns the optimizer steps of an epoch; None if unknown or not a whole number."""
        steps = self._params.get("steps")
        return steps // self._accumulation if steps and steps % self._accumulation == 0 else None

    @property
    def reached(self) -> bool:
        """Returns whether every callback has reached its target."""
        return self._started and all(callback.reached for callback in self.callbacks)

    def start(self, epoch: int) -> None:
        """Sets the clock and attaches the callbacks at the first epoch, when weights are already restored."""
        if self._started:
            return
        total_steps = self._set_clock(epoch)
        self._started = True
        try:
            for callback in self.callbacks:
                callback.attach(self._model, self._model.optimizer, total_steps)
            self._update_all()
        except Exception:
            self._abandon()
            raise
        self._warn_of_early_picks()

    def catch_up(self) -> None:
        """Reads the clock and makes the updates that are due."""
        self._step = self._iterations() - self._origin
        self._batches = 0
        self._update_all()

    def _update_all(self) -> None:
        self._logs = None
        for callback in self.callbacks:
            callback.update(self._step)

    def logs(self) -> dict[str, float]:
        """Returns the compressed fraction by name."""
        if self._logs is None:
            self._logs = self._sum_up()
        return self._logs

    def _sum_up(self) -> dict[str, float]:
        by_name: dict[str, dict[Hashable, tuple[int, int]]] = {}
        for callback in self.callbacks:
            for name, parts in callback.progress().items():
                counts = by_name.setdefault(name, {})
                counts.update((key, max(pair, counts.get(key, pair))) for key, pair in parts.items())
        return {name: sum_fractions(parts) for name, parts in by_name.items()}

    def note_validation(self, epoch: int, logs: Mapping[str, float] | None) -> None:
        """Keeps the validation metrics from before the first change (or of the first epoch) and the latest ones."""
        metrics = {name: value for name, value in (logs or {}).items() if name.startswith("val_")}
        if not metrics:
            return
        if not any(self.logs().values()):
            self._validation = {"before compression": metrics}
        elif not self._validation:
            self._validation = {f"after epoch {epoch + 1}": metrics}
        else:
            self._validation["at the end"] = metrics

    def _validation_line(self) -> str:
        names = list(next(iter(self._validation.values())))
        name = next((name for name in names if name != "val_loss"), names[0])
        parts = [f"{logs[name]:.4g} {when}" for when, logs in self._validation.items() if name in logs]
        return f"{name} {', '.join(parts)}"

    def trace_anew(self) -> None:
        """Retraces the training step before the next one runs, since the graph lacks what a callback changed."""
        self._make_train_function(force=True)

    def leave(self, callback: CompressionCallback) -> None:
        """Removes a callback; the last one restores the model's training step."""
        if self._started:
            verbose = bool(self._params.get("verbose", 1))
            callback.finish(self._iterations() - self._origin, verbose)
            if verbose and callback.tells_validation and self._validation:
                print(f"keras_squeeze: {self._validation_line()}")
                self._validation = {}
        callback.detach()
        callback._run = None
        self.callbacks.remove(callback)
        if not self.callbacks:
            self._close()

    def _hook(self) -> None:
        """Wraps the training step that the model has, and each that it makes during this run.

        Any callback may have the model make a new one, such as after it unfroze a layer.
        """
        stale = getattr(vars(self._model).get("make_train_function"), "__self__", None)
        if isinstance(stale, FitRun):  # of a `fit` that was interrupted
            stale._abandon()
        self._make_own = self._model.make_train_function
        self._model.make_train_function = self._make_train_function
        # Constraints and wrappers are traced with the training step, so it must not have been traced yet.
        self.trace_anew()

    def _make_train_function(self, force: bool = False):
        """Stands in for the model's `make_train_function`."""
        model = self._model
        if force or model.train_function is None:
            self._make_own(force=True)
            self._train_function = model.train_function
            model.train_function = self._train_and_advance
        return model.train_function

    def _train_and_advance(self, iterator):
        """The model's training step, what is due after it, and the progress in its logs."""
        if iterator is not self._iterator and not self._is_current():
            self._abandon()
            self._model.make_train_function(force=True)
            return self._model.train_function(iterator)
        self._iterator = iterator
        logs = self._train_function(iterator)
        self._advance()
        if not isinstance(logs, dict):
            return logs
        if self._model.distribute_strategy.num_replicas_in_sync > 1:
            # Keras takes the metrics over all replicas only where it finds no other name in the logs.
            metrics = self._model.get_metrics_result()
            logs = metrics if metrics.keys() == logs.keys() else logs
        return {**logs, **self.logs()}

    def _is_current(self) -> bool:
        """Whether the `fit` that is running is the one of these callbacks.

        One that was interrupted leaves its training step with the model, for the next to find. Asked once an epoch.
        """
        running = next(callback_lists(), None)
        return running is not None and any(callback in running.callbacks for callback in self.callbacks)

    def _abandon(self) -> None:
        """Detaches from the model if `fit` will not do it."""
        for callback in self.callbacks:
            callback.detach()
            callback._run = None
        self._close()

    def _close(self) -> None:
        if "make_train_function" in vars(self._model):
            del self._model.make_train_function
        self._model.train_function = None  # the constraints were traced with it
        self._runs.pop(id(self._params), None)

    def _advance(self) -> None:
        """Called after each execution. Reads the clock, which costs time, only where something may be due."""
        self._batches += self._model.steps_per_execution
        at_most = self._step + -(-self._batches // self._accumulation)
        due = [callback.next_update for callback in self.callbacks]
        if any(step is not None and at_most >= step for step in due):
            self.catch_up()

    def _set_clock(self, epoch: int) -> int | None:
        """Finds the optimizer's count at which this run (or the one that it resumes) began.

        Returns:
            The optimizer steps of the whole run; None where the length of the data is not known.
        """
        steps = self._params.get("steps")
        if steps == 0:
            self._close()
            raise ValueError("The data set is empty: `fit` would run no step. Pass data with at least one batch.")
        self._origin = self._find_origin(epoch, steps)
        self._step = self._iterations() - self._origin
        if steps is None:
            return None
        return int(self._params["epochs"] * steps / self._accumulation)

    def _find_origin(self, epoch: int, steps: int | None) -> int:
        """The optimizer's count at which this run, or the one that it resumes, began.

        A backup in mid-epoch does not tell: Keras replays the epoch's batches. So the count is kept beside it.
        """
        count = self._iterations()
        resumed = count - int(epoch * (steps or 0) / self._accumulation)
        for callback in self._beside:
            if isinstance(callback, keras.callbacks.BackupAndRestore):
                kept = pathlib.Path(callback.backup_dir) / _ORIGIN_FILE
                if pathlib.Path(callback._training_metadata_path).exists():
                    return int(kept.read_text()) if kept.exists() else resumed
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_text(str(resumed))
        return resumed

    @property
    def _accumulation(self) -> int:
        optimizer = getattr(self._model.optimizer, "inner_optimizer", self._model.optimizer)
        return getattr(optimizer, "gradient_accumulation_steps", None) or 1

    def _iterations(self) -> int:
        return int(keras.ops.convert_to_numpy(self._model.optimizer.iterations))

    def _warn_of_early_picks(self) -> None:
        if self.reached:
            return
        early = [
            type(callback).__name__
            for callback in self._beside
            if getattr(callback, "restore_best_weights", False) or getattr(callback, "save_best_only", False)
        ]
        if early:
            warnings.warn(
                f"{' and '.join(early)} may pick weights from before the target is reached, which score better because "
                "they are less compressed. Wrap it: keras_squeeze.AfterTarget(...).",
                stacklevel=2,
            )


def sum_fractions(parts: Mapping[Hashable, tuple[int, int]]) -> float:
    """Returns the sum of the parts over the sum of the wholes."""
    return sum(part for part, _ in parts.values()) / max(sum(whole for _, whole in parts.values()), 1)
