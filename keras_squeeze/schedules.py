"""Schedules: optimizer step -> sparsity. Pure: a schedule keeps no state and reads nothing.

Times are an int, a number of optimizer steps counted from where `fit` began, or a float in [0, 1], a fraction
of the steps that `fit` will run.
"""

import copy
import math
import numbers
import sys
from typing import Any

import keras

from keras_squeeze import checks
from keras_squeeze.configurable import Configurable

UPDATES_BY_DEFAULT = 100
"""At most this many updates are spread over a schedule's span unless `frequency` says otherwise; fewer where the run
is too short to pay for them."""


class Schedule(Configurable):
    """Base class: a value that moves from `initial` at `begin` to `final` at `end`, and stays there.

    A subclass says in `fraction_done` how far the value has moved at a fraction of the span.

    Args:
        final: Sparsity at `end` and after it, in [0, 1).
        initial: Sparsity at `begin`, in [0, 1). Nothing is pruned before `begin`.
        begin: Time of the first update; int steps or float fraction of the run.
        end: Time of the last update, which always happens whatever `frequency` divides.
        frequency: Steps between updates. None: as many updates as cost at most a few percent of the run, from 8 to
            about a hundred; see `training/update_cost.py`.

    Raises:
        ValueError: a value outside its range, or `begin` after `end`.
        TypeError: a value of the wrong type.
    """

    _updates = UPDATES_BY_DEFAULT

    def __init__(
        self,
        final: float,
        initial: float = 0.0,
        begin: int | float = 0.0,
        end: int | float = 0.75,
        frequency: int | None = None,
    ):
        self.final = checks.fraction("final", final)
        self.initial = checks.fraction("initial", initial)
        self.begin = check_time("begin", begin)
        self.end = check_time("end", end)
        if type(self.begin) is type(self.end) and self.begin > self.end:
            raise ValueError(_begin_after_end(begin, end))
        self.frequency = checks.positive_int("frequency", frequency, optional=True)

    def __call__(self, step: int, total_steps: int | None = None) -> float:
        """The value after `step` optimizer steps of a run of `total_steps`."""
        begin, end = self.span(total_steps)
        if step >= end:
            return self.final
        if step <= begin:
            return self.initial
        return self.initial + (self.final - self.initial) * self.fraction_done((step - begin) / (end - begin))

    def fraction_done(self, position: float) -> float:
        """How far the value has moved, 0 to 1, at a position 0 to 1 of the span."""
        raise NotImplementedError

    def span(self, total_steps: int | None = None) -> tuple[int, int]:
        """`begin` and `end` in steps.

        Raises:
            ValueError: a time is a fraction and the number of steps is not known, or `begin` is after `end`.
        """
        begin, end = (to_steps(time, total_steps) for time in (self.begin, self.end))
        if begin > end:
            raise ValueError(_begin_after_end(f"{self.begin!r} (step {begin})", f"{self.end!r} (step {end})"))
        return begin, end

    def last_update(self, step: int, total_steps: int | None = None) -> int | None:
        """The latest update at or before `step`; None before the first."""
        begin, end = self.span(total_steps)
        if step < begin:
            return None
        if step >= end:
            return end
        every = self._every(begin, end)
        return begin + (step - begin) // every * every

    def next_update(self, step: int, total_steps: int | None = None) -> int | None:
        """The first update after `step`; None when all are done."""
        begin, end = self.span(total_steps)
        if step < begin:
            return begin
        if step >= end:
            return None
        every = self._every(begin, end)
        return min(begin + ((step - begin) // every + 1) * every, end)

    def with_updates(self, count: int) -> "Schedule":
        """A copy that spreads so many updates over its span where `frequency` is None, one at `begin` not counted."""
        result = copy.copy(self)
        result._updates = count
        return result

    def interval(self, total_steps: int | None = None) -> int:
        """Steps between two updates; the length of the span where there is only one."""
        begin, end = self.span(total_steps)
        first = self.next_update(begin, total_steps)
        return max(end - begin, UPDATES_BY_DEFAULT) if first is None else first - begin

    def _every(self, begin: int, end: int) -> int:
        return self.frequency or max(1, math.ceil((end - begin) / self._updates))

    def get_config(self) -> dict[str, Any]:
        return {
            "final": self.final,
            "initial": self.initial,
            "begin": self.begin,
            "end": self.end,
            "frequency": self.frequency,
        }


@keras.saving.register_keras_serializable("keras_squeeze")
class Constant(Schedule):
    """`final` from `begin` on: one update, then the zeros stay where they are.

    Args:
        final: Sparsity, in [0, 1).
        begin: Time of the one update.
    """

    def __init__(self, final: float, begin: int | float = 0.0):
        super().__init__(final, initial=0.0, begin=begin, end=begin)

    def get_config(self):
        return {"final": self.final, "begin": self.begin}


@keras.saving.register_keras_serializable("keras_squeeze")
class PolynomialDecay(Schedule):
    """Density decays as a polynomial; with `power=3` the schedule known as automated gradual pruning.

    `initial + (final - initial) * (1 - (1 - p)**power)` at position p of the span: fast at first, when many
    weights are redundant, and slower towards the end.

    Args:
        final: Sparsity at `end`, in [0, 1).
        initial: Sparsity at `begin`, in [0, 1).
        begin: Time of the first update; int steps or float fraction of the run.
        end: Time of the last update. The default leaves the last quarter of the run to recover.
        frequency: Steps between updates; None: what the run can pay for.
        power: Positive exponent.

    Reference: Zhu & Gupta 2017, "To prune, or not to prune", equation 1, https://arxiv.org/abs/1710.01878
    """

    def __init__(
        self,
        final: float,
        initial: float = 0.0,
        begin: int | float = 0.0,
        end: int | float = 0.75,
        frequency: int | None = None,
        power: float = 3,
    ):
        super().__init__(final, initial, begin, end, frequency)
        if not checks.is_number(power) or not 0 < power < math.inf:
            raise ValueError(f"`power` must be a positive number. Received: power={power!r}")
        self.power = power

    def fraction_done(self, position):
        return 1.0 - (1.0 - position) ** self.power

    def get_config(self):
        return {**super().get_config(), "power": self.power}


@keras.saving.register_keras_serializable("keras_squeeze")
class Cosine(Schedule):
    """Half a cosine wave, `(1 - cos(pi * p)) / 2`: gentle at both ends."""

    def fraction_done(self, position):
        return (1.0 - math.cos(math.pi * position)) / 2.0


@keras.saving.register_keras_serializable("keras_squeeze")
class Exponential(Schedule):
    """Density decays exponentially: every update removes the same share of the weights that are left."""

    def fraction_done(self, position):
        if self.final == self.initial:
            return position
        kept = (1.0 - self.final) / (1.0 - self.initial)
        return (1.0 - kept**position) / (1.0 - kept)


@keras.saving.register_keras_serializable("keras_squeeze")
class OneCycle(Schedule):
    """A logistic ramp: little at first, most of the pruning around 40 % of the span, then little again.

    The published curve `(1 + exp(-14 + 6)) / (1 + exp(-14 p + 6))`, scaled to be exactly 0 and 1 at the ends.

    Reference: Hubens et al. 2021, "One-Cycle Pruning", https://arxiv.org/abs/2107.02086
    """

    def fraction_done(self, position):
        def logistic(p):
            return 1.0 / (1.0 + math.exp(-14.0 * p + 6.0))

        return (logistic(position) - logistic(0.0)) / (logistic(1.0) - logistic(0.0))


@keras.saving.register_keras_serializable("keras_squeeze")
class Steps(Schedule):
    """Prune, train on, prune again: `num_steps` jumps, each of which removes the same share of what is left.

    Args:
        final: Sparsity after the last jump, which falls on `end`.
        initial: Sparsity from `begin` until the first jump.
        begin: Time from which the intervals between jumps count.
        end: Time of the last jump.
        num_steps: Number of jumps.

    Reference: Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks",
        section 3.4 (iterative pruning), https://arxiv.org/abs/1506.02626
    """

    def __init__(
        self,
        final: float,
        initial: float = 0.0,
        begin: int | float = 0.0,
        end: int | float = 0.75,
        num_steps: int = 5,
    ):
        super().__init__(final, initial, begin, end)
        self.num_steps = checks.positive_int("num_steps", num_steps)

    def fraction_done(self, position):
        done = math.floor(position * self.num_steps + 1e-9) / self.num_steps  # 0.29 * 100 is below 29
        if self.final == self.initial:
            return done
        kept = (1.0 - self.final) / (1.0 - self.initial)
        return (1.0 - kept**done) / (1.0 - kept)

    def _jumps(self, total_steps):
        begin, end = self.span(total_steps)
        return [begin + math.ceil((end - begin) * jump / self.num_steps) for jump in range(self.num_steps + 1)]

    def last_update(self, step, total_steps=None):
        return max((jump for jump in self._jumps(total_steps) if jump <= step), default=None)

    def next_update(self, step, total_steps=None):
        return min((jump for jump in self._jumps(total_steps) if jump > step), default=None)

    def get_config(self):
        config = super().get_config()
        del config["frequency"]
        return {**config, "num_steps": self.num_steps}


class TfmotSchedule(Schedule):
    """A schedule of tensorflow-model-optimization, asked at the steps at which tfmot would ask it.

    One difference: an update at its `end_step` always happens. tfmot skips it where `frequency` does not divide
    the span, and then never reaches the final sparsity. An `end_step` of -1 means the end of the run.
    """

    def __init__(self, schedule):
        missing = [name for name in ("begin_step", "end_step", "frequency") if not hasattr(schedule, name)]
        if missing:
            raise TypeError(
                f"A tfmot schedule must have the attributes begin_step, end_step and frequency. {schedule!r} lacks: "
                f"{', '.join(missing)}"
            )
        self.schedule = schedule
        never_ends = schedule.end_step < 0
        super().__init__(
            final=_ask_tfmot(schedule, int(schedule.begin_step if never_ends else schedule.end_step)),
            initial=_ask_tfmot(schedule, int(schedule.begin_step)),
            begin=int(schedule.begin_step),
            end=1.0 if never_ends else int(schedule.end_step),
            frequency=int(schedule.frequency),
        )

    def __call__(self, step, total_steps=None):
        begin, end = self.span(total_steps)
        return _ask_tfmot(self.schedule, min(max(step, begin), end))

    def span(self, total_steps=None):
        if isinstance(self.end, float):
            return self.begin, max(self.begin, total_steps or 0)
        return self.begin, self.end

    def get_config(self):
        raise TypeError(
            "A tfmot schedule is not serialized by this package; use one of keras_squeeze.schedules instead. "
            f"Received: {self.schedule!r}"
        )

    def __repr__(self):
        return f"TfmotSchedule({self.schedule!r})"


def get(identifier) -> Schedule:
    """Turns what a user may write for a schedule into a `Schedule`.

    Args:
        identifier: A `Schedule`; a number, the final sparsity, for `PolynomialDecay(number)`; the config that
            `keras.saving.serialize_keras_object` made of a schedule; or a schedule object of
            tensorflow-model-optimization.

    Raises:
        TypeError: it is none of these.
        ValueError: a number outside [0, 1).
    """
    if isinstance(identifier, Schedule):
        return identifier
    if isinstance(identifier, dict):
        schedule = keras.saving.deserialize_keras_object(identifier)
        if isinstance(schedule, Schedule):
            return schedule
    if isinstance(identifier, numbers.Real) and not isinstance(identifier, bool):
        return PolynomialDecay(checks.fraction("sparsity", identifier))
    if _is_tfmot_schedule(identifier):
        return TfmotSchedule(identifier)
    raise TypeError(
        "A schedule must be the final sparsity as a number in [0, 1), a schedule from keras_squeeze.schedules, or "
        f"one of tensorflow-model-optimization. Received: {identifier!r}"
    )


def check_fires(schedule: Schedule, total_steps: int | None) -> None:
    """Raises a `ValueError` where a schedule would not do anything in a run of so many steps.

    Args:
        schedule: Any schedule.
        total_steps: Optimizer steps of the run; None where that is not known, and times are ints.
    """
    begin, end = schedule.span(total_steps)
    if total_steps is None:
        return
    last = schedule.last_update(total_steps, total_steps)
    if last is None or (schedule(last, total_steps) == 0 and schedule(end, total_steps) > 0):
        raise ValueError(
            f"Nothing would be pruned: the schedule goes from step {begin} to {end} (frequency {schedule.frequency}), "
            f"and this run has {total_steps} steps. Received: {schedule!r}. Let it begin and end earlier, or give "
            "times as fractions of the run; or train for more epochs."
        )


def check_time(name: str, value) -> int | float:
    if isinstance(value, bool) or not (hasattr(value, "__index__") or isinstance(value, float)):
        raise TypeError(
            f"`{name}` must be an int (optimizer steps) or a float in [0, 1] (fraction of the run). Received: {value!r}"
        )
    if hasattr(value, "__index__"):
        if value < 0:
            raise ValueError(f"`{name}` must not be negative. Received: {name}={value}")
        return int(value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(
            f"`{name}` as a float is a fraction of the run, in [0, 1]; optimizer steps are an int. "
            f"Received: {name}={value}"
        )
    return float(value)


def to_steps(time: int | float, total_steps: int | None) -> int:
    if isinstance(time, int):
        return time
    if time == 0.0:
        return 0
    if total_steps is None:
        raise ValueError(
            f"A time given as a fraction ({time}) needs the number of steps that will run, and this data has no "
            "known length. Pass `steps_per_epoch` to `fit`, or give `begin` and `end` of the schedule as ints "
            "(optimizer steps); in a custom loop, pass `total_steps` to `attach`."
        )
    return round(time * total_steps)


def _begin_after_end(begin, end) -> str:
    return f"A schedule must not begin after its end. Received: begin={begin}, end={end}"


def _is_tfmot_schedule(value) -> bool:
    """Looks tfmot and `tfmot_compat` up among the loaded modules: who passes a schedule of theirs has imported them."""
    for name in ("tensorflow_model_optimization", "keras_squeeze.tfmot_compat"):
        tfmot = sys.modules.get(name)
        if tfmot is not None and isinstance(value, tfmot.sparsity.keras.PruningSchedule):
            return True
    return False


def _ask_tfmot(schedule, step: int) -> float:
    return float(schedule(step)[1])
