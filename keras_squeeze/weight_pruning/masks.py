"""From scores to masks. Pure functions on NumPy arrays; a mask is boolean, True keeps.

A *pattern* (`patterns.py`) says which zeros are allowed, by dividing a weight into units that live or die together; an
*allocation* (`weight_allocation.py`) says how many units each of several weights keeps. Selection is exact and
deterministic: of equal scores, the one with the lower index is kept.
"""

import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np

from keras_squeeze import checks
from keras_squeeze.weight_pruning.patterns import Pattern, check_reachable, get_pattern
from keras_squeeze.weight_pruning.ranking import mark_largest
from keras_squeeze.weight_pruning.weight_allocation import (
    ALLOCATIONS,
    erk_sparsities,
    floor_count,
    highest_share,
    keep_count,
    round_to_sum,
)


def select_masks(
    scores: Iterable[np.ndarray],
    sparsity: float,
    *,
    allocation: str = "uniform",
    pattern="unstructured",
    input_axes: Iterable[int] | None = None,
    alive: Iterable[np.ndarray | None] | None = None,
    output_axes: Iterable[Sequence[int]] | None = None,
) -> list[np.ndarray]:
    """Chooses which values of several weights to keep.

    Args:
        scores: One array of scores per weight, of the weight's shape; higher means keep. A generator saves time and
            memory with `"uniform"`, which takes one after the other.
        sparsity: Target in [0, 1), at most what the pattern allows.
        allocation: `"uniform"`, every weight has the target sparsity; `"global"`, all scores compete; `"erk"` and
            `"auto"`, weights with more values per input and output are sparser (`erk_sparsities`). All but `"uniform"`
            keep in every weight a fifth of the overall density, and one unit of every output.
        pattern: A `Pattern` or what `get_pattern` takes.
        input_axes: For n:m patterns: the axis of each weight along which groups run; default -2.
        alive: Per weight, False where it is zero already: those are pruned first. None: scores say it all, 0 for zero.
        output_axes: The axes of each weight's outputs; default `(-1,)`. An output that is zero altogether stays so.

    Returns:
        One boolean mask per weight, True keeps.

    Raises:
        ValueError: the sparsity is more than the pattern allows, or an unknown allocation or pattern.
    """
    pattern = get_pattern(pattern)
    checks.one_of("allocation", allocation, ALLOCATIONS)
    check_reachable(sparsity, pattern)
    parts = zip(
        scores,
        itertools.repeat(None) if alive is None else alive,
        itertools.repeat(-2) if input_axes is None else input_axes,
        strict=False,
    )
    share = _share_of_units(sparsity, pattern)
    if allocation == "uniform":
        divided = (_Divided(pattern, *part) for part in parts)
        return [part.mask(part.largest(keep_count(part.size, share, pattern.min_units))) for part in divided]
    axes = itertools.repeat((-1,)) if output_axes is None else output_axes
    weights = [_Divided(pattern, *part, outputs) for part, outputs in zip(parts, axes, strict=False)]
    kept = _keep_globally(weights, share) if allocation == "global" else _keep_by_shape(weights, share)
    return [part.mask(part.with_every_output(keep)) for part, keep in zip(weights, kept, strict=True)]


def check_floors(
    shapes: Sequence[tuple[int, ...]], output_axes: Sequence[Sequence[int]], sparsity: float, pattern: Pattern
) -> None:
    """Raises a `ValueError` where weights that keep what `floor_count` says cannot have the sparsity together."""
    if not pattern.min_units:
        return  # what the pattern keeps is above every floor
    sizes = [pattern.count(shape) for shape in shapes]
    covers = [_cover(pattern, shape, axes) for shape, axes in zip(shapes, output_axes, strict=True)]
    highest = highest_share(sizes, covers) * pattern.max_sparsity
    if sparsity > highest + 1e-9:
        raise ValueError(
            f"A sparsity of {sparsity:g} is out of reach: every weight keeps a fifth of the overall density and one "
            f"value of every output, which allows at most {math.floor(highest * 1e4) / 1e4:g}. Received: sparsity="
            f"{sparsity:g}. Lower it, select larger layers, or pass allocation='uniform', which has no such floor."
        )


