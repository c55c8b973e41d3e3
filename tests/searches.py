"""Searches that cost nothing: trials whose results are computed from their hyperparameters."""

import math

import keras_tuner as kt

from keras_squeeze.search.oracle import ParetoOracle


def space() -> kt.HyperParameters:
    """Every kind of hyperparameter, some in a scope, one name in two scopes."""
    hp = kt.HyperParameters()
    hp.Float("sparsity", 0, 0.95)
    hp.Choice("bits", [8, 4, 2, 1])
    hp.Choice("allocation", ["uniform", "global", "erk"])
    hp.Float("learning_rate", 1e-4, 1e-1, sampling="log")
    hp.Int("epochs", 1, 64, sampling="log")
    hp.Fixed("version", 3)
    hp.Boolean("distil")
    with hp.conditional_scope("distil", [True]):
        hp.Float("temperature", 1, 10, step=0.5)
    with hp.conditional_scope("allocation", ["global"]):
        hp.Int("update", 1, 9, step=2)
    with hp.conditional_scope("allocation", ["erk"]):
        hp.Int("update", 10, 30)
    return hp


def results(values: dict) -> dict[str, float]:
    """A surface like that of real models: flat, then steep; bits and zeros trade for accuracy."""
    lost = 2 * max(0.0, values["sparsity"] - 0.6) ** 2 + {8: 0, 4: 0.01, 2: 0.06, 1: 0.25}[values["bits"]]
    lost += 0.05 * (math.log10(values["learning_rate"]) + 2.5) ** 2 + 0.05 * values["sparsity"]
    lost *= {"uniform": 1.3, "global": 1.0, "erk": 0.9}[values["allocation"]]
    if values["distil"]:
        lost -= 0.01 - 0.002 * abs(values["temperature"] - 4)
    size = 1000 + 1e6 * (1 - values["sparsity"]) * values["bits"] / 8
    return {"val_accuracy": max(0.1, 0.99 - lost), "size_bytes": round(size)}


class Search(kt.Tuner):
    """Runs trials without a model."""

    def run_trial(self, trial, *args, **kwargs):
        return results(trial.hyperparameters.values)


def oracle(max_trials=20, objectives=("val_accuracy", "size_bytes"), hyperparameters=None, **kwargs) -> ParetoOracle:
    """One that does not print."""
    made = ParetoOracle(list(objectives), max_trials, hyperparameters=hyperparameters or space(), **kwargs)
    made.verbose = 0
    return made


def in_directory(made: ParetoOracle, directory) -> ParetoOracle:
    """As a tuner does it."""
    made._set_project_dir(str(directory), "search")
    return made


def ask_and_tell(made: ParetoOracle, compute=results, count=math.inf, tuner_id="tuner0") -> list[dict]:
    """Runs trials as a tuner does, until there are none or so many were run; returns what was tried."""
    tried = []
    while len(tried) < count:
        trial = made.create_trial(tuner_id)
        if trial.status == "STOPPED":
            break
        tried.append(dict(trial.hyperparameters.values))
        made.update_trial(trial.trial_id, compute(trial.hyperparameters.values))
        trial.status = "COMPLETED"
        made.end_trial(trial)
    return tried
