"""tfmot's pruning schedules, and what they mean for the callbacks of this package."""

import sys
from abc import ABC, abstractmethod
from typing import Any

import keras

from keras_squeeze import checks, schedules

_PACKAGE = "keras_squeeze.tfmot_compat"


class PruningSchedule(ABC):
    """Base class: when to prune, and how much, in tfmot's terms.

    A subclass returns from a call whether weights are pruned before a training step (counted from 1), and how much of
    them. It may use `_should_prune_in_step`.

    Unlike tfmot's, a schedule can be made again from its config, which may be the arguments alone or tfmot's
    `{"class_name": ..., "config": {the arguments}}`.
    """

    @abstractmethod
    def __call__(self, step) -> tuple:
        """`(whether weights are pruned in this step, the sparsity)`, tensors or Python values."""

    @abstractmethod
    def get_config(self) -> dict[str, Any]: ...

    @classmethod
    def from_config(cls, config):
        return cls(**config.get("config", config))

    def _should_prune_in_step(self, step, begin_step, end_step, frequency):
        """Whether a step is one of every `frequency` from `begin_step` to `end_step` (negative: for ever)."""
        ops = keras.ops
        in_range = ops.logical_and(step >= begin_step, ops.logical_or(step <= end_step, end_step < 0))
        return ops.logical_and(in_range, ops.equal((step - begin_step) % frequency, 0))

    def _validate_step(self, begin_step, end_step, frequency, allow_negative_1):
        """Raises a `ValueError` for times that are none, or in the wrong order."""
        problems = []
        if begin_step < 0:
            problems.append("`begin_step` must not be negative")
        if end_step == -1 and not allow_negative_1:
            problems.append("`end_step` must be the step at which the final sparsity is reached, not -1")
        if end_step < -1:
            problems.append("`end_step` must be -1 (the end of the training) or a step")
        if -1 < end_step < begin_step:
            problems.append("`end_step` must not be before `begin_step`")
        if frequency <= 0:
            problems.append("`frequency` must be a number of steps, at least 1")
        if problems:
            raise ValueError(
                f"{'; '.join(problems)}. Received: begin_step={begin_step}, end_step={end_step}, frequency={frequency}"
            )

    def _validate_sparsity(self, sparsity, variable_name):
        checks.fraction(variable_name, sparsity)

    def _config_of(self, *names: str) -> dict[str, Any]:
        return {"class_name": type(self).__name__, "config": {name: getattr(self, name) for name in names}}


@keras.saving.register_keras_serializable(_PACKAGE)
class ConstantSparsity(PruningSchedule):
    """The same sparsity from the first update on.

    As in tfmot, steps are counted from 1, so that with `begin_step=0` the first update is that of step `frequency`.

    Args:
        target_sparsity: Sparsity, in [0, 1).
        begin_step: First step at which weights may be pruned.
        end_step: Last one; -1 for the end of the training.
        frequency: Steps between updates.

    Raises:
        ValueError, TypeError: a value outside its range.
    """

    def __init__(self, target_sparsity, begin_step, end_step=-1, frequency=100):
        self.target_sparsity = target_sparsity
        self.begin_step = _whole("begin_step", begin_step)
        self.end_step = _whole("end_step", end_step)
        self.frequency = _whole("frequency", frequency)
        self._validate_step(begin_step, end_step, frequency, allow_negative_1=True)
        self._validate_sparsity(target_sparsity, "target_sparsity")

    def __call__(self, step):
        is_update = self._should_prune_in_step(step, self.begin_step, self.end_step, self.frequency)
        return is_update, keras.ops.convert_to_tensor(self.target_sparsity, "float32")

    def get_config(self):
        return self._config_of("target_sparsity", "begin_step", "end_step", "frequency")


@keras.saving.register_keras_serializable(_PACKAGE)
class PolynomialDecay(PruningSchedule):
    """The density decays as a polynomial: `final + (initial - final) * (1 - p)**power` at position p of the span.

    An update at `end_step` always happens. tfmot leaves it out where `frequency` does not divide the span, and never
    reaches `final_sparsity` then.

    Args:
        initial_sparsity: Sparsity at `begin_step`, in [0, 1).
        final_sparsity: Sparsity at `end_step`, in [0, 1).
        begin_step: First step at which weights may be pruned.
        end_step: Last one.
        power: Exponent.
        frequency: Steps between updates.

    Raises:
        ValueError, TypeError: a value outside its range.

    Reference: Zhu & Gupta 2017, "To prune, or not to prune", https://arxiv.org/abs/1710.01878
    """

    def __init__(self, initial_sparsity, final_sparsity, begin_step, end_step, power=3, frequency=100):
        self.initial_sparsity = initial_sparsity
        self.final_sparsity = final_sparsity
        self.power = power
        self.begin_step = _whole("begin_step", begin_step)
        self.end_step = _whole("end_step", end_step)
        self.frequency = _whole("frequency", frequency)
        self._validate_step(begin_step, end_step, frequency, allow_negative_1=False)
        self._validate_sparsity(initial_sparsity, "initial_sparsity")
        self._validate_sparsity(final_sparsity, "final_sparsity")

    def __call__(self, step):
        ops = keras.ops
        # In float32 and in this order, as tfmot does, so that both keep the same number of weights.
        span = max(self.end_step - self.begin_step, 1)
        position = ops.clip(ops.cast(step - self.begin_step, "float32") / float(span), 0.0, 1.0)
        decayed = ops.power(1 - position, ops.cast(self.power, "float32"))
        sparsity = (self.initial_sparsity - self.final_sparsity) * decayed + self.final_sparsity
        return self._should_prune_in_step(step, self.begin_step, self.end_step, self.frequency), sparsity

    def get_config(self):
        return self._config_of("initial_sparsity", "final_sparsity", "power", "begin_step", "end_step", "frequency")


