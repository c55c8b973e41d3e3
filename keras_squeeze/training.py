"""What every compression callback shares: the run of `fit`, its clock, its logs, and the callbacks beside it."""

import inspect
import pathlib
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from typing import Any, ClassVar

import keras

from keras_squeeze.selection import require_tensorflow

# By the name under which a callback may define the same.
_GATED_EVENTS = {
    "on_epoch_begin": "on_epoch_begin",
    "on_epoch_end": "on_epoch_end",
    "on_train_batch_begin": "on_batch_begin",
    "on_train_batch_end": "on_batch_end",
    "on_test_begin": "on_test_begin",
    "on_test_end": "on_test_end",
    "on_test_batch_begin": "on_test_batch_begin",
    "on_test_batch_end": "on_test_batch_end",
}

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

    _run: Any = None  # the FitRun, during `fit`

    @abstractmethod
    def attach(self, model: keras.Model, optimizer, total_steps: int | None = None) -> None:
        """Checks everything and takes hold of the model, whose weights stay as they are.

        Args:
            model: A built model.
            optimizer: The Keras optimizer that trains it.
            total_steps: Optimizer steps that will run; needed where a time is a fraction of the run.
        """

    @abstractmethod
    def update(self, step: int) -> None:
        """Does what is due after `step` optimizer steps, counted from `attach`. Cheap where nothing is."""

    @abstractmethod
    def detach(self) -> None:
        """Lets go of the model, whose weights stay as they are."""

    @property
    @abstractmethod
    def next_update(self) -> int | None:
        """The step at which `update` has something to do; None when all is done."""

    @property
    @abstractmethod
    def reached(self) -> bool:
        """Whether the target is reached."""

    @abstractmethod
    def progress(self) -> dict[str, dict[Hashable, tuple[int, int]]]:
        """What goes to `logs`: name -> {what is compressed: (part, whole)}.

        Callbacks of one `fit` are added up; where two compress the same thing, the larger part counts, since what one
        has compressed the other counts in.
        """

    def finish(self, step: int, verbose: bool) -> None:
        """Called once when `fit` ends, before `detach`."""

    def on_train_begin(self, logs=None):
        require_tensorflow()
        self._run = FitRun.join(self)

    def on_epoch_begin(self, epoch, logs=None):
        self._run.start(epoch)

    def on_epoch_end(self, epoch, logs=None):
        self._run.catch_up()  # a model with a `fit` of its own may never call its `train_function`

    def on_train_end(self, logs=None):
        self._run.leave(self)


