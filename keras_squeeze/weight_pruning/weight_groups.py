"""Weights that follow one schedule, and how their masks are chosen."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import keras
import numpy as np

from keras_squeeze import checks, schedules
from keras_squeeze.data import check_reusable
from keras_squeeze.introspection.selection import (
    CompressibleLayer,
    CompressibleWeight,
    Selection,
    check_finite,
    compile_patterns,
)
from keras_squeeze.introspection.variables import read
from keras_squeeze.training.gradients import BATCHES, GradientWindow, MeanGradients
from keras_squeeze.training.mask_constraint import MaskConstraint
from keras_squeeze.training.update_cost import FEWEST, OBSERVED, WEIGHTS, affordable_updates
from keras_squeeze.weight_pruning import criteria
from keras_squeeze.weight_pruning.masks import check_floors, is_at_floor, select_masks
from keras_squeeze.weight_pruning.patterns import Pattern, get_pattern
from keras_squeeze.weight_pruning.weight_allocation import ALLOCATIONS


@dataclass(frozen=True)
class PruningMethod:
    """How masks are chosen: everything but how many zeros, and where."""

    allocation: str
    pattern: Pattern
    criterion: criteria.Criterion
    data: object

    @classmethod
    def make(cls, allocation, pattern, criterion, data, *, observes: bool = False) -> "PruningMethod":
        """Checks the arguments. With `observes`, a criterion may take its gradients from the training."""
        checks.one_of("allocation", allocation, ALLOCATIONS)
        criterion = criteria.get(criterion)
        if criterion.needs_gradients and data is None and not observes:
            raise ValueError(
                f"Criterion {criterion!r} uses gradients and needs `data`: pass data=(x, y) or a dataset of batches. "
                "Received: data=None"
            )
        check_reusable(data)
        return cls(allocation, get_pattern(pattern), criterion, data)

    @property
    def observes(self) -> bool:
        """Whether gradients are those of the training."""
        return self.criterion.needs_gradients and self.data is None

    def check(self, model, weights: Sequence[CompressibleWeight]) -> None:
        """Raises what a criterion with data would raise at its first update."""
        if self.criterion.needs_gradients and not self.observes:
            criteria.loss_gradients(model, [weight.variable for weight in weights], self.data, num_batches=1)

    def masks(
        self,
        model,
        weights: Sequence[CompressibleWeight],
        sparsity: float,
        gradients: Sequence[np.ndarray | None] | None = None,
    ) -> list[np.ndarray]:
        """Chooses the masks of weights that share a target.

        Args:
            model: The compiled model, for gradients on `data`.
            weights: The weights.
            sparsity: Their target.
            gradients: Those that were observed in training, one per weight; None where there are none.

        Raises:
            FloatingPointError: scores are not finite; the message names every such weight.
        """
        gradients = [None] * len(weights) if gradients is None else gradients
        if self.criterion.needs_gradients and not self.observes:
            variables = [weight.variable for weight in weights]
            gradients = criteria.loss_gradients(model, variables, self.data, num_batches=self.criterion.num_batches)
        alive = None
        if not self.criterion.zero_is_lowest:
            alive = (read(weight.variable) != 0 for weight in weights)
        bad: list[str] = []
        masks = select_masks(
            (self._scores(weight, gradient, bad) for weight, gradient in zip(weights, gradients, strict=True)),
            sparsity,
            allocation=self.allocation,
            pattern=self.pattern,
            input_axes=[weight.input_axis for weight in weights],
            alive=alive,
            output_axes=[weight.output_axes for weight in weights],
        )
        if bad:
            raise FloatingPointError(f"NaN or infinite scores of {', '.join(bad)}.")
        return masks

    def _scores(self, weight: CompressibleWeight, gradient: np.ndarray | None, bad: list[str]) -> np.ndarray:
        """The scores of one weight; where they are not finite, its path goes to `bad`."""
        scores = self.criterion.scores(read(weight.variable), gradient, weight.path)
        flat = scores.reshape(-1)
        # The sum of squares is the fastest test for NaN and infinity, but it can overflow.
        if not np.isfinite(np.dot(flat, flat)) and not np.isfinite(flat).all():
            bad.append(weight.path)
            return np.zeros_like(scores)
        return scores


class WeightGroup:
    """Weights that follow one schedule, and their masks."""

    def __init__(self, schedule: schedules.Schedule, layers: Sequence[CompressibleLayer]):
        self.schedule = schedule
        self.weights = [weight for layer in layers for weight in layer.weights]
        self.size = sum(math.prod(weight.variable.shape) for weight in self.weights)
        self.zeros = {id(weight.variable): (0, math.prod(weight.variable.shape)) for weight in self.weights}
        self.constraints: list[MaskConstraint] = []
        self.window: GradientWindow[MeanGradients] | None = None  # where gradients of the training are used
        self._done = -1  # the step of the last update
        self._total_steps: int | None = None

    @property
    def variables(self) -> list[keras.Variable]:
        return [weight.variable for weight in self.weights]

    def spread(self, steps: int | None, trainable: Sequence[tuple[int, ...]], observes: bool) -> bool:
        """Gives the schedule as many updates as the run can pay for; False where these are fewer than it gets."""
        if self.schedule.frequency is not None:
            return True
        begin, end = self.schedule.span(steps)
        sizes = [math.prod(variable.shape) for variable in self.variables]
        cost = WEIGHTS.of(sizes) + (BATCHES * OBSERVED.of(sizes) if observes else 0.0)
        affordable = affordable_updates(steps or end, trainable, cost)
        self.schedule = self.schedule.with_updates(max(affordable, FEWEST))
        return affordable >= min(FEWEST, end - begin)

    @property
    def prunes(self) -> bool:
        """Whether the schedule ever asks for zeros."""
        return max(self.schedule.initial, self.schedule.final) > 0

    @property
    def is_begun(self) -> bool:
        """Whether an update was made."""
        return self._done >= 0

    def hold_zeros(self) -> None:
        """Keeps what is zero until the first update, such as in a run that is resumed."""
        if not self.is_begun:
            for constraint in self.constraints:
                constraint.apply(read(constraint.variable) != 0)

    def zeros_kept(self, target: float) -> list[np.ndarray] | None:
        """The masks of the zeros that are there, if they are as many as the target asks for: those of a resumed run."""
        masks = [read(variable) != 0 for variable in self.variables]
        zeros = self.size - sum(int(np.count_nonzero(mask)) for mask in masks)
        return masks if zeros >= target * self.size - len(masks) else None

    def check(self, total_steps: int | None, method: PruningMethod) -> None:
        """Raises where the weights or the schedule do not fit, before anything is changed."""
        check_finite(self.weights)
        for weight in self.weights:
            method.pattern.check(tuple(weight.variable.shape), weight.path)
        schedules.check_fires(self.schedule, total_steps)
        if method.allocation != "uniform":
            shapes = [tuple(weight.variable.shape) for weight in self.weights]
            highest = max(self.schedule.initial, self.schedule.final)
            check_floors(shapes, [weight.output_axes for weight in self.weights], highest, method.pattern)

    def at_floor(self, method: PruningMethod, sparsity: float) -> list[str]:
        """The paths of weights that their floor kept from losing more, at the sparsity of the last update."""
        if method.allocation == "uniform":
            return []
        return [
            weight.path
            for weight in self.weights
            if is_at_floor(read(weight.variable) != 0, weight.output_axes, sparsity, method.pattern)
        ]

    def due(self, step: int, total_steps: int | None) -> int | None:
        """The step of the update that has to be made now, if any; of several that were passed, the last."""
        last = self.schedule.last_update(step, total_steps)
        return last if last is not None and last > self._done else None

    def next_update(self, total_steps: int | None) -> int | None:
        return self.schedule.next_update(self._done, total_steps)

    def target(self, total_steps: int | None) -> float:
        return self.schedule(self.schedule.span(total_steps)[1], total_steps)

    def apply(self, masks: Sequence[np.ndarray], step: int) -> None:
        for constraint, mask in zip(self.constraints, masks, strict=True):
            constraint.apply(mask)
            self.zeros[id(constraint.variable)] = mask.size - int(np.count_nonzero(mask)), mask.size
        self._done = step
        self._open_window()

    def skip(self, step: int) -> None:
        """Leaves the update of a step out."""
        self._done = step
        self._open_window()

    def begin(self, window: GradientWindow[MeanGradients] | None, total_steps: int | None) -> None:
        """Starts over: nothing is done, and the first update is the next."""
        self.window, self._total_steps, self._done = window, total_steps, -1
        if window is not None:
            window.open_before(self.schedule.next_update(-1, total_steps), None)

    def _open_window(self) -> None:
        if self.window is not None:
            self.window.open_before(self.next_update(self._total_steps), self._done)


def schedules_by_pattern(schedule) -> dict:
    """`{regular expression, or None for every layer: Schedule}`."""
    if isinstance(schedule, dict) and "class_name" not in schedule:
        if not schedule:
            raise ValueError("`schedule` is an empty dictionary; give at least one {regular expression: sparsity}.")
        compile_patterns(schedule)
        return {pattern: schedules.get(part) for pattern, part in schedule.items()}
    return {None: schedules.get(schedule)}


def divide_by_schedule(selection: Selection, parts: dict):
    """Pairs every schedule with the layers that take it: those whose path its expression is the first to match."""
    if None in parts:
        return [(parts[None], selection.layers)]
    patterns = dict(zip(parts, compile_patterns(parts), strict=True))
    chosen: dict[str, list[CompressibleLayer]] = {pattern: [] for pattern in parts}
    for layer in selection.layers:
        first = next((text for text, pattern in patterns.items() if pattern.search(layer.path)), None)
        if first is not None:
            chosen[first].append(layer)
    unused = [pattern for pattern, layers in chosen.items() if not layers]
    if unused:
        raise ValueError(
            f"These expressions of the schedule select no layer: {', '.join(map(repr, unused))}. Layers: "
            f"{', '.join(layer.path for layer in selection.layers)}"
        )
    return [(parts[pattern], layers) for pattern, layers in chosen.items()]