def is_at_floor(mask: np.ndarray, output_axes: Sequence[int], sparsity: float, pattern: Pattern) -> bool:
    """Whether a weight was kept from losing more by its floor."""
    if not pattern.min_units:
        return False
    units, _ = pattern.units(mask.astype("float32"), None, -2)
    floor = floor_count(units.size, _cover(pattern, mask.shape, output_axes), _share_of_units(sparsity, pattern))
    return bool(np.count_nonzero(units) <= floor < units.size)


class _Divided:
    """One weight as units that live or die together.

    Attributes:
        units: The score of each unit; -inf for what is zero already.
        size: How many there are.
    """

    def __init__(self, pattern: Pattern, scores, alive, input_axis: int, output_axes: Sequence[int] = ()):
        self.units, self._expand = pattern.units(scores, alive, input_axis)
        self.size = self.units.size
        self.shape = scores.shape
        self._output_axes = output_axes
        self._cover = _cover(pattern, self.shape, output_axes)
        self._dead = 0.0 if alive is None else -np.inf  # the score of a unit that is zero already

    def floor(self, share: float) -> int:
        """The units that stay when a share of all units goes."""
        return floor_count(self.size, self._cover, share)

    def largest(self, count: int) -> np.ndarray:
        """Marks the `count` best units."""
        return mark_largest([self.units], count)[0]

    def mask(self, keep: np.ndarray) -> np.ndarray:
        return self._expand(keep)

    def with_every_output(self, keep: np.ndarray) -> np.ndarray:
        """As many units, but one of every output among them that is not zero already."""
        if not self._cover:
            return keep
        axes = sorted(axis % len(self.shape) for axis in self._output_axes)
        others = tuple(axis for axis in range(len(self.shape)) if axis not in axes)
        if self._expand(keep).any(axis=others).all():
            return keep
        owners = np.moveaxis(self._expand(np.arange(self.size)), axes, range(len(axes)))
        owners = owners.reshape(math.prod(owners.shape[: len(axes)]), -1)
        best = owners[np.arange(len(owners)), np.argmax(self.units[owners], axis=1)]
        forced = np.array(self.units, "float32")
        forced[best[self.units[best] > self._dead]] = np.inf
        return mark_largest([forced], int(np.count_nonzero(keep)))[0]


def _cover(pattern: Pattern, shape: tuple[int, ...], output_axes: Sequence[int]) -> int:
    """The units that it takes to reach every output; 0 where outputs have one value each and could not be pruned."""
    values_per_output = math.prod(shape) // max(math.prod(shape[axis] for axis in output_axes), 1)
    return pattern.cover(shape, output_axes) if values_per_output > 1 else 0


def _share_of_units(sparsity: float, pattern: Pattern) -> float:
    return min(sparsity / pattern.max_sparsity, 1.0)


def _keep_by_shape(weights: Sequence[_Divided], share: float) -> list[np.ndarray]:
    """Marks the units that stay by the Erdos-Renyi-kernel rule."""
    with_units = [weight for weight in weights if weight.size]  # a pattern may leave nothing to prune of small ones
    floors = [weight.floor(share) for weight in with_units]
    densities = [floor / weight.size for floor, weight in zip(floors, with_units, strict=True)]
    shares = erk_sparsities([weight.shape for weight in with_units], share, densities)
    exact = [weight.size * (1.0 - own_share) for weight, own_share in zip(with_units, shares, strict=True)]
    counts = round_to_sum(exact, keep_count(sum(weight.size for weight in with_units), share, 0))
    kept = {id(w): max(count, floor) for w, count, floor in zip(with_units, counts, floors, strict=True)}
    return [weight.largest(kept.get(id(weight), 0)) for weight in weights]


def _keep_globally(weights: Sequence[_Divided], share: float) -> list[np.ndarray]:
    """Marks the best units of all weights together, and in every weight at least its floor."""
    floors = [weight.floor(share) for weight in weights]
    count = keep_count(sum(weight.size for weight in weights), share, 0)
    kept: list[np.ndarray] = [np.zeros(0, bool)] * len(weights)
    competing = list(range(len(weights)))
    while competing:
        marks = mark_largest([weights[index].units for index in competing], count)
        for index, mark in zip(competing, marks, strict=True):
            kept[index] = mark
        low = [index for index in competing if np.count_nonzero(kept[index]) < floors[index]]
        if not low:
            break
        for index in low:
            kept[index] = weights[index].largest(floors[index])
        count -= sum(floors[index] for index in low)
        competing = [index for index in competing if index not in low]
    return kept
