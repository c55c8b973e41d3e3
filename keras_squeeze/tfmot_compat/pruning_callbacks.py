"""The callbacks that go with `PruneLowMagnitude`."""

import warnings

import keras

from keras_squeeze.tfmot_compat.layer_pruning import LayerPruning
from keras_squeeze.tfmot_compat.pruning_wrapper import PruneLowMagnitude
from keras_squeeze.training.fit_run import CompressionCallback


class UpdatePruningStep(CompressionCallback):
    """Prunes the wrapped layers of a model by their schedules while it trains. `fit` needs it.

    Masks are those of tfmot: chosen from the weights as they are before a step, at the steps that the schedule names.
    Steps are counted over several `fit`s. Better than in tfmot: weights are zero after every step and so in every
    checkpoint; of equal weights exactly as many are kept as asked for; the last update of a schedule always happens; a
    model without wrapped layers is an error, a `fit` that is too short for the schedule a warning. With
    `steps_per_execution` above 1 masks change between executions only. `logs` gets `sparsity`.

    In a training loop of your own, set the model and begin; the masks then follow the forward passes with
    `training=True`:

    ```python
    callback = tfmot.sparsity.keras.UpdatePruningStep()
    callback.set_model(model)
    callback.on_train_begin()
    ```

    Raises:
        ValueError: before the first batch, where the model has no wrapped layers with weights to prune.

    Example:

    ```python
    pruned.fit(x, y, epochs=2, callbacks=[tfmot.sparsity.keras.UpdatePruningStep()])
    ```
    """

    def __init__(self):
        super().__init__()
        self.prunable_layers: list[PruneLowMagnitude] = []
        self._parts: list[LayerPruning] = []
        self._total_steps: int | None = None
        self._begun = False

    def attach(self, model, optimizer, total_steps=None):
        layers = wrapped_layers(model)
        if not layers:
            raise ValueError(
                f"Model '{model.name}' has no layers to prune. Wrap it first: "
                "model = tfmot.sparsity.keras.prune_low_magnitude(model)."
            )
        self.prunable_layers, self._total_steps, self._begun = layers, total_steps, False
        self._parts = []
        for layer in layers:
            layer.pruning = layer.pruning or LayerPruning(layer)
            layer.pruning.attach(model, optimizer)
            self._parts.append(layer.pruning)
        for part in self._parts:
            part.driver = self

    def update(self, step):
        at_the_end = self._total_steps is not None and step >= self._total_steps  # what is due belongs to the next step
        for part in self._parts:
            if at_the_end and self._begun:
                part.count(step)
            else:
                part.advance(step)
        if not self._begun:
            self._begun = True
            self._warn_of_late_schedules()

    def detach(self):
        """Lets go of the model, whose masks stay."""
        for part in self._parts:
            part.driver = None

    @property
    def next_update(self):
        steps = [part.next_in_fit() for part in self._parts]
        return min((step for step in steps if step is not None), default=None)

    @property
    def reached(self):
        return all(part.reached for part in self._parts)

    def progress(self):
        return {"sparsity": {key: zeros for part in self._parts for key, zeros in part.progress()["sparsity"].items()}}

    def finish(self, step, verbose):
        self.update(step)
        early = [part for part in self._parts if part.started and not part.reached]
        if early:
            warnings.warn(
                f"Training ended at step {step}, before the end of the pruning schedule of {_names(early)}: the "
                f"sparsity is {early[0].sparsity:.4f} so far. The next `fit` goes on from here.",
                stacklevel=2,
            )

    def on_train_begin(self, logs=None):
        if self.params:
            super().on_train_begin(logs)
            return
        self.attach(self.model, getattr(self.model, "optimizer", None))
        for part in self._parts:
            part.driver, part.by_hand = None, True

    def on_epoch_begin(self, epoch, logs=None):
        if self._run is not None:
            super().on_epoch_begin(epoch, logs)

    def on_epoch_end(self, epoch, logs=None):
        if self._run is not None:
            super().on_epoch_end(epoch, logs)
        for part in self._parts:
            if part.by_hand:
                part.mask_again()

    def on_train_end(self, logs=None):
        if self._run is not None:
            super().on_train_end(logs)

    def _warn_of_late_schedules(self) -> None:
        total = self._total_steps
        late = [part for part in self._parts if not part.started and total and (part.next_in_fit() or 0) >= total]
        if late:
            first = min(part.next_in_fit() or 0 for part in late) + 1
            warnings.warn(
                f"Nothing will be pruned in {_names(late)} by this `fit`: it has {total} steps, and the first update "
                f"is at step {first}. Let the schedule begin earlier or lower its `frequency`, or train longer.",
                stacklevel=2,
            )


class PruningSummaries(keras.callbacks.TensorBoard):
    """Writes the sparsity of every pruned weight, and the least magnitude that is kept, for TensorBoard.

    They are written when an epoch begins, and unlike in tfmot at the end of the training, too.

    Args:
        log_dir: Directory of the logs; these go to `metrics` in it.
        update_freq, **kwargs: As in `keras.callbacks.TensorBoard`.

    Raises:
        ValueError: `log_dir` is no path.
    """

    def __init__(self, log_dir, update_freq="epoch", **kwargs):
        if not isinstance(log_dir, str) or not log_dir:
            raise ValueError(f"`log_dir` must be the path of a directory, a string. Received: log_dir={log_dir!r}")
        super().__init__(log_dir=log_dir, update_freq=update_freq, **kwargs)
        self._file_writer = None

    def on_epoch_begin(self, epoch, logs=None):
        if logs is not None:
            super().on_epoch_begin(epoch, logs)
        self._write()

    def on_train_end(self, logs=None):
        super().on_train_end(logs)
        self._write()

    def _write(self) -> None:
        import tensorflow as tf

        if self._file_writer is None:
            self._file_writer = tf.summary.create_file_writer(f"{self.log_dir}/metrics")
        optimizer = getattr(self.model, "optimizer", None)
        step = 0 if optimizer is None else int(keras.ops.convert_to_numpy(optimizer.iterations))
        with self._file_writer.as_default():
            for layer in wrapped_layers(self.model):
                for variable, mask, threshold in layer.pruning_vars:
                    tf.summary.scalar(f"{layer.name}/{variable.name}/sparsity", 1 - mask.mean(), step=step)
                    tf.summary.scalar(f"{layer.name}/{variable.name}/threshold", threshold, step=step)
            self._file_writer.flush()


def wrapped_layers(model) -> list[PruneLowMagnitude]:
    """The wrappers in a model around layers with weights to prune, each once."""
    return [layer for layer in model._flatten_layers() if isinstance(layer, PruneLowMagnitude) and layer.prunes]


def _names(parts) -> str:
    names = ", ".join(part.wrapper.layer.name for part in parts[:5])
    return names if len(parts) <= 5 else f"{names} and {len(parts) - 5} more"
