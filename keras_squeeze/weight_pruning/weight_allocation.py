"""How many values each of several weights keeps, for a sparsity of all of them together. Pure functions on numbers."""

import math
from collections.abc import Sequence

import numpy as np

ALLOCATIONS = ("auto", "uniform", "global", "erk")

FLOOR = 0.2
"""The share of the overall density that every weight keeps, except with `"uniform"`."""

_HALVINGS = 60


def keep_count(size: int, share_pruned: float, at_least: int = 1) -> int:
    """Computes how many of `size` units stay: `round_half_even(size * (1 - share_pruned))`, but at least `at_least`.

    Computed in float32, as tfmot does, so that both keep the same number; from 2**24 on, where float32 cannot
    count, in float64.
    """
    if size < 2**24:
        kept = np.round(np.float32(size) * (np.float32(1) - np.float32(share_pruned)))
    else:
        kept = round(size * (1.0 - share_pruned))
    return max(int(kept), at_least)


def floor_count(size: int, cover: int, share_pruned: float) -> int:
    """Computes how many of a weight's `size` units stay whatever the others do.

    Args:
        size: Units of the weight.
        cover: Units that reach every output of the weight once.
        share_pruned: Share of all units that is pruned, in [0, 1].

    Returns:
        A fifth of the overall density, but at least `cover`; at most `size`.
    """
    return min(max(math.ceil(FLOOR * (1.0 - share_pruned) * size - 1e-6), cover), size)


def highest_share(sizes: Sequence[int], covers: Sequence[int]) -> float:
    """Computes the largest share of all units that can be pruned while every weight keeps its `floor_count`."""
    whole = sum(sizes)
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        kept = sum(floor_count(size, cover, middle) for size, cover in zip(sizes, covers, strict=True))
        low, high = (middle, high) if kept <= keep_count(whole, middle) else (low, middle)
    return low


def erk_sparsities(
    shapes: Sequence[tuple[int, ...]], sparsity: float, floors: Sequence[float] | None = None
) -> list[float]:
    """Spreads a sparsity by the Erdos-Renyi-kernel rule: density proportional to `sum(shape) / prod(shape)`.

    Weights that the rule would give a density above 1, or below their floor, get 1 or the floor, and the others bear
    the rest.

    Args:
        shapes: Shapes of the weights, kernel positions included.
        sparsity: Target over all weights together.
        floors: The least density of each weight, in [0, 1]; None for 0.

    Returns:
        One sparsity per weight; the sparsities average to the target, weighted by size.

    Reference: Evci et al. 2020, "Rigging the Lottery", section 3, https://arxiv.org/abs/1911.11134
    """
    sizes = np.array([math.prod(shape) for shape in shapes], "float64")
    raw = np.array([sum(shape) for shape in shapes], "float64") / sizes
    lowest = np.zeros(len(shapes)) if floors is None else np.asarray(floors, "float64")
    to_keep = sizes.sum() * (1.0 - sparsity)

    def densities(scale: float) -> np.ndarray:
        return np.minimum(np.maximum(scale * raw, lowest), 1.0)

    low, high = 0.0, 1.0 / raw.min()  # with the highest all are dense
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if densities(middle) @ sizes <= to_keep else (low, middle)
    return (1.0 - densities(low)).tolist()


def round_to_sum(values: Sequence[float], total: int) -> list[int]:
    """Rounds numbers to ints that add up to `total`, by largest remainder; of equal ones the first is rounded up.

    Where the numbers themselves are far from that sum, they are rounded down.
    """
    counts = [math.floor(value + 1e-6) for value in values]
    missing = total - sum(counts)
    by_remainder = sorted(range(len(values)), key=lambda index: (counts[index] - values[index], index))
    for index in by_remainder[: max(missing, 0)]:
        counts[index] += 1
    return counts