class FitRun:
    """One run of `fit`, shared by its compression callbacks.

    Masks and bits must change right after an optimizer step, before any other callback sees the model, and
    their values must be in the logs that every callback gets. A callback's own events allow neither: they come in
    the order of the list, and Keras may call them from another thread. So the run wraps the model's
    `train_function` for its duration.

    Callbacks of one `fit` are recognised by `params`, the one dictionary that Keras hands to all of them.
    """

    _runs: ClassVar[weakref.WeakValueDictionary] = weakref.WeakValueDictionary()  # by the identity of `params`

    def __init__(self, callback: CompressionCallback):
        self.callbacks: list[CompressionCallback] = []
        self._model = callback.model
        self._params = callback.params
        self._beside = _callbacks_beside(callback)
        self._started = False
        self._origin = 0  # the optimizer's count when this run, or the one that it resumes, began
        self._step = 0  # known for sure
        self._batches = 0  # executed since `_step` was known
        # Constraints and wrappers are traced with the training step, so it must not have been traced yet.
        self._iterator: Any = None
        self.trace_anew()

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
        """The run that any callback of a `fit` belongs to; None where nothing is compressed."""
        return FitRun._runs.get(id(callback.params))

    @property
    def reached(self) -> bool:
        """Whether every callback has reached its target."""
        return self._started and all(callback.reached for callback in self.callbacks)

    def start(self, epoch: int) -> None:
        """Sets the clock and attaches the callbacks, at the first epoch: by then weights are restored."""
        if self._started:
            return
        total_steps = self._set_clock(epoch)
        self._started = True
        try:
            for callback in self.callbacks:
                callback.attach(self._model, self._model.optimizer, total_steps)
            for callback in self.callbacks:
                callback.update(self._step)
        except Exception:
            self._abandon()
            raise
        self._warn_of_early_picks()

    def catch_up(self) -> None:
        """Reads the clock and does what is due."""
        self._step = self._iterations() - self._origin
        self._batches = 0
        for callback in self.callbacks:
            callback.update(self._step)

    def logs(self) -> dict[str, float]:
        """The fraction that is done, by name."""
        found: dict[str, dict[Hashable, tuple[int, int]]] = {}
        for callback in self.callbacks:
            for name, parts in callback.progress().items():
                known = found.setdefault(name, {})
                known.update((key, max(pair, known.get(key, pair))) for key, pair in parts.items())
        return {name: fraction(parts) for name, parts in found.items()}

    def trace_anew(self) -> None:
        """Traces the training step again before the next one runs: what a callback changed is not in the graph."""
        self._model.make_train_function(force=True)
        self._train_function = self._model.train_function
        self._model.train_function = self._train_and_advance

    def leave(self, callback: CompressionCallback) -> None:
        """Ends a callback's part; the last one gives the model its own training step back."""
        if self._started:
            callback.finish(self._iterations() - self._origin, bool(self._params.get("verbose", 1)))
        callback.detach()
        callback._run = None
        self.callbacks.remove(callback)
        if not self.callbacks:
            self._close()

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

        One that was interrupted leaves its training step with the model, for the next to find. Looked up where Keras
        keeps its callbacks; asked once an epoch.
        """
        frame = inspect.currentframe()
        while frame:
            for value in (frame.f_locals.get("callbacks"), frame.f_locals.get("self")):
                if isinstance(value, keras.callbacks.CallbackList):
                    return any(callback in value.callbacks for callback in self.callbacks)
            frame = frame.f_back
        return False

    def _abandon(self) -> None:
        """Lets go of the model where `fit` will not do it."""
        for callback in self.callbacks:
            callback.detach()
            callback._run = None
        self._close()

    def _close(self) -> None:
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


class AfterTarget(keras.callbacks.Callback):
    """Lets a callback see the training only once every compression callback has reached its target.

    Early stopping and best-checkpointing would otherwise pick a model from early in the run, which scores
    better because it is not compressed yet. Where nothing is compressed, the callback sees everything.

    Args:
        callback: Any Keras callback, such as `EarlyStopping` or `ModelCheckpoint`.

    Example:

    ```python
    stop = keras.callbacks.EarlyStopping(patience=3, restore_best_weights=True)
    model.fit(x, y, callbacks=[ks.MagnitudePruning(0.9), ks.AfterTarget(stop)])
    ```
    """

    def __init__(self, callback: keras.callbacks.Callback):
        super().__init__()
        if not isinstance(callback, keras.callbacks.Callback):
            raise TypeError(f"`callback` must be a Keras callback. Received: {callback!r}")
        self.callback = callback
        self._epoch: Any = None  # the arguments of an `on_epoch_begin` that was held back
        for event, alias in _GATED_EVENTS.items():
            # Keras runs batches faster where no one listens.
            listens = [not getattr(getattr(callback, name), "_is_default", False) for name in (event, alias)]
            if any(listens) or event == "on_epoch_begin":
                setattr(self, event, self._gate(event))

    def _gate(self, event):
        method = getattr(self.callback, event)

        def forward(*args, **kwargs):
            run = FitRun.of(self)
            if event == "on_epoch_begin":
                self._epoch = args, kwargs
                if run is not None:
                    run.start(args[0])  # whatever the order of the callbacks
            if run is not None and not run.reached:
                return
            if self._epoch and event != "on_epoch_begin":  # the target was reached in mid-epoch
                self._forward_epoch()
            elif event == "on_epoch_begin":
                self._epoch = None
            method(*args, **kwargs)

        return forward

    def _forward_epoch(self) -> None:
        args, kwargs = self._epoch
        self._epoch = None
        self.callback.on_epoch_begin(*args, **kwargs)

    def set_params(self, params):
        super().set_params(params)
        self.callback.set_params(params)

    def set_model(self, model):
        super().set_model(model)
        self.callback.set_model(model)

    def on_train_begin(self, logs=None):
        self.callback.on_train_begin(logs)

    def on_train_end(self, logs=None):
        self.callback.on_train_end(logs)


def fraction(parts: Mapping[Hashable, tuple[int, int]]) -> float:
    """The sum of the parts over the sum of the wholes."""
    return sum(part for part, _ in parts.values()) / max(sum(whole for _, whole in parts.values()), 1)


def _callbacks_beside(callback: keras.callbacks.Callback) -> list[keras.callbacks.Callback]:
    """The callbacks of the same `fit`. Keras shows a callback no other, so this looks at who is calling it."""
    frame = inspect.currentframe()
    while frame:
        caller = frame.f_locals.get("self")
        if isinstance(caller, keras.callbacks.CallbackList) and callback in caller.callbacks:
            return list(caller.callbacks)
        frame = frame.f_back
    return []
