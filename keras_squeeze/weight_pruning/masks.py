"""From scores to masks. Pure functions on NumPy arrays; a mask is boolean, True keeps.

A *pattern* says which zeros are allowed, by dividing a weight into units that live or die together; an *allocation*
(`weight_allocation.py`) says how many units each of several weights keeps. Selection is exact and deterministic: of
equal scores, the one with the lower index is kept.
"""

import itertools
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import numpy as np

from keras_squeeze import checks
from keras_squeeze.weight_pruning.ranking import mark_largest
from keras_squeeze.weight_pruning.weight_allocation import (
    ALLOCATIONS,
    erk_sparsities,
    floor_count,
    highest_share,
    keep_count,
    round_to_sum,
)

Expand = Callable[[np.ndarray], np.ndarray]
"""Turns the flat boolean array of kept units into a mask of the weight's shape."""


class Pattern(ABC):
    """Which zeros are allowed.

    Attributes:
        max_sparsity: The sparsity at which every unit is pruned; a target must not be above it.
        min_units: Units that every weight keeps, so that no layer dies.
    """

    max_sparsity: float = 1.0
    min_units: int = 1

    @abstractmethod
    def units(self, scores: np.ndarray, alive: np.ndarray | None, input_axis: int) -> tuple[np.ndarray, Expand]:
        """Divides a weight into units.

        Args:
            scores: One score per value of the weight.
            alive: Boolean, False where the weight is zero already; None where zeros score lowest anyway.
            input_axis: The axis that is summed over when the layer is applied.

        Returns:
            A flat array with a score for each unit (-inf: prune first), and the function that turns a flat
            boolean array of kept units into a mask.
        """

    @abstractmethod
    def count(self, shape: tuple[int, ...]) -> int:
        """Computes how many units a weight of this shape has."""

    @abstractmethod
    def cover(self, shape: tuple[int, ...], output_axes: Sequence[int]) -> int:
        """Computes how many units it takes to reach every output once."""

    def check(self, shape: tuple[int, ...], name: str) -> None:  # noqa: B027 - most patterns fit every shape
        """Raises a `ValueError` where a weight of this shape cannot have the pattern."""

    @abstractmethod
    def get_config(self) -> dict[str, Any]: ...

    @classmethod
    def from_config(cls, config):
        return cls(**config)

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.get_config().items())
        return f"{type(self).__name__}({arguments})"


@keras.saving.register_keras_serializable("keras_squeeze")
class Unstructured(Pattern):
    """Any value may be zero."""

    def units(self, scores, alive, input_axis):
        flat = scores.reshape(-1)
        if alive is not None:
            flat = np.where(alive.reshape(-1), flat, -np.inf)
        return flat, lambda keep: keep.reshape(scores.shape)

    def count(self, shape):
        return math.prod(shape)

    def cover(self, shape, output_axes):
        return math.prod(shape[axis] for axis in output_axes)

    def get_config(self):
        return {}


@keras.saving.register_keras_serializable("keras_squeeze")
class NOfM(Pattern):
    """At most `n` of every `m` consecutive values along the input axis are kept: `"2:4"` for sparse tensor cores.

    The units are the `m - n` lowest of each group, so a schedule fills the pattern gradually and at sparsity
    `1 - n / m` it is complete. A group at the end that has fewer than `m` values keeps `n` of them.

    Args:
        n: Values kept in each group, at least 1.
        m: Values in a group, more than `n`.

    Reference: Zhou et al. 2021, "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch",
        https://arxiv.org/abs/2102.04010
    """

    min_units = 0  # the best n of every group are no units: they always stay

    def __init__(self, n: int, m: int):
        if not (isinstance(n, int) and isinstance(m, int) and 1 <= n < m):
            raise ValueError(f"An n:m pattern keeps n of every m values, 1 <= n < m. Received: n={n}, m={m}")
        self.n, self.m = n, m
        self.max_sparsity = 1.0 - n / m

    def check(self, shape, name):
        if len(shape) < 2:
            raise ValueError(f"{name}: a weight of shape {shape} has no input axis for an n:m pattern.")

    def units(self, scores, alive, input_axis):
        lanes = np.moveaxis(scores, input_axis, -1)
        if alive is not None:
            lanes = np.where(np.moveaxis(alive, input_axis, -1), lanes, -np.inf)
        length = lanes.shape[-1]
        padding = -length % self.m
        # A NaN sorts behind everything: the padding is never among the n best, nor a unit.
        negated = np.pad(-lanes, [(0, 0)] * (lanes.ndim - 1) + [(0, padding)], constant_values=np.nan)
        groups = negated.reshape(-1, self.m)
        lowest = np.argsort(groups, axis=-1, kind="stable")[:, self.n :]
        positions = (lowest + np.arange(len(groups))[:, None] * self.m).ravel()
        positions = np.sort(positions[~np.isnan(groups.ravel()[positions])])

        def expand(keep):
            mask = np.ones(groups.size, bool)
            mask[positions] = keep
            mask = mask.reshape(*lanes.shape[:-1], length + padding)[..., :length]
            return np.ascontiguousarray(np.moveaxis(mask, -1, input_axis))

        return -groups.ravel()[positions], expand

    def count(self, shape):
        return math.prod(shape)

    def cover(self, shape, output_axes):
        return 0  # the best n of every group reach every output

    def get_config(self):
        return {"n": self.n, "m": self.m}