def _whole(name: str, steps) -> int:
    """A number of steps as an int, such as one that NumPy has computed."""
    if isinstance(steps, bool) or not hasattr(steps, "__int__") or int(steps) != steps:
        raise TypeError(f"`{name}` must be a whole number of steps. Received: {name}={steps!r}")
    return int(steps)


DEFAULT = ConstantSparsity(0.5, 0)


def get(schedule):
    """A schedule as this module has it: one of its own, or one of the real tfmot's.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(schedule, PruningSchedule):
        return schedule
    tfmot = sys.modules.get("tensorflow_model_optimization")  # who passes one of its schedules has imported it
    theirs = tfmot.sparsity.keras if tfmot is not None else None
    if theirs is not None and isinstance(schedule, theirs.PruningSchedule):
        for ours in (ConstantSparsity, PolynomialDecay):
            if type(schedule) is getattr(theirs, ours.__name__):
                return ours.from_config(schedule.get_config())
        return schedule
    raise TypeError(
        "`pruning_schedule` must be a `PruningSchedule`, such as PolynomialDecay(0.0, 0.8, begin_step=0, "
        f"end_step=1000) or ConstantSparsity(0.5, 0). Received: {schedule!r}. A schedule of keras_squeeze.schedules "
        "goes to the native callback: keras_squeeze.MagnitudePruning(schedule)."
    )


def course_of(schedule, complete: float | None = None) -> schedules.Schedule:
    """What a schedule of tfmot's kind means for `MagnitudePruning`: a `Course`, or for one of a user's own `Asked`."""
    return (Course if isinstance(schedule, (ConstantSparsity, PolynomialDecay)) else Asked)(schedule, complete)


class Course(schedules.Schedule):
    """The course of a tfmot schedule: what tfmot does before step t is due here after t - 1 steps.

    Args:
        schedule: `ConstantSparsity` or `PolynomialDecay`.
        complete: For n:m patterns: the sparsity of the complete pattern. The schedule then says when, the pattern how
            much: it is complete where the schedule ends, and its first update is where the schedule begins.
    """

    def __init__(self, schedule, complete: float | None = None):
        self.schedule, self.complete = schedule, complete
        at_begin = complete is not None or schedule.begin_step > 0
        first = max(schedule.begin_step, 1) if at_begin else schedule.frequency
        last = max(schedule.end_step, 1) if schedule.end_step >= 0 else first
        if isinstance(schedule, ConstantSparsity):
            last = min(first, last)  # later updates would find the same zeros
        self._final = self._asked_at(last - 1)
        super().__init__(self(last - 1), self(min(first, last) - 1), begin=min(first, last) - 1, end=last - 1)

    def __call__(self, step, total_steps=None):
        sparsity = self._asked_at(step)
        if self.complete is None:
            return sparsity
        return self.complete * (sparsity / self._final if self._final else 1.0)

    def last_update(self, step, total_steps=None):
        if not self.begin <= step < self.end:
            return self.end if step >= self.end else None
        begin, every = self.schedule.begin_step, self.schedule.frequency
        return max(self.begin, begin + (step + 1 - begin) // every * every - 1)

    def next_update(self, step, total_steps=None):
        if not self.begin <= step < self.end:
            return None if step >= self.end else self.begin
        begin, every = self.schedule.begin_step, self.schedule.frequency
        return min(begin + ((step + 1 - begin) // every + 1) * every - 1, self.end)

    def _asked_at(self, step: int) -> float:
        return float(self.schedule(step + 1)[1])


class Asked(schedules.Schedule):
    """A schedule of a user's own, which is asked at every step whether to prune."""

    def __init__(self, schedule, complete: float | None = None):
        self.schedule, self.complete = schedule, complete
        self._last: int | None = None
        self._next = 0  # not asked about yet
        super().__init__(0.0, begin=0, end=0)

    def __call__(self, step, total_steps=None):
        return float(self.schedule(step + 1)[1]) if self.complete is None else self.complete

    def last_update(self, step, total_steps=None):
        while self._next <= step:
            if self.schedule(self._next + 1)[0]:
                self._last = self._next
            self._next += 1
        return self._last

    def next_update(self, step, total_steps=None):
        end = getattr(self.schedule, "end_step", -1)
        return None if 0 <= end <= self._next else self._next
