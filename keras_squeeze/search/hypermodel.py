"""`CompressionHyperModel`: what Keras Tuner builds and trains in each trial."""

import contextlib
import operator
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import keras
import keras_tuner
from keras_tuner import errors
from keras_tuner.src.engine.tuner_utils import SaveBestEpoch, TunerCallback

from keras_squeeze import checks
from keras_squeeze.evaluation.metrics import find_direction
from keras_squeeze.introspection.functional import compile_like, functional_of
from keras_squeeze.recipes.recipe import Recipe
from keras_squeeze.recipes.steps import FineTune
from keras_squeeze.search.artifacts import ARTIFACTS, Result, write_files, write_result
from keras_squeeze.search.objectives import Budgets, direction_of, forgiving_score, score
from keras_squeeze.search.space import CompressionSpace

_PARENT = "tuner/trial_id"  # where Hyperband says which trial to go on with
_TRAINED = "trained.keras"


class CompressionHyperModel(keras_tuner.HyperModel):
    """Compresses a trained model in another way in each trial, and measures what comes out.

    A trial takes a copy of the model, runs the recipe that the hyperparameters make, finishes it, writes its files,
    and reports what was measured on them: `val_<metric>` of the finished model, `size_bytes`, `tflite_bytes`,
    `packed_bytes`, `macs`, `energy_pj` and, where asked for, `latency_ms`. Works with every tuner of Keras Tuner.

    Args:
        model: A trained, compiled, Functional or Sequential model, or a function without arguments that makes one.
        space: What may vary; None: `CompressionSpace()`.
        metric: A metric that the model was compiled with, or `"loss"`. None: the first one.
        artifact: The file whose size is `size_bytes`: `"tflite"`, which runs anywhere, or `"packed"`, where zeros and
            bits below 4 count.
        latency: Whether to measure `latency_ms` as well, which takes a while and wants an idle machine.

    Raises:
        TypeError, ValueError: a model that is not compiled, not built or subclassed, a metric that it does not have,
            or no such artifact.

    Example:

    ```python
    hyper = ks.CompressionHyperModel(model, metric="accuracy")
    tuner = keras_tuner.BayesianOptimization(hyper, objective=hyper.objective(max_size_bytes=50_000), max_trials=20)
    tuner.search(x, y, validation_data=(x_val, y_val), epochs=5)
    ```
    """

    def __init__(
        self,
        model: keras.Model | Callable[[], keras.Model],
        space: CompressionSpace | None = None,
        *,
        metric: str | None = None,
        artifact: str = "tflite",
        latency: bool = False,
    ):
        super().__init__()
        self.model = _checked(model() if callable(model) and not isinstance(model, keras.Model) else model)
        self.space = CompressionSpace() if space is None else space
        if not isinstance(self.space, CompressionSpace):
            raise TypeError(f"`space` must be a `CompressionSpace`. Received: space={space!r}")
        self.metric = _find_metric(self.model, metric)
        self.direction = find_direction(self.model, self.metric) or direction_of(self.metric)
        checks.one_of("artifact", artifact, ARTIFACTS)
        self.artifact, self.latency = artifact, latency
        self._objectives: dict[str, tuple[Budgets, float | None]] = {}
        self._size_before: float | None = None
        self._finished: dict[str, pathlib.Path] = {}  # the directories of trials, by trial and by hyperparameters

    @property
    def metrics(self) -> list[str]:
        """The names of what is measured."""
        latency = ["latency_ms"] if self.latency else []
        return [f"val_{self.metric}", "size_bytes", "tflite_bytes", "packed_bytes", "macs", "energy_pj", *latency]

    def objective(self, *, forgiving: float | None = None, **budgets: float) -> keras_tuner.Objective:
        """One number to maximize, for tuners that take one: the metric, and below all of that what breaks a budget.

        Args:
            forgiving: How many percent of the metric a model may lose for every halving of `size_bytes`: AutoQKeras's
                forgiving factor, 8 there. None: size counts only where it has a budget.
            budgets: `max_<metric>` or `min_<metric>`, such as `max_size_bytes=50_000`.

        Raises:
            TypeError, ValueError: budgets that contradict each other, or that are none.
        """
        all_budgets = Budgets.of(**budgets)
        if forgiving is not None and (isinstance(forgiving, bool) or not forgiving > 0):
            raise ValueError(f"`forgiving` must be None or percent, above 0. Received: forgiving={forgiving!r}")
        details = [f"forgiving {forgiving:g} %"] if forgiving else []
        details += [all_budgets.text()] if budgets else []
        name = f"score({', '.join(details)})" if details else "score"
        self._objectives[name] = all_budgets, forgiving
        return keras_tuner.Objective(name, "max")

    def build(self, hp):
        """Declares the hyperparameters; a fresh copy of the model, or what was trained with them before."""
        self.space.recipe(hp)
        finished = self._finished.get(hp.values.get(_PARENT)) or self._finished.get(_key(hp))
        if finished is not None:
            model = keras.models.load_model(finished / _TRAINED, compile=False)
        else:
            model = keras.models.clone_model(self.model)
            model.set_weights(self.model.get_weights())
        compile_like(self.model, model)
        return model

    def fit(self, hp, model, x=None, y=None, *, validation_data=None, callbacks=None, **options) -> dict[str, float]:
        """Runs a trial for a tuner of Keras Tuner.

        Returns:
            What was measured.
        """
        others, saver, tuner, trial = _sorted(callbacks)
        epochs, first = options.pop("epochs", 1), options.pop("initial_epoch", 0)
        recipe, run, source = self.space.recipe(hp), None, None
        if hp.values.get(_PARENT):  # Hyperband has loaded the weights of that trial, whose recipe is done
            run, source, epochs = Recipe([FineTune()]), model, epochs - first
        with contextlib.ExitStack() as stack:
            folder = tuner.get_trial_dir(trial.trial_id) if tuner else stack.enter_context(_temporary())
            data = {"x": x, "y": y, "validation_data": validation_data}
            kwargs = {"epochs": epochs, "callbacks": others, **options}
            trained, result = self.run(recipe, folder, **data, continued=run, model=source, **kwargs)
            if saver is not None:
                trained.save(pathlib.Path(folder, _TRAINED))
                saver.set_model(trained)
                saver.on_epoch_end(epochs - 1, dict(result.metrics))
                self._finished[trial.trial_id] = self._finished[_key(hp)] = pathlib.Path(folder)
        return result.metrics

    def run(
        self, recipe: Recipe, directory, *, x, y=None, validation_data=None, continued=None, model=None, **options
    ) -> tuple[keras.Model, Result]:
        """Runs a recipe on a copy of the model, and measures what comes out.

        Args:
            recipe: The recipe.
            directory: Where the files go.
            x, y: Training data.
            validation_data: What the metric is computed on.
            continued: A recipe to run instead, on a model with which the first one was done already.
            model: That model.
            options: As for `Recipe.fit`.

        Returns:
            The trained model, with its quantizers, and the result.
        """
        (x, y, weights), validation_data = split_validation(x, y, options, validation_data)
        options = {
            "validation_data": validation_data,
            **options,
            **({} if weights is None else {"sample_weight": weights}),
        }
        with _begun_once(options.pop("callbacks", None)) as callbacks:
            trained = (continued or recipe).fit(model or self.model, x, y, callbacks=callbacks, **options)
        result = write_result(
            trained,
            recipe,
            directory,
            metric=self.metric,
            validation_data=validation_data,
            calibration_data=x,
            artifact=self.artifact,
            latency=self.latency,
        )
        for objective, (budgets, forgiving) in self._objectives.items():
            result.metrics[objective] = self._score(result.metrics, budgets, forgiving)
        return trained, result

    def _score(self, metrics: dict[str, float], budgets: Budgets, forgiving: float | None) -> float:
        name = f"val_{self.metric}"
        plain = score(metrics, name, self.direction, budgets)
        if forgiving is None or not budgets.met_by(metrics):
            return plain
        if self._size_before is None:
            with _temporary() as folder:
                sizes, _ = write_files(self.model, pathlib.Path(folder), None, artifact=self.artifact)
            self._size_before = sizes["size_bytes"]
        return forgiving_score(metrics, name, self.direction, "size_bytes", self._size_before, percent=forgiving)

    def estimate(self, recipe: Recipe, *, x, y=None) -> dict[str, float]:
        """What a trial's model will take, by running its recipe without training: bytes, MACs, energy.

        Args:
            recipe: The recipe.
            x, y: Training data, of which the first examples are used.
        """
        untrained = recipe.fit(self.model, x, y, epochs=0, verbose=0)
        with _temporary() as folder:
            return write_files(untrained, pathlib.Path(folder), x, artifact=self.artifact)[0]


