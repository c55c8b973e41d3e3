"""`CompressionTuner`: runs a search, on one machine or on several, and keeps every best trade-off."""

import contextlib
import json
import math
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import keras
import keras_tuner
from keras_tuner.src.distribute import utils as distributed
from keras_tuner.src.engine.tuner import maybe_distribute

from keras_squeeze.analysis import plots
from keras_squeeze.evaluation.layer_sensitivity import sensitivity as profile_of
from keras_squeeze.recipes.recipe import Recipe
from keras_squeeze.search.alive import Heartbeat, heartbeat_seconds, wait_for_chief
from keras_squeeze.search.artifacts import Result, write_result
from keras_squeeze.search.hypermodel import CompressionHyperModel, check_validation, split_validation
from keras_squeeze.search.objectives import Budgets, is_size, knee_point, pareto_front
from keras_squeeze.search.oracle import ParetoOracle
from keras_squeeze.search.seeding import first_configurations
from keras_squeeze.search.summaries import duration, extremes, in_words, table_of
from keras_squeeze.search.watching import HopelessTrialError, Watch

_WIDTH = 140  # of a table that goes to a file; on a narrower terminal recipes stand below it
_FEW_EPOCHS = 4  # of a trial, that is over before there is a reason to stop it


class CompressionTuner(keras_tuner.Tuner):
    """Searches for the best trade-offs between what a model is good for and what it costs.

    Every finished trial is a directory with the model, its `.tflite` and packed files, its recipe and a report. A
    search that was interrupted goes on where it was when the same lines run again.

    Several machines share a search by Keras Tuner's chief and workers: run the same script on each, with
    `KERASTUNER_ORACLE_IP`, `KERASTUNER_ORACLE_PORT` and `KERASTUNER_TUNER_ID` (`chief` on one of them) in the
    environment, and `directory` on a file system that all of them see.

    Args:
        hypermodel: A `CompressionHyperModel`.
        oracle: A `ParetoOracle`; None: the metric against `size_bytes`, 40 trials.
        directory, project_name: Results are in `directory/project_name`.
        overwrite: Whether to throw away what is there, rather than to go on with it.
        sensitivity: Whether the first trials come from a profile of the model, see `ks.sensitivity`, which takes one
            pass without training.
        stop_early: Whether trials that the front is far ahead of are ended half-way.
        dead_after: Seconds after which the chief takes a worker for dead that it has not heard of.
        distribution_strategy: A `tf.distribute.Strategy` that each trial trains under.

    Raises:
        TypeError: no such hypermodel or oracle.
        ValueError: the directory has another search in it.

    Example:

    ```python
    oracle = ks.ParetoOracle(["val_accuracy", "size_bytes"], max_trials=40)
    tuner = ks.CompressionTuner(hyper, oracle=oracle, directory="search")
    tuner.search(x, y, validation_data=(x_val, y_val), epochs=5)
    best = tuner.best(max_size_bytes=50_000)
    ```
    """

    def __init__(
        self,
        hypermodel: CompressionHyperModel,
        oracle: ParetoOracle | None = None,
        *,
        directory=None,
        project_name: str = "compression",
        overwrite: bool = False,
        sensitivity: bool = True,
        stop_early: bool = True,
        dead_after: float = 120.0,
        distribution_strategy=None,
    ):
        if not isinstance(hypermodel, CompressionHyperModel):
            raise TypeError(f"`hypermodel` must be a `CompressionHyperModel`. Received: {hypermodel!r}")
        if oracle is None:
            oracle = ParetoOracle([f"val_{hypermodel.metric}", "size_bytes"], max_trials=40)
        if not isinstance(oracle, ParetoOracle):
            raise TypeError(
                f"`oracle` must be a `ParetoOracle`. Received: {oracle!r}. With another one use that one's own tuner, "
                "such as keras_tuner.BayesianOptimization(hypermodel, ...)."
            )
        _check_objectives(oracle, hypermodel)
        self._profiled, self._stops, self._dead_after = sensitivity, stop_early, dead_after
        self._whole_oracle = oracle  # of a worker, `self.oracle` becomes a client of the chief's
        self._say: Callable[[str], None] = _say_nothing
        self._began, self._told, self._told_before = time.monotonic(), 0, 0
        is_worker = distributed.has_chief_oracle() and not distributed.is_chief_oracle()
        super().__init__(
            oracle,
            hypermodel,
            directory=None if directory is None else str(directory),
            project_name=project_name,
            overwrite=overwrite and not is_worker,  # the chief does it, once
            distribution_strategy=distribution_strategy,
        )

    def search(self, *args, **kwargs) -> None:
        """Runs trials until there are enough.

        Args:
            args, kwargs: As for `keras.Model.fit`: `x, y, validation_data=(x_val, y_val), epochs=5`. `callbacks` are
                copied for each trial; `verbose=0` says nothing, 1 a line for each trial, 2 each epoch as well.

        Raises:
            ValueError: there is no validation data.
            RuntimeError: every trial failed.
        """
        check_validation(kwargs)
        verbose = kwargs.pop("verbose", 1)
        self._whole_oracle.verbose = 0  # what is said about a trial is said here
        kwargs["verbose"] = 0 if verbose in (0, 1, "auto") else verbose
        say: Callable[[str], None] = print if verbose else _say_nothing
        if not self._is_worker():
            self._measure_before(args, kwargs)
            self._seed(args, kwargs, say)
        self._say, self._began = say, time.monotonic()
        self._told = self._told_before = len(self._whole_oracle.end_order)
        if distributed.is_chief_oracle():
            from keras_squeeze.search import chief

            self.save()
            chief.serve(self.oracle, dead_after=self._dead_after, on_change=self._tell)
        else:
            if self._is_worker():
                wait_for_chief()
            super().search(*args, **kwargs)
        if not self._is_worker():
            self._conclude()

    def run_trial(self, trial, *args, **kwargs) -> dict[str, float]:
        """Trains, finishes and measures one configuration."""
        keras.utils.clear_session()  # what earlier trials left behind
        recipe = self.hypermodel.space.recipe(trial.hyperparameters)
        directory = self.get_trial_dir(trial.trial_id)
        callbacks = self._deepcopy_callbacks(kwargs.pop("callbacks", None) or [])
        self._configure_tensorboard_dir(callbacks, trial)
        data = dict(zip(("x", "y"), args, strict=False))
        with contextlib.ExitStack() as stack:
            stack.enter_context(maybe_distribute(self.distribution_strategy))
            stack.enter_context(Heartbeat(self.oracle, trial.trial_id, heartbeat_seconds(self._dead_after)))
            if self._stops and kwargs.get("epochs", 1) >= _FEW_EPOCHS:
                callbacks.append(self._watch(recipe, trial.trial_id, {**data, **kwargs}))
            try:
                _, result = self.hypermodel.run(recipe, directory, **data, callbacks=callbacks, **kwargs)
            except HopelessTrialError as stopped:
                return stopped.metrics
        _write_scalars(result.metrics, callbacks)
        return result.metrics

    def on_trial_end(self, trial) -> None:
        """Reports the trial, and what the search has so far."""
        super().on_trial_end(trial)
        if not self._is_worker():
            self._tell()

    def load_model(self, trial) -> keras.Model:
        """The finished model of a trial."""
        return Result.read(self.get_trial_dir(trial.trial_id)).load_model()

    def results(self) -> list[Result]:
        """Every finished trial, in the order of the search."""
        directories = [pathlib.Path(self.get_trial_dir(trial.trial_id)) for trial in self._completed()]
        return [Result.read(directory) for directory in directories if (directory / "metrics.json").is_file()]

    def pareto_front(self) -> list[Result]:
        """The best trade-offs: no other trial is at least as good in every objective and better in one.

        Returns:
            Results, best metric first, each with `metrics`, `recipe`, `directory` and `load_model()`.
        """
        results = self.results()
        directions = {objective.name: objective.direction for objective in self._whole_oracle.objectives}
        front = [results[index] for index in pareto_front([result.metrics for result in results], directions)]
        metric = f"val_{self.hypermodel.metric}"
        return sorted(front, key=lambda r: r.metrics[metric], reverse=self.hypermodel.direction == "max")

    def best(self, **budgets: float) -> Result:
        """The result with the best metric inside of budgets.

        Args:
            budgets: `max_<metric>` or `min_<metric>`, such as `max_size_bytes=50_000`; those of the oracle hold anyway.

        Raises:
            ValueError: there is no result, or none within the budgets; it says which one comes nearest.
        """
        limits = Budgets.of(**budgets)
        results = self.results()
        if not results:
            raise ValueError("No trial is finished. Call `search` first.")
        inside = [r for r in results if limits.met_by(r.metrics) and self._whole_oracle.budgets.met_by(r.metrics)]
        if not inside:
            nearest = min(results, key=lambda r: limits.violation(r.metrics))
            raise ValueError(f"No trial keeps {limits.text()}. {extremes(results, limits)} The nearest is {nearest}")
        metric = f"val_{self.hypermodel.metric}"
        sign = 1 if self.hypermodel.direction == "max" else -1
        return max(inside, key=lambda r: (sign * r.metrics[metric], -r.metrics["size_bytes"]))

    def knee(self) -> Result:
        """The best trade-off between the objectives: past it, a little of one costs much of another.

        Sizes are compared by ratio.

        Raises:
            ValueError: no trial is finished.
        """
        results = self.results()
        if not results:
            raise ValueError("No trial is finished. Call `search` first.")
        objectives = self._whole_oracle.objectives
        points = [[_scaled(result.metrics[x.name], x.name) for x in objectives] for result in results]
        return results[knee_point(points, [x.direction for x in objectives])]

    def plot_pareto(self, path, *, x: str | None = None, y: str | None = None) -> pathlib.Path:
        """Draws all results and the front.

        Args:
            path: Where the picture goes; its suffix (`.png`, `.svg`, `.pdf`) chooses the format.
            x, y: The metrics on the axes; by default the last and the first objective.

        Returns:
            The path.

        Raises:
            ValueError: no trial is finished, or there is no such metric.
        """
        objectives = [objective.name for objective in self._whole_oracle.objectives]
        x, y = x or objectives[-1], y or objectives[0]
        results = self.results()
        for name in (x, y):
            if results and name not in results[0].metrics:
                names = ", ".join(results[0].metrics)
                raise ValueError(f"There is no metric {name!r}; there are {names}.")
        front = {result.directory for result in self.pareto_front()}
        points = [plots.FrontPoint(r.metrics[x], r.metrics[y], r.directory in front) for r in results]
        before = self._before()
        limits = [
            ("x" if name == x else "y", limit) for name, _, limit in self._whole_oracle.budgets.limits if name in (x, y)
        ]
        known_before = (before[x], before[y]) if before and {x, y} <= before.keys() else None
        return plots.plot_front(points, path, labels=(x, y), before=known_before, limits=limits)

    def results_summary(self, num_trials: int = 10) -> None:
        """Prints the best trade-offs as a table, and after them other trials, up to `num_trials` rows.

        Args:
            num_trials: How many rows at most.
        """
        from rich.console import Console

        front = self.pareto_front()
        shown = {result.directory for result in front}
        others = [result for result in self.results() if result.directory not in shown]
        rows = [*((result, True) for result in front), *((result, False) for result in others)][:num_trials]
        console = Console()
        width = console.width if console.is_terminal else _WIDTH
        console.print(table_of(rows, self._before(), recipes=width >= _WIDTH), width=width)
        if width < _WIDTH:
            for result, _ in rows:
                print(f"{result.trial}: {result.recipe}")
        print(f"Results are in {self.project_dir}. * is on the front: no other trial is better in every objective.")

    # Where things are.

    def _get_tuner_fname(self) -> str:
        """The oracle's, whoever runs the search, so that a single process reads what a chief began."""
        return str(pathlib.Path(self.project_dir, "oracle.json"))

    def save(self) -> None:
        if not self._is_worker():  # all there is to keep is the oracle's
            self.oracle.save()

    def reload(self) -> None:
        if self._is_worker():
            self._populate_initial_space()
            return
        self.oracle.reload()
        declared = keras_tuner.HyperParameters()
        self.hypermodel.space.recipe(declared)
        self.oracle.check_space(declared)

    def _run_and_update_trial(self, trial, *args, **kwargs) -> None:
        self.oracle.update_trial(trial.trial_id, self.run_trial(trial, *args, **kwargs))

    def _completed(self) -> list:
        if self._is_worker():
            raise ValueError("A worker does not know the results: ask the chief, or read the directory afterwards.")
        return self._whole_oracle.completed_trials()

    # Before the first trial.

    def _measure_before(self, args, kwargs) -> None:
        """What the search begins with, in the same files and by the same measures."""
        folder = pathlib.Path(self.project_dir, "before")
        if (folder / "metrics.json").is_file():
            stored, original = Result.read(folder).load_model(), self.hypermodel.model
            if [v.shape for v in stored.weights] != [v.shape for v in original.weights]:
                raise ValueError(
                    f"{self.project_dir} holds a search that began with a model of another shape, of "
                    f"{stored.count_params():,} parameters. Choose another directory, or pass overwrite=True. "
                    f"Received: model '{original.name}' of {original.count_params():,} parameters"
                )
            return
        write_result(
            self.hypermodel.model,
            Recipe(),
            folder,
            metric=self.hypermodel.metric,
            validation_data=_validation(args, kwargs),
            calibration_data=args[0] if args else kwargs.get("x"),
            artifact=self.hypermodel.artifact,
            latency=self.hypermodel.latency,
        )

    def _before(self) -> Mapping[str, float]:
        folder = pathlib.Path(self.project_dir, "before")
        return Result.read(folder).metrics if (folder / "metrics.json").is_file() else {}

    def _seed(self, args, kwargs, say) -> None:
        """Puts the first configurations in line."""
        if not self._profiled or self._whole_oracle.trials:
            return
        options = {"metric": self.hypermodel.metric, "groups": self.hypermodel.space.groups or None}
        profile = profile_of(self.hypermodel.model, _validation(args, kwargs), **options)
        pathlib.Path(self.project_dir, "sensitivity.json").write_text(json.dumps(profile.to_dict(), indent=2))
        count = self._whole_oracle.enqueue(first_configurations(profile, self.hypermodel.space))
        say(f"keras_squeeze: the first {count} trials come from a sensitivity profile of the model")

    # While it runs.

    def _watch(self, recipe: Recipe, trial_id: str, options: Mapping[str, Any]) -> Watch:
        sizes = self.hypermodel.estimate(recipe, x=options["x"], y=options.get("y"))
        return Watch(self.oracle, trial_id, f"val_{self.hypermodel.metric}", sizes, options["epochs"])

    def _tell(self, *_) -> None:
        """A line for each trial that has ended since the last time."""
        oracle = self._whole_oracle
        for trial_id in oracle.end_order[self._told :]:
            trial = oracle.trials[trial_id]
            self._told += 1
            self._say(f"keras_squeeze: trial {self._told} of {oracle.max_trials}, {in_words(trial, oracle)}")
            self._say(f"  {self._outlook()}")

    def _conclude(self) -> None:
        """What a search must not end with in silence: no result at all, or none that is of use."""
        oracle = self._whole_oracle
        oracle.check_failures(enough=1)
        results = self.results()
        if results and oracle.budgets.limits and not oracle.completed_trials(oracle.budgets):
            extreme_values = extremes(results, oracle.budgets)
            self._say(f"keras_squeeze: no trial keeps {oracle.budgets.text()}. {extreme_values}")

    def _outlook(self) -> str:
        """The front, the best within the budgets, and the time that is left."""
        oracle = self._whole_oracle
        parts = [f"{len(oracle.front_trials())} on the front"]
        if oracle.budgets.limits:
            inside = oracle.completed_trials(oracle.budgets)
            best = max((trial.score for trial in inside), default=None)
            parts.append("nothing within the budgets yet" if best is None else f"best within the budgets {best:.4g}")
        done = self._told - self._told_before
        remaining = oracle.max_trials - self._told
        if remaining and done:
            parts.append(f"about {duration((time.monotonic() - self._began) / done * remaining)} left")
        return "; ".join(parts)


