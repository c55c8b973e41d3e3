"""What to try next: a configuration proposed by Optuna or, where it has nothing new, drawn by chance."""

import contextlib
import functools
import itertools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from keras_squeeze.search.configurations import (
    allowed_values,
    configurations,
    filled,
    finite_values,
    identity,
    is_active,
    is_ordered,
    is_smooth,
    nearest,
    value_at,
)

SAMPLERS = ("tpe", "nsga2", "random")

_GOOD, _CANDIDATES = 0.4, 4  # few candidates: a front of a few dozen trials needs more looking around than one best
_ATTEMPTS = 20  # to find a configuration that was not tried, by the sampler and then by chance
_FAR = 1e9  # stands for an infinite violation
_ENUMERABLE = 10_000  # spaces up to this size are searched to their last configuration


@dataclass(frozen=True)
class Observation:
    """A configuration that was tried.

    Attributes:
        values: The active hyperparameters.
        objectives: What came out, one number for each objective; None while it runs.
        violation: How far it is outside the budgets; 0 inside.
        failed: Whether nothing came out.
    """

    values: Mapping[str, Any]
    objectives: tuple[float, ...] | None
    violation: float = 0.0
    failed: bool = False


@dataclass(frozen=True)
class Proposer:
    """Finds the next configuration.

    Attributes:
        space: Keras Tuner's hyperparameters, in any order.
        directions: `"max"` or `"min"` for each objective.
        sampler: One of `SAMPLERS`.
        seed: Seed of this one proposal.
        max_trials: How many configurations the search will try.
    """

    space: Sequence[Any]
    directions: Sequence[str]
    sampler: str
    seed: int
    max_trials: int

    def propose(self, observations: Sequence[Observation]) -> dict[str, Any] | None:
        """A configuration that was not tried: the sampler's, else a random one; None where there is none left.

        Args:
            observations: What was tried, oldest first.
        """
        tried = {identity(observation.values) for observation in observations}
        with contextlib.nullcontext() if self.sampler == "random" else _quiet_optuna():
            for values in itertools.chain(self._sampled(observations), self._random(10 * _ATTEMPTS)):
                if identity(values) not in tried:
                    return values
        everything = list(itertools.islice(configurations(self.space), _ENUMERABLE + 1))
        untried = [values for values in everything if identity(values) not in tried]
        if not untried or len(everything) > _ENUMERABLE:
            return None
        return untried[np.random.default_rng(self.seed).integers(len(untried))]

    def _random(self, count: int) -> Iterator[dict[str, Any]]:
        rng = np.random.default_rng(self.seed)
        return (filled(self.space, functools.partial(_random_value, rng)) for _ in range(count))

    def _sampled(self, observations: Sequence[Observation]) -> Iterator[dict[str, Any]]:
        if self.sampler == "random":
            return
        study = self._study(observations)
        for _ in range(_ATTEMPTS):
            trial = study.ask()  # one that is a repetition stays open, so that the sampler looks elsewhere
            yield filled(self.space, functools.partial(_suggested, trial))

    def _study(self, observations: Sequence[Observation]):
        """What was tried, as Optuna knows it."""
        import optuna

        names = {"max": optuna.study.StudyDirection.MAXIMIZE, "min": optuna.study.StudyDirection.MINIMIZE}
        sampler = self._optuna_sampler()
        study = optuna.create_study(directions=[names[x] for x in self.directions], sampler=sampler)
        generations = isinstance(sampler, optuna.samplers.NSGAIISampler)
        for observation in (x for x in observations if not x.failed):
            finished = observation.objectives is not None
            state = optuna.trial.TrialState
            params, distributions = _as_params(self.space, observation.values)
            study.add_trial(
                optuna.trial.create_trial(
                    state=state.COMPLETE if finished and not generations else state.RUNNING,
                    values=observation.objectives if finished and not generations else None,
                    params=params,
                    distributions=distributions,
                    constraints={"budgets": min(observation.violation, _FAR)} if finished else None,
                )
            )
            if finished and generations:  # NSGA-II notes to which generation a trial belongs before it ends
                trial = study.get_trials(deepcopy=False)[-1]
                sampler.get_trial_generation(study, trial)
                study.tell(trial.number, observation.objectives)
        return study

    def _optuna_sampler(self):
        import optuna

        if self.sampler == "nsga2":
            return optuna.samplers.NSGAIISampler(population_size=max(4, self.max_trials // 5), seed=self.seed)
        return optuna.samplers.TPESampler(
            multivariate=True,
            group=True,
            constant_liar=True,
            gamma=_good,
            n_ei_candidates=_CANDIDATES,
            n_startup_trials=min(10, max(4, self.max_trials // 4)),
            seed=self.seed,
        )


def _good(finished: int) -> int:
    """How many of the finished trials TPE imitates: more than its tenth, since a front is several points, not one."""
    return max(1, math.ceil(_GOOD * finished))


def _random_value(rng: np.random.Generator, hp) -> Any:
    if is_smooth(hp):
        return value_at(hp, rng.random())
    allowed = finite_values(hp)
    return allowed[int(rng.integers(len(allowed)))]


def _key(hp) -> str:
    """Its name for Optuna, to which hyperparameters of one name in different scopes are different ones."""
    return " | ".join([hp.name, *(f"{x.name} in {x.values}" for x in hp.conditions)])


def _distribution(hp):
    """Smooth ones as a fraction of their scale, ordered ones by their place, others as a category.

    Neighbors matter to a number even where it is a choice of a few, such as 8, 4, 2 or 1 bits: as places TPE learns
    from one about the next, and unequal gaps do no harm.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if is_smooth(hp):
        return FloatDistribution(0.0, 1.0)
    allowed = finite_values(hp)
    return IntDistribution(0, len(allowed) - 1) if is_ordered(hp) else CategoricalDistribution(range(len(allowed)))


def _suggested(trial, hp) -> Any:
    if is_smooth(hp):
        return value_at(hp, trial.suggest_float(_key(hp), 0.0, 1.0))
    allowed = finite_values(hp)
    if len(allowed) == 1:
        return allowed[0]
    if is_ordered(hp):
        return allowed[trial.suggest_int(_key(hp), 0, len(allowed) - 1)]
    return allowed[trial.suggest_categorical(_key(hp), list(range(len(allowed))))]


def _as_params(space: Sequence[Any], values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A configuration as Optuna's parameters and their distributions; what does not fit the space is left out."""
    params, distributions = {}, {}
    seen: set[str] = set()
    for hp in space:
        if hp.name in values and hp.name not in seen and is_active(hp, values):
            seen.add(hp.name)
            allowed = None if is_smooth(hp) else allowed_values(hp)
            if allowed is not None and len(allowed) == 1:
                continue
            with contextlib.suppress(ValueError):
                value = nearest(hp, values[hp.name])
                parameter = min(max(hp.value_to_prob(value), 0.0), 1.0) if allowed is None else allowed.index(value)
                params[_key(hp)], distributions[_key(hp)] = parameter, _distribution(hp)
    return params, distributions


@contextlib.contextmanager
def _quiet_optuna() -> Iterator[None]:
    """Without the announcements of every study, and without warnings of features that are called experimental."""
    import optuna

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            warnings.filterwarnings("ignore", "`gamma` has been deprecated", FutureWarning)  # goes with Optuna 6
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)
