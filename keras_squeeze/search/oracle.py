"""`ParetoOracle`: Keras Tuner's oracle for several objectives at once, with Optuna's samplers."""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from keras_tuner.engine.trial import Trial, TrialStatus

from keras_squeeze import checks
from keras_squeeze.search.configurations import identity
from keras_squeeze.search.objectives import Budgets, direction_of, pareto_front
from keras_squeeze.search.results import (
    as_objectives,
    completed_recipe,
    flaw_of,
    for_sampler,
    is_beyond_hope,
    measured,
    record,
    was_stopped,
)
from keras_squeeze.search.resuming import ResumableOracle
from keras_squeeze.search.sampling import SAMPLERS, Observation, Proposer

PROGRESS = "progress/"  # metrics that tell how a trial is doing begin so, and are no results

_JUDGED_AFTER = 5  # no trial is stopped early before so many were finished


class ParetoOracle(ResumableOracle):
    """Searches for the best trade-offs between several objectives.

    It is used as any oracle of Keras Tuner: in `ks.CompressionTuner`, in a `keras_tuner.Tuner` of your own, alone or as
    the chief of several workers. Optuna chooses what to try; its study is rebuilt from the finished trials each time,
    so that a killed search goes on as if nothing had happened. No configuration is tried twice. A recipe that fails, or
    whose objective is NaN, is a failed trial and not the end of the search.

    Sizes (bytes, MACs, picojoules, milliseconds, parameters) are compared by ratio: the sampler gets their logarithms.

    Args:
        objectives: Names of metrics or `keras_tuner.Objective`s, at least one. A trial is scored by the first.
        max_trials: How many configurations are tried.
        sampler: `"tpe"` (multivariate, learns from the first trials on), `"nsga2"` (evolution, for hundreds of
            trials) or `"random"`.
        seed: The same seed gives the same search, also when it was interrupted; None draws one.
        hyperparameters: The space, or a part of it; the hypermodel may declare the rest.
        budgets: Limits beyond which a model is of no use: `Budgets`, or a dict such as `{"max_size_bytes": 50_000}`.
            The sampler avoids what lies beyond; such trials are kept and count as finished.
        max_retries_per_trial: How often a trial is run again that failed.

    Raises:
        ValueError: an argument is out of range, an objective is there twice, or its direction is unknown.
        TypeError: an objective is neither a name nor an `Objective`.

    Example:

    ```python
    oracle = ks.ParetoOracle(["val_accuracy", "size_bytes"], max_trials=40, seed=0)
    tuner = ks.CompressionTuner(hyper, oracle=oracle, directory="search")
    ```
    """

    def __init__(
        self,
        objectives: Sequence,
        max_trials: int,
        *,
        sampler: str = "tpe",
        seed: int | None = None,
        hyperparameters=None,
        budgets: Budgets | Mapping[str, float] | None = None,
        max_retries_per_trial: int = 0,
    ):
        max_trials = checks.positive_int("max_trials", max_trials)
        checks.one_of("sampler", sampler, SAMPLERS)
        super().__init__(
            as_objectives(objectives),
            max_trials,
            seed=seed,
            hyperparameters=hyperparameters,
            max_retries_per_trial=max_retries_per_trial,
        )
        self.sampler = sampler
        self.budgets = budgets if isinstance(budgets, Budgets) else Budgets.of(**(budgets or {}))
        self._progress: dict[str, dict[str, float]] = {}
        self._queue: list[dict[str, Any]] = []

    def enqueue(self, recipes: Iterable[Mapping[str, Any]]) -> int:
        """Puts configurations in line, to be tried before the sampler is asked.

        Args:
            recipes: Dicts from hyperparameter names to values. Numbers are moved to the nearest allowed value,
                hyperparameters that are not named get their default, and those that are inactive do not count.

        Returns:
            How many are new: those that were tried or are in line already are passed over.

        Raises:
            ValueError: a name is unknown, or a value is not among a hyperparameter's choices.
        """
        with self.lock:
            complete = [completed_recipe(self.hyperparameters.space, recipe) for recipe in recipes]
            seen = self._tried() | {identity(values) for values in self._queue}
            new = {identity(values): values for values in complete if identity(values) not in seen}
            self._queue += new.values()
            return len(new)

    def populate_space(self, trial_id: str) -> dict[str, Any]:
        """The next configuration, as Keras Tuner asks for it."""
        while self._queue:
            values = self._queue.pop(0)
            if identity(values) not in self._tried():
                return {"status": TrialStatus.RUNNING, "values": values}
        proposer = Proposer(
            space=self.hyperparameters.space,
            directions=[objective.direction for objective in self.objectives],
            sampler=self.sampler,
            seed=int(np.random.SeedSequence([abs(self.seed), len(self.start_order)]).generate_state(1)[0]),
            max_trials=self.max_trials,
        )
        proposal = proposer.propose([self._observation(self.trials[trial_id]) for trial_id in self.start_order])
        return {"status": TrialStatus.STOPPED if proposal is None else TrialStatus.RUNNING, "values": proposal}

    def update_trial(self, trial_id: str, metrics: Mapping[str, float], step: int = 0) -> Trial:
        """Takes what a trial measured, or how it is doing.

        Metrics named `progress/<name>` are reports on the way: `progress/<objective>` what an objective is now or is
        expected to be, `progress/done` the fraction of the training that is done, and `progress/alive` a sign of life.

        Returns:
            The trial. Its status is `"STOPPED"` where it has no chance to reach the front any more; the worker then
            ends it, and says so in a metric `stopped_early=1.0`.

        Raises:
            ValueError: an objective, or a metric that has a budget, is missing.
        """
        with self.lock:
            trial = self.trials[trial_id]
            if self.has_ended(trial_id):  # by another worker, after this one was thought dead
                return trial
            if any(name.startswith(PROGRESS) for name in metrics):
                return self._follow(trial, metrics)
            self._check_objective_found(metrics)
            self.budgets.violation(metrics)
            for name, value in metrics.items():
                record(trial, name, self._direction(name), value, step)
            self._save_trial(trial)
            return trial

    def flaw(self, trial: Trial) -> str | None:
        """Why a finished trial counts as failed: an objective is missing, or no finite number."""
        return flaw_of(measured(trial), self.objectives)

    def score_trial(self, trial: Trial) -> None:
        """The first objective of the finished model, whatever it was on the way."""
        trial.score, trial.best_step = measured(trial)[self.objective.name], 0

    def completed_trials(self, budgets: Budgets | None = None) -> list[Trial]:
        """Finished trials that were not stopped early, oldest first; with budgets those that keep them."""
        with self.lock:
            trials = [self.trials[trial_id] for trial_id in self.start_order]
        ended = [trial for trial in trials if trial.status == TrialStatus.COMPLETED and not was_stopped(trial)]
        return [trial for trial in ended if budgets is None or budgets.met_by(measured(trial))]

    def front_trials(self, budgets: Budgets | None = None) -> list[Trial]:
        """The best trade-offs, best first by the first objective; with budgets, of the trials that keep them."""
        trials = self.completed_trials(budgets)
        directions = {objective.name: objective.direction for objective in self.objectives}
        return [trials[index] for index in pareto_front([measured(trial) for trial in trials], directions)]

    def get_best_trials(self, num_trials: int = 1) -> list[Trial]:
        """The best by the first objective; before others those that ran to their end, inside the budgets."""
        with self.lock:
            sign = -1 if self.objective.direction == "max" else 1
            ended = [trial for trial in self.trials.values() if trial.status == TrialStatus.COMPLETED]
            others = [trial for trial in self.trials.values() if trial.status != TrialStatus.COMPLETED]
            ended.sort(key=lambda x: (was_stopped(x), not self.budgets.met_by(measured(x)), sign * x.score))
            return (ended if len(ended) >= num_trials else ended + others)[:num_trials]

    def get_state(self) -> dict[str, Any]:
        """What is written beside the trials."""
        return {**super().get_state(), "queue": self._queue}

    def set_state(self, state: dict[str, Any]) -> None:
        """Takes up what was written."""
        super().set_state(state)
        self._queue = state["queue"]

    def _follow(self, trial: Trial, metrics: Mapping[str, float]) -> Trial:
        """Notes a report, and answers whether to go on."""
        self.last_seen[trial.trial_id] = time.monotonic()
        reports = self._progress.setdefault(trial.trial_id, {})
        reports.update({name.removeprefix(PROGRESS): float(x) for name, x in metrics.items()})
        if f"{PROGRESS}done" not in metrics or not self._is_hopeless(reports):
            return trial
        answer = Trial(trial.hyperparameters, trial_id=trial.trial_id, status=TrialStatus.STOPPED)
        answer.metrics = trial.metrics
        return answer

    def _is_hopeless(self, reports: Mapping[str, float]) -> bool:
        if reports["done"] < 0.5 or len(self.completed_trials()) < _JUDGED_AFTER:
            return False
        return any(is_beyond_hope(measured(x), reports, self.objectives) for x in self.front_trials(self.budgets))

    def _forget(self, trial_id: str) -> None:
        super()._forget(trial_id)
        self._progress.pop(trial_id, None)

    def _tried(self) -> set[str]:
        return {identity(trial.hyperparameters.values) for trial in self.trials.values()}

    def _observation(self, trial: Trial) -> Observation:
        """A trial as the sampler sees it."""
        values = trial.hyperparameters.values
        if trial.status != TrialStatus.COMPLETED:
            return Observation(values, None, failed=trial.status == TrialStatus.FAILED)
        metrics = measured(trial)
        return Observation(values, for_sampler(metrics, self.objectives), self.budgets.violation(metrics))

    def _check_objective_found(self, metrics: Mapping[str, float]) -> None:
        missing = [objective.name for objective in self.objectives if objective.name not in metrics]
        if missing:
            raise ValueError(f"Objectives are missing: {', '.join(missing)}. Received: {', '.join(metrics)}")

    def _direction(self, name: str) -> str:
        """For metrics beside the objectives a guess does no harm: nothing is chosen by them."""
        directions = {objective.name: objective.direction for objective in self.objectives}
        try:
            return directions[name] if name in directions else direction_of(name)
        except ValueError:
            return "min"
