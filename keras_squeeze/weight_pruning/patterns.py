"""Patterns: which zeros are allowed in a weight. A pattern divides it into units that live or die together.

A mask is a boolean array of the weight's shape, True keeps.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from keras_squeeze.configurable import Configurable

Expand = Callable[[np.ndarray], np.ndarray]
"""Turns the flat boolean array of kept units into a mask of the weight's shape."""


class Pattern(Configurable, ABC):
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

    def check(self, shape: tuple[int, ...], name: str) -> None:
        """Raises a `ValueError` where a weight of this shape cannot have the pattern."""

    @abstractmethod
    def get_config(self) -> dict[str, Any]: ...


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
        shape: Block size along the last axes: `(1, 4)` is four neighboring outputs of one input.
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


def check_reachable(sparsity: float, pattern: Pattern) -> None:
    """Raises a `ValueError` where a target is more than a pattern allows."""
    if sparsity > pattern.max_sparsity + 1e-6:
        raise ValueError(
            f"Pattern {pattern!r} allows a sparsity of at most {pattern.max_sparsity:g}. Received: sparsity="
            f"{sparsity}. Lower the target or choose another pattern."
        )
