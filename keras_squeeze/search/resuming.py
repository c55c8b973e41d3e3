"""An oracle of Keras Tuner that outlives what runs it: a killed process, a dead worker, a recipe that fails."""

import math
import pathlib
import threading
import time
from typing import Any

import keras_tuner
from keras_tuner.engine.trial import Trial, TrialStatus

from keras_squeeze.search.saving import check_same_objectives, check_same_space, load_json, load_trials, save_json

_ENDED = (TrialStatus.COMPLETED, TrialStatus.FAILED)

_HOPELESS = 10  # when so many trials were made and all failed, the reason is not the recipes
_TIMES_LOST = 2  # how often a trial is begun again after what ran it had died


class ResumableOracle(keras_tuner.Oracle):
    """The bookkeeping of a search; what is tried, and how good it is, is for the subclass to say.

    Every file is written whole or not at all, the trial before the list of trials. What was running when the process
    was killed is run again under its id. Trials that fail in a row do not end the search.

    Attributes:
        objectives: What is searched for; `objective` is the first of them.
        lock: Held while anything changes. The base class's own stays closed for good after an error.
        last_seen: When a trial last gave a sign of life, in seconds of `time.monotonic`.
        dead_after: Seconds without one after which somebody else may run it.
    """

    def __init__(self, objectives: list, max_trials: int, *, seed: int | None = None, **kwargs):
        super().__init__(objective=objectives[0], max_trials=max_trials, **kwargs)
        if seed is not None:
            self.seed = seed  # the base class takes 0 for none
        self.objectives = objectives
        self.lock = threading.RLock()
        self.last_seen: dict[str, float] = {}
        self.dead_after = math.inf
        self._lost: dict[str, int] = {}

    def flaw(self, trial: Trial) -> str | None:
        """Why a finished trial counts as failed; None where it does not."""
        raise NotImplementedError

    def create_trial(self, tuner_id: str) -> Trial:
        """The next trial for a tuner: one to be run again, else a new one, else one with status `"STOPPED"`."""
        with self.lock:
            if tuner_id in self.ongoing_trials:
                return self.ongoing_trials[tuner_id]
            trial = self._retried() or self._started()
            if trial.status != TrialStatus.RUNNING:
                self.tuner_ids.discard(tuner_id)
                return trial
            self.tuner_ids.add(tuner_id)
            self.ongoing_trials[tuner_id] = trial
            self._save_trial(trial)
            self.save()
            self._display.on_trial_begin(trial)
            return trial

    def end_trial(self, trial: Trial, tuner_id: str | None = None) -> None:
        """Ends a trial, or sends it to be run again where it failed and may.

        Args:
            trial: With its status and, where it failed, the message.
            tuner_id: Who ends it, where that is known. A trial that was given to somebody else meanwhile, because this
                one was thought dead, is ended only by a result: the first one counts.

        Raises:
            RuntimeError: all trials failed, and they were many.
        """
        with self.lock:
            stored = self.trials[trial.trial_id]
            given_away = tuner_id is not None and self.ongoing_trials.get(tuner_id) is not stored
            useless = trial.status != TrialStatus.COMPLETED or self.flaw(stored) is not None
            if self.has_ended(trial.trial_id) or (given_away and useless):
                return
            stored.hyperparameters, stored.status, stored.message = trial.hyperparameters, trial.status, trial.message
            self.update_space(trial.hyperparameters)
            self._close(stored)
            if stored.trial_id in self._display.trial_start:
                self._display.on_trial_end(stored)
            self.check_failures(_HOPELESS)

    def abandon(self, tuner_id: str, reason: str) -> None:
        """Gives up a tuner that died: its trial is run again or, after too many such ends, failed."""
        with self.lock:
            self.tuner_ids.discard(tuner_id)
            trial = self.ongoing_trials.get(tuner_id)
            if trial is not None:
                self._forget(trial.trial_id)
                self._lose(trial, reason)
                self._save_trial(trial)
                self.save()

    def get_space(self):
        """A copy of the space."""
        with self.lock:
            return super().get_space()

    def update_space(self, hyperparameters) -> None:
        """Adds hyperparameters that are new."""
        with self.lock:
            super().update_space(hyperparameters)

    def has_ended(self, trial_id: str) -> bool:
        """Whether a trial has its result; its status may say so before, since a tuner in this process sets it."""
        return trial_id in self.end_order

    def unfinished(self) -> int:
        """How many trials are still to be ended, of those that were begun."""
        return len(self.trials) - len(self.end_order)

    def check_failures(self, enough: int) -> None:
        """Failures in a row are not the end; nothing but failures is.

        Args:
            enough: How many trials must have ended before that is said.

        Raises:
            RuntimeError: all trials failed; the message has that of the last one.
        """
        ended = [self.trials[trial_id] for trial_id in self.end_order]
        if len(ended) >= enough and all(trial.status == TrialStatus.FAILED for trial in ended):
            failed = "The only trial" if len(ended) == 1 else f"All {len(ended)} trials"
            raise RuntimeError(f"{failed} failed, the last one so:\n{ended[-1].message or 'no message'}")

    def check_space(self, hyperparameters) -> None:
        """Compares the space of a search that was reloaded with the one that is declared now.

        Raises:
            ValueError: they differ; the message says in what.
        """
        folder = pathlib.Path(self._project_dir)
        check_same_space(folder, self.hyperparameters.space, hyperparameters.space, complete=True)

    def get_state(self) -> dict[str, Any]:
        """What is written beside the trials."""
        objectives = [[objective.name, objective.direction] for objective in self.objectives]
        return {**super().get_state(), "objectives": objectives, "lost": self._lost}

    def set_state(self, state: dict[str, Any]) -> None:
        """Takes up what was written; trials that were running have no tuner any more."""
        super().set_state({**state, "ongoing_trials": {}})
        self._lost = state["lost"]

    def save(self) -> None:
        """Writes the state, all or nothing."""
        save_json(self._get_oracle_fname(), self.get_state())

    def reload(self) -> None:
        """Takes up a search where it was left, even where it was killed; writes nothing.

        Raises:
            ValueError: the directory holds another search, or a file is damaged.
        """
        with self.lock:
            folder = pathlib.Path(self._project_dir)
            state = load_json(pathlib.Path(self._get_oracle_fname()))
            check_same_objectives(folder, state.get("objectives"), [[x.name, x.direction] for x in self.objectives])
            given = self.hyperparameters.space
            self.trials = {trial.trial_id: trial for trial in map(Trial.from_state, load_trials(folder))}
            self.set_state(state)
            check_same_space(folder, self.hyperparameters.space, given, complete=False)
            self._repair()

    def _save_trial(self, trial: Trial) -> None:
        save_json(pathlib.Path(self._project_dir, f"trial_{trial.trial_id}", "trial.json"), trial.get_state())

    def _repair(self) -> None:
        """Makes the lists agree with the trials, which are written first."""
        for order in (self.start_order, self.end_order):
            order[:] = [trial_id for trial_id in order if trial_id in self.trials]
        self.start_order += [trial_id for trial_id in self.trials if trial_id not in self.start_order]
        for trial_id, trial in self.trials.items():
            if trial.status == TrialStatus.RUNNING:
                self._lose(trial, "The process ended while it ran.")
            elif trial.status in _ENDED and trial_id not in self.end_order:
                self.end_order.append(trial_id)
            if trial.status == TrialStatus.COMPLETED:
                self.score_trial(trial)
        self._retry_queue = [trial_id for trial_id in self.start_order if trial_id not in self.end_order]

    def _lose(self, trial: Trial, reason: str) -> None:
        times = self._lost[trial.trial_id] = self._lost.get(trial.trial_id, 0) + 1
        trial.status, trial.message = TrialStatus.INVALID, reason
        if times <= _TIMES_LOST:
            self._retry_queue.append(trial.trial_id)
        else:
            trial.status, trial.message = TrialStatus.FAILED, f"{reason} So it did {times} times."
            self.end_order.append(trial.trial_id)

    def _close(self, trial: Trial) -> None:
        """What follows from the status that a trial ended with."""
        if trial.status == TrialStatus.COMPLETED:
            flaw = self.flaw(trial)
            if flaw is None:
                self.score_trial(trial)
            else:
                trial.status, trial.message = TrialStatus.FAILED, flaw
        self._run_times[trial.trial_id] += 1
        self._forget(trial.trial_id)
        if not self._retry(trial):
            self.end_order.append(trial.trial_id)
        self._save_trial(trial)
        self.save()

    def _retried(self) -> Trial | None:
        """The first trial in line to be run again, unless somebody who was thought dead is still at it."""
        for trial_id in self._retry_queue:
            if time.monotonic() - self.last_seen.get(trial_id, -math.inf) <= self.dead_after < math.inf:
                continue
            self._retry_queue.remove(trial_id)
            trial = self.trials[trial_id]
            trial.status, trial.message, trial.score = TrialStatus.RUNNING, None, None
            trial.metrics = type(trial.metrics)()
            return trial
        return None

    def _started(self) -> Trial:
        """A trial that is new; nothing is written."""
        hyperparameters = self.hyperparameters.copy()
        hyperparameters.values = {}
        if len(self.trials) >= self.max_trials:
            return Trial(hyperparameters, status=TrialStatus.STOPPED)
        number = next(n for n in range(len(self.trials), self.max_trials * 2) if f"{n:04d}" not in self.trials)
        response = self.populate_space(f"{number:04d}")
        hyperparameters.values = response["values"] or {}
        trial = Trial(hyperparameters, trial_id=f"{number:04d}", status=response["status"])
        if trial.status == TrialStatus.RUNNING:
            self.trials[trial.trial_id] = trial
            self.start_order.append(trial.trial_id)
        return trial

    def _forget(self, trial_id: str) -> None:
        """Nobody runs it any more."""
        for tuner_id in [key for key, trial in self.ongoing_trials.items() if trial.trial_id == trial_id]:
            del self.ongoing_trials[tuner_id]
        self._retry_queue = [other for other in self._retry_queue if other != trial_id]
        self.last_seen.pop(trial_id, None)