def _scaled(value: float, name: str) -> float:
    return math.log(value) if is_size(name) and value > 0 else value


def _validation(args, kwargs):
    """The data that models are judged on, where it is given or split off."""
    data = dict(zip(("x", "y"), args, strict=False))
    options = {name: value for name, value in kwargs.items() if name in ("validation_split", "sample_weight")}
    x, y = (data.get(name, kwargs.get(name)) for name in ("x", "y"))
    return split_validation(x, y, options, kwargs.get("validation_data"))[1]


def _check_objectives(oracle: ParetoOracle, hypermodel: CompressionHyperModel) -> None:
    metrics = hypermodel.metrics
    for name in [*(objective.name for objective in oracle.objectives), *(name for name, _, _ in oracle.budgets.limits)]:
        if name not in metrics:
            raise ValueError(
                f"The search measures {', '.join(metrics)}. Received: an objective or a budget for {name!r}."
            )


def _write_scalars(metrics: Mapping[str, float], callbacks) -> None:
    """What the finished model measures, beside what TensorBoard saw while it trained."""
    import tensorflow as tf

    for callback in callbacks:
        if isinstance(callback, keras.callbacks.TensorBoard):
            writer = tf.summary.create_file_writer(callback.log_dir)
            with writer.as_default():
                for name, value in metrics.items():
                    tf.summary.scalar(name, value, step=0)
            writer.close()


def _say_nothing(text: str) -> None:
    """For `verbose=0`."""
