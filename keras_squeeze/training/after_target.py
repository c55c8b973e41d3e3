"""`AfterTarget`: early stopping and best checkpoints that wait until the model is compressed."""

from typing import Any

import keras

from keras_squeeze.training.fit_run import FitRun

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