@keras.saving.register_keras_serializable("keras_squeeze")
class Blocks(Pattern):
    """Whole blocks along the last axes are zero or not; blocks at the border may be smaller.

    Args:
        shape: Block size along the last axes: `(1, 4)` is four neighbouring outputs of one input.
        pooling: `"mean"` or `"max"` of a block's scores is the block's score.
    """

    def __init__(self, shape: Sequence[int], pooling: str = "mean"):
        shape = tuple(shape)
        if not shape or not all(isinstance(size, int) and size >= 1 for size in shape):
            raise ValueError(f"A block's shape must be positive ints, such as (1, 4). Received: {shape}")
        if pooling not in ("mean", "max"):
            raise ValueError(f"`pooling` must be 'mean' or 'max'. Received: {pooling!r}")
        self.shape, self.pooling = shape, pooling

    def check(self, shape, name):
        if len(shape) < len(self.shape):
            raise ValueError(f"{name}: a weight of shape {shape} cannot have blocks of shape {self.shape}.")

    def units(self, scores, alive, input_axis):
        pooled = self._pool(scores, np.add.reduceat if self.pooling == "mean" else np.maximum.reduceat)
        if self.pooling == "mean":
            pooled = pooled / self._pool(np.ones_like(scores), np.add.reduceat)
        if alive is not None:
            pooled = np.where(self._pool(alive, np.logical_or.reduceat), pooled, -np.inf)

        def expand(keep):
            mask = keep.reshape(pooled.shape)
            for axis, size in self._axes(scores.shape):
                mask = np.repeat(mask, size, axis=axis).take(range(scores.shape[axis]), axis=axis)
            return mask

        return pooled.ravel(), expand

    def count(self, shape):
        return self.cover(shape, range(len(shape)))

    def cover(self, shape, output_axes):
        sizes = dict(self._axes(shape))
        axes = {axis % len(shape) for axis in output_axes}
        return math.prod(-(-shape[axis] // sizes.get(axis, 1)) for axis in axes)

    def _pool(self, array, reduceat):
        for axis, size in self._axes(array.shape):
            array = reduceat(array, np.arange(0, array.shape[axis], size), axis=axis)
        return array

    def _axes(self, shape):
        first = len(shape) - len(self.shape)
        return [(first + index, size) for index, size in enumerate(self.shape) if size > 1]

    def get_config(self):
        return {"shape": list(self.shape), "pooling": self.pooling}


def get_pattern(identifier) -> Pattern:
    """Turns `"unstructured"`, `"n:m"`, a block shape, a config or a `Pattern` into a `Pattern`.

    Raises:
        ValueError: an unknown string or an impossible pattern.
        TypeError: something else.
    """
    if isinstance(identifier, Pattern):
        return identifier
    if isinstance(identifier, dict):
        return keras.saving.deserialize_keras_object(identifier)
    if isinstance(identifier, (tuple, list)):
        return Blocks(identifier)
    if isinstance(identifier, str):
        ratio = re.fullmatch(r"(\d+):(\d+)", identifier)
        if ratio:
            return NOfM(int(ratio[1]), int(ratio[2]))
        if identifier == "unstructured":
            return Unstructured()
        raise ValueError(
            "`pattern` must be 'unstructured', 'n:m' such as '2:4', or a block shape such as (1, 4). "
            f"Received: {identifier!r}"
        )
    raise TypeError(f"`pattern` must be a string, a block shape or a Pattern. Received: {identifier!r}")


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


def check_reachable(sparsity: float, pattern: Pattern) -> None:
    """Raises a `ValueError` where a target is more than a pattern allows."""
    if sparsity > pattern.max_sparsity + 1e-6:
        raise ValueError(
            f"Pattern {pattern!r} allows a sparsity of at most {pattern.max_sparsity:g}. Received: sparsity="
            f"{sparsity}. Lower the target or choose another pattern."
        )


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