_temporary = tempfile.TemporaryDirectory


def check_validation(options) -> None:
    """Raises what ends a search at once where there is no data to judge a model on."""
    if options.get("validation_data") is None and not options.get("validation_split"):
        raise errors.FatalValueError(
            "The finished model of each trial is measured on validation data: pass validation_data=(x_val, y_val) to "
            "`search`. Received: validation_data=None"
        )


def split_validation(x, y, options: dict[str, Any], validation_data):
    """Training and validation data, where Keras would split one off the other: the last part, in order."""
    check_validation({**options, "validation_data": validation_data})
    part, weights = options.pop("validation_split", 0.0), options.pop("sample_weight", None)
    if validation_data is not None:
        return (x, y, weights), validation_data
    size = len(keras.tree.flatten(x)[0])
    begin = int(size * (1 - part))
    if not 0 < begin < size:
        raise errors.FatalValueError(f"`validation_split` must be in (0, 1). Received: validation_split={part}")
    data = (x, y) if weights is None else (x, y, weights)
    first, last = (
        keras.tree.map_structure(operator.itemgetter(bounds), data)
        for bounds in (slice(None, begin), slice(begin, None))
    )
    return (*first, None)[:3], last


def _sorted(callbacks) -> tuple[list, SaveBestEpoch | None, Any, Any]:
    """The callbacks of a user, and what Keras Tuner adds to them."""
    callbacks = list(callbacks or ())
    saver = next((callback for callback in callbacks if isinstance(callback, SaveBestEpoch)), None)
    ours = next((callback for callback in callbacks if isinstance(callback, TunerCallback)), None)
    others = [callback for callback in callbacks if callback is not saver]
    return others, saver, *((None, None) if ours is None else (ours.tuner, ours.trial))


