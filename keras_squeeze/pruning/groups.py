"""Weights that follow one schedule, and how their masks are chosen."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from keras_squeeze import criteria, schedules
from keras_squeeze.pruning.constraints import MaskConstraint
from keras_squeeze.pruning.masks import Pattern, check_allocation, get_pattern, select_masks
from keras_squeeze.selection import (
    CompressibleLayer,
    CompressibleWeight,
    Selection,
    check_finite,
    compile_patterns,
    read,
)


@dataclass(frozen=True)
class PruningMethod:
    """How masks are chosen: everything but how many zeros, and where."""

    allocation: str
    pattern: Pattern
    criterion: criteria.Criterion
    data: object

    @classmethod
    def make(cls, allocation, pattern, criterion, data) -> "PruningMethod":
        check_allocation(allocation)
        criterion = criteria.get(criterion)
        if criterion.needs_gradients and data is None:
            raise ValueError(
                f"Criterion {criterion!r} uses gradients and needs `data`: pass data=(x, y) or a dataset of batches. "
                "Received: data=None"
            )
        criteria.check_reusable(data)
        return cls(allocation, get_pattern(pattern), criterion, data)

    def check(self, model, weights: Sequence[CompressibleWeight]) -> None:
        """Raises what a criterion with data would raise at its first update."""
        if self.criterion.needs_gradients:
            criteria.loss_gradients(model, [weight.variable for weight in weights], self.data, num_batches=1)

    def masks(self, model, weights: Sequence[CompressibleWeight], sparsity: float) -> list[np.ndarray]:
        """Chooses the masks of weights that share a target.

        Raises:
            FloatingPointError: scores are not finite; the message names every such weight.
        """
        gradients: Sequence[np.ndarray | None] = [None] * len(weights)
        if self.criterion.needs_gradients:
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
        self._done = -1  # the step of the last update

    def check(self, total_steps: int | None, pattern: Pattern) -> None:
        """Raises where the weights or the schedule do not fit, before anything is changed."""
        check_finite(self.weights)
        for weight in self.weights:
            pattern.check(tuple(weight.variable.shape), weight.path)
        schedules.check_fires(self.schedule, total_steps)

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

    def skip(self, step: int) -> None:
        """Leaves the update of a step out."""
        self._done = step


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
