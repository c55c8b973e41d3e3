"""What trials measured: read from them, compared, and put as the sampler wants it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keras_squeeze.search.configurations import filled, nearest
from keras_squeeze.search.objectives import direction_of, goodness, is_size

STOPPED_EARLY = "stopped_early"

_PATIENCE = 0.2  # how much better an unfinished model may still get, on the scale of an accuracy
_MARGIN = 0.02  # and how much two runs of one recipe may differ


def as_objectives(objectives: Sequence) -> list:
    """A `keras_tuner.Objective` for each name.

    Raises:
        TypeError: they are no list, or one is neither a name nor an `Objective`.
        ValueError: there is none, one is there twice, or a direction is unknown.
    """
    from keras_tuner import Objective

    if isinstance(objectives, (str, Mapping)) or not isinstance(objectives, Sequence):
        raise TypeError(f"`objectives` must be a list of names or `keras_tuner.Objective`s. Received: {objectives!r}")
    found = []
    for objective in objectives:
        if not isinstance(objective, (str, Objective)):
            raise TypeError(f"An objective must be a name or a `keras_tuner.Objective`. Received: {objective!r}")
        found.append(
            Objective(objective, direction_of(objective)) if isinstance(objective, str) else _checked(objective)
        )
    names = [objective.name for objective in found]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"`objectives` must be at least one, each once. Received: {names}")
    return found


def _checked(objective):
    if objective.direction not in ("max", "min") or not isinstance(objective.name, str):
        raise ValueError(f'The direction of an objective must be "max" or "min". Received: {objective}')
    return objective


def measured(trial) -> dict[str, float]:
    """What a trial reported last, by the name of the metric."""
    return {name: float(trial.metrics.get_last_value(name)) for name in trial.metrics.metrics}


def was_stopped(trial) -> bool:
    """Whether a trial was ended before its training was, so that its figures are those of an unfinished model."""
    return bool(measured(trial).get(STOPPED_EARLY, 0.0))


def flaw_of(metrics: Mapping[str, float], objectives: Sequence) -> str | None:
    """Why a trial with these metrics counts as failed; None where it does not."""
    missing = [x.name for x in objectives if x.name not in metrics]
    if missing:
        return f"It was not measured: {', '.join(missing)}."
    wrong = [f"{x.name} is {metrics[x.name]}" for x in objectives if not math.isfinite(metrics[x.name])]
    return f"An objective is no finite number: {', '.join(wrong)}." if wrong else None


def record(trial, name: str, direction: str, value: float, step: int) -> None:
    """Notes a metric; a second report of a step, such as that of a repeated run, takes the place of the first."""
    earlier = trial.metrics.get_history(name) if trial.metrics.exists(name) else []
    trial.metrics.metrics.pop(name, None)
    trial.metrics.register(name, direction)
    trial.metrics.set_history(name, [observation for observation in earlier if observation.step != step])
    trial.metrics.metrics[name].update(float(value), step)  # the tracker would look for the best, and warn of a NaN


def for_sampler(metrics: Mapping[str, float], objectives: Sequence) -> tuple[float, ...]:
    """The objectives of a trial as the sampler compares them: sizes by ratio, so as logarithms.

    TPE ranks by hypervolume. In bytes, the one model that is ten times too big would hide all differences among the
    small ones.
    """
    return tuple(
        math.log(max(metrics[x.name], np.finfo("float64").tiny)) if _is_cost(x) else metrics[x.name] for x in objectives
    )


def is_beyond_hope(metrics: Mapping[str, float], reports: Mapping[str, float], objectives: Sequence) -> bool:
    """Whether a finished trial beats an unfinished one for sure.

    It does where it is as small in every size, and better in everything else by more than what training may still
    bring: 0.2 of the scale of an accuracy times the fraction that is left, and 0.02.

    Args:
        metrics: What the finished one measured.
        reports: What the unfinished one reports: its objectives, and `done`, the fraction of the training so far.
        objectives: What counts. Where it is nothing but sizes, no trial is beyond hope.
    """
    margin = (1 - reports["done"]) * _PATIENCE + _MARGIN
    for objective in objectives:
        now = reports.get(objective.name, math.nan)
        if _is_cost(objective):
            if not metrics[objective.name] <= now * (1 + 1e-6):  # the way from a worker rounds
                return False
        elif not goodness(metrics[objective.name], objective.direction) - goodness(now, objective.direction) > margin:
            return False
    return not all(map(_is_cost, objectives))


def completed_recipe(space: Sequence, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Values for all active hyperparameters from some of them: moved to what is allowed, the rest by default.

    Raises:
        ValueError: a name is unknown, or a value is not allowed and not near to one that is.
    """
    names = {hp.name for hp in space}
    unknown = [name for name in recipe if name not in names]
    if unknown:
        raise ValueError(
            f"There is no hyperparameter {', '.join(map(repr, unknown))}. The space has: "
            f"{', '.join(sorted(names)) or 'none yet, so enqueue once there is a tuner'}. Received: {dict(recipe)}"
        )
    return filled(space, lambda hp: nearest(hp, recipe[hp.name]) if hp.name in recipe else hp.default)


def _is_cost(objective) -> bool:
    return objective.direction == "min" and is_size(objective.name)