@contextlib.contextmanager
def _begun_once(callbacks) -> Iterator[list]:
    """The callbacks without that of TensorBoard's hyperparameters, which bears one `fit` only: it sees all of them."""
    callbacks = list(callbacks or ())
    hparams = [each for each in callbacks if type(each).__module__.startswith("tensorboard.plugins.hparams")]
    for callback in hparams:
        callback.on_train_begin()
    yield [each for each in callbacks if each not in hparams]
    for callback in hparams:
        callback.on_train_end()


def _key(hp) -> str:
    return repr(sorted(hp.values.items(), key=str))


def _checked(model) -> keras.Model:
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a `keras.Model`, or a function that makes one. Received: {model!r}")
    if not model.built or functional_of(model) is None:
        raise ValueError(f"The search needs a built Functional or Sequential model. Received: '{model.name}'")
    if not model.compiled:
        raise ValueError(
            f"Model '{model.name}' is not compiled, so that it can be neither trained nor judged. Call "
            "model.compile(optimizer, loss, metrics=[...]) first."
        )
    return model


def _find_metric(model: keras.Model, metric: str | None) -> str:
    names = [*_names(model._compile_config.config.get("metrics")), "loss"]
    if metric is None:
        return names[0]
    name = metric.removeprefix("val_") if isinstance(metric, str) else metric
    if name not in names:
        raise ValueError(
            f"Model '{model.name}' was not compiled with this metric. It has: {', '.join(names)}. Received: "
            f"metric={metric!r}"
        )
    return name


def _names(metrics) -> list[str]:
    """What Keras calls the metrics of `compile`; those of several outputs have the output's name before theirs."""
    if metrics is None:
        return []
    if isinstance(metrics, dict):
        return [f"{output}_{name}" for output, part in metrics.items() for name in _names(part)]
    names = []
    for metric in metrics if isinstance(metrics, (list, tuple)) else [metrics]:
        if isinstance(metric, str):
            names.append(metric)
        elif isinstance(metric, (list, tuple)):
            names += _names(metric)
        elif metric is not None:
            names.append(str(getattr(metric, "name", None) or getattr(metric, "__name__", metric)))
    return names
